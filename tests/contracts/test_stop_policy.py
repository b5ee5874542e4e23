from __future__ import annotations

from hasten.lm.decoding.stop import StopPolicy

SLOT = "stop_policy"


class AfterFive(StopPolicy):
    """Shows that the contract can be met."""

    def should_stop(self, sequence_id, prompt_ids, output_ids):
        return len(output_ids) >= 5


DEFAULTS = {"after-five": AfterFive}


def test_answers_after_every_token_and_forgets(provider):
    policy = provider()
    for sequence in (1, 2):
        for length in range(1, 30):
            answer = policy.should_stop(sequence, [5, 6, 7], [9] * length)
            assert isinstance(answer, bool)
            if answer:
                break
    policy.forget(1)
    first = [policy.should_stop(1, [5, 6, 7], [9] * n) for n in range(1, 6)]
    fresh = provider()
    assert first == [fresh.should_stop(8, [5, 6, 7], [9] * n) for n in range(1, 6)]  # 1 began anew
    policy.forget(12345)
