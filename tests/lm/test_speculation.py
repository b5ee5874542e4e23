from __future__ import annotations

import random

import pytest
import torch

from hasten.catalog import loader
from hasten.core.errors import ConflictError, UnsupportedError
from hasten.core.technique import Technique
from hasten.lm.decoding.speculate import Accepted, Drafter, Proposal, Verifier
from hasten.lm.request import FinishReason, SamplingParams


class PromptLookup(Drafter):
    """Proposes what followed the last occurrence of the current token; counts what it is told."""

    def __init__(self) -> None:
        self.commits, self.forgotten, self.proposed = [], [], 0

    def propose(self, sequence_id, token_ids, limit):
        ids = list(token_ids)
        for at in range(len(ids) - 2, -1, -1):
            if ids[at] == ids[-1]:
                guess = ids[at + 1 : at + 1 + limit]
                self.proposed += len(guess)
                return Proposal(tuple(guess), tuple(range(-1, len(guess) - 1)))
        return None

    def commit(self, sequence_id, token_ids):
        self.commits.append((sequence_id, len(token_ids)))

    def forget(self, sequence_id):
        self.forgotten.append(sequence_id)


class Oracle(Drafter):
    """Proposes given continuations, some of them wrong at one place; or samples from its own distribution."""

    def __init__(self, answers, wrong_at=None, probs=None) -> None:
        self.answers, self.wrong_at, self.probs = answers, wrong_at, probs

    def propose(self, sequence_id, token_ids, limit):
        if self.probs is not None:
            tokens = torch.multinomial(self.probs, limit, replacement=True).tolist()
            return Proposal(tuple(tokens), tuple(range(-1, limit - 1)), self.probs.expand(limit, -1))
        for prompt, answer in self.answers:
            if list(token_ids[: len(prompt)]) == prompt:
                guess = answer[len(token_ids) - len(prompt) :][:limit]
                guess = [
                    (t + 1) % 300 if self.wrong_at is not None and i == self.wrong_at else t
                    for i, t in enumerate(guess)
                ]
                return Proposal(tuple(guess), tuple(range(-1, len(guess) - 1))) if guess else None
        return None


class Drafting(Technique):
    slug = "drafting"
    slots = ("drafter",)
    lossless = True

    def provide(self, slot, context):
        return PromptLookup()


class Verifying(Technique):
    slug = "verifying"
    slots = ("verifier",)
    lossless = False

    def provide(self, slot, context):
        class Everything(Verifier):
            def verify(self, proposal, logits_AV, temperature, generator):
                return Accepted(tuple(range(len(proposal.token_ids))), int(logits_AV[-1].argmax()))

        return Everything()


def params(count: int = 24, **more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": count, "temperature": 0, "ignore_eos": True, **more})


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


REPEATING = [[5, 6, 7, 8] * 4, [9, 9, 9, 9, 9], ids_of(12), ids_of(5) * 3]


def idle(llm) -> None:
    assert llm.engine.cache.pool.used == len(llm.engine.cache.store)
    assert not llm.engine.busy


@pytest.mark.parametrize("budget", [64, 6])
def test_prompt_lookup_is_lossless_under_greedy(make_llm, greedy, budget):
    llm = make_llm(Drafting(), max_step_tokens=budget)
    drafter = llm.engine.parts.drafter
    found = llm.generate(REPEATING, params())
    assert [list(c.token_ids) for c in found] == [greedy(llm, p, 24) for p in REPEATING]
    assert drafter.proposed > 0
    assert drafter.commits
    assert len(drafter.forgotten) == len(REPEATING)
    idle(llm)


@pytest.mark.parametrize("wrong_at", [None, 0, 2])
def test_accepts_exactly_the_right_guesses(make_llm, greedy, wrong_at):
    llm = make_llm()
    prompts = [ids_of(7), ids_of(11, 1)]
    answers = [(p, greedy(llm, p, 20)) for p in prompts]
    llm.engine.parts.drafter = Oracle(answers, wrong_at)
    requests = [llm.engine.submit(p, params(20)) for p in prompts]
    llm.engine.run()
    assert [list(r.completion().token_ids) for r in requests] == [a for _, a in answers]
    ledger = requests[0].ledger
    if wrong_at is None:
        assert ledger.accepted == ledger.drafted > 0
        assert ledger.generated == 20
    else:
        # Each round keeps ``wrong_at`` guesses, but the last, which is limited by max_tokens.
        assert ledger.accepted < ledger.drafted
        assert ledger.accepted >= wrong_at * ((20 - 1) // (wrong_at + 1) - 1)
    idle(llm)


def test_fewer_steps_when_guesses_are_right(make_llm, greedy):
    llm = make_llm()
    prompt = ids_of(7)
    llm.engine.parts.drafter = Oracle([(prompt, greedy(llm, prompt, 40))])
    request, steps = llm.engine.submit(prompt, params(28)), 0
    while llm.engine.step():
        steps += 1
    assert steps <= 4  # one prefill, then 9 tokens a round
    assert len(request.completion().token_ids) == 28


def test_everything_else_still_works_with_drafts(make_llm, greedy):
    """Penalties, stop tokens, logprobs, preemption and forks, with drafts that are mostly right."""
    llm = make_llm(kv_tokens=72)
    plain = make_llm(kv_tokens=400)
    prompts = [ids_of(9, n) for n in range(4)]
    shaped = params(20, repetition_penalty=1.3, frequency_penalty=0.3, logprobs=2)
    want = [plain.generate([p], shaped)[0] for p in prompts]
    llm.engine.parts.drafter = Oracle([(p, list(w.token_ids)) for p, w in zip(prompts, want, strict=True)])
    requests = [llm.engine.submit(p, shaped) for p in prompts]
    llm.engine.run()
    for request, expected in zip(requests, want, strict=True):
        found = request.completion()
        assert found.token_ids == expected.token_ids
        for a, b in zip(found.samples[0].logprobs, expected.samples[0].logprobs, strict=True):
            assert (a.token, list(a.top)) == (b.token, list(b.top))
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert sum(r.ledger.preemptions for r in requests) > 0
    assert sum(r.ledger.accepted for r in requests) > 20
    stop = want[0].token_ids[6]
    at = want[0].token_ids.index(stop)
    request = llm.engine.submit(
        prompts[0], params(20, repetition_penalty=1.3, frequency_penalty=0.3, stop_token_ids=(stop,))
    )
    llm.engine.run()
    assert request.completion().token_ids == want[0].token_ids[: at + 1]
    assert request.sequences[0].finish is FinishReason.STOP
    idle(llm)


@pytest.mark.parametrize("own_distribution", [False, True])
def test_sampling_keeps_the_distribution(make_llm, own_distribution):
    """The second token of many seeded requests, with and without drafts: same frequencies (chi-square)."""
    llm = make_llm(max_batch=64, max_step_tokens=600)
    prompt, wanted, count = ids_of(6), {"temperature": 0.7, "top_k": 4}, 1500
    if own_distribution:
        # Guesses drawn from a distribution of the drafter's own: near the model's for the second token, but not it.
        first = params(2, **wanted, seed=0)
        plain = llm.generate([prompt], first)[0].token_ids[0]
        with torch.inference_mode():
            logits = llm._loaded.decoder(torch.tensor([[*prompt, plain]]))[0, -1]
        drafter = Oracle([], probs=(logits / 2).softmax(-1))
    else:
        drafter = Oracle([(prompt, llm.generate([prompt], params(4))[0].token_ids)])

    def second_tokens(drafter, base):
        llm.engine.parts.drafter = drafter
        requests = [llm.engine.submit(prompt, params(3, **wanted, seed=base + i)) for i in range(count)]
        llm.engine.run()
        if drafter is not None:
            assert sum(r.ledger.drafted for r in requests) > count / 2
        return [r.completion().token_ids[:2] for r in requests]

    a, b = second_tokens(None, 0), second_tokens(drafter, 10_000)
    pairs = sorted(set(a) | set(b))
    chi2 = degrees = 0
    for pair in pairs:
        x, y = a.count(pair), b.count(pair)
        if x + y >= 20:
            chi2, degrees = chi2 + (x - y) ** 2 / (x + y), degrees + 1
    assert degrees >= 4
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_bad_proposals_are_refused(make_llm, greedy):
    class Bad(Drafter):
        def __init__(self, proposal):
            self.proposal = proposal

        def propose(self, sequence_id, token_ids, limit):
            return self.proposal if len(token_ids) < 10 else None

    llm = make_llm()
    for proposal, message in [
        (Proposal((1, 2, 3), (-1, 1, 0)), "parents are not a tree"),
        (Proposal((1, 2, 3), (-1, 0)), "parents are not a tree"),
        (Proposal((320,), (-1,)), "outside the vocabulary"),
        (Proposal((1,) * 20, tuple(range(-1, 19))), "more than 8"),
    ]:
        llm.engine.parts.drafter = Bad(proposal)
        bad = llm.engine.submit(ids_of(6), params(12))
        good = llm.engine.submit(ids_of(12), params(12))  # too long for the drafter to speak up
        llm.engine.run()
        assert isinstance(bad.failure, UnsupportedError)
        assert message in str(bad.failure)
        assert list(good.completion().token_ids) == greedy(llm, ids_of(12), 12)
        with pytest.raises(UnsupportedError, match=message):
            llm.generate([ids_of(6)], params(12))
    idle(llm)


@pytest.mark.parametrize("technique", ["flash_attention", "adamas"])
def test_trees_are_refused_where_they_cannot_be_read(make_llm, technique):
    class Tree(Drafter):
        def propose(self, sequence_id, token_ids, limit):
            return Proposal((1, 2, 3)[:limit], (-1, -1, 0)[:limit])

    llm = make_llm(loader.technique(technique)())
    llm.engine.parts.drafter = Tree()
    with pytest.raises(UnsupportedError, match="proposed a tree; this plan verifies chains only"):
        llm.generate([ids_of(6)], params(12))
    idle(llm)


class Forest(Drafter):
    """Hides the right continuation among wrong guesses, in a random tree; sometimes leaves a part of it out."""

    def __init__(self, answers, seed=0):
        self.answers, self.random, self.sizes, self.kept = answers, random.Random(seed), [], []

    def propose(self, sequence_id, token_ids, limit):
        for prompt, answer in self.answers:
            if list(token_ids[: len(prompt)]) == prompt:
                return self.tree(answer[len(token_ids) - len(prompt) :], limit)
        return None

    def tree(self, right, limit):
        """Nodes in random order; ``spine`` holds those of the right path so far."""
        tokens, parents, spine = [], [], [-1]
        want = self.random.randint(0, min(4, len(right)))
        for _ in range(limit):
            if len(spine) <= want and self.random.random() < 0.6:
                tokens.append(right[len(spine) - 1])
                parents.append(spine[-1])
                spine.append(len(tokens) - 1)
            else:
                parent = self.random.randint(-1, len(tokens) - 1)
                depth, node = 0, parent
                while node >= 0:
                    depth, node = depth + 1, parents[node]
                on_path = parent in spine and depth < len(right)
                tokens.append((right[depth] + self.random.randint(1, 200)) % 300 if on_path else 7)
                parents.append(parent)
        self.sizes.append(len(tokens))
        self.kept.append(len(spine) - 1)
        return Proposal(tuple(tokens), tuple(parents))


@pytest.mark.parametrize("shaped", [{}, {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "logprobs": 1}])
@pytest.mark.parametrize(("tight", "use"), [(False, None), (True, None), (False, "hydragen")])
def test_trees_are_verified_in_one_pass(make_llm, shaped, tight, use):
    """Trees of up to 14 nodes, batched, over page borders, with preemption: plain answers, every right guess kept."""
    plain = make_llm(kv_tokens=600)
    prompts = [ids_of(5 + n, n) for n in range(4)]
    want = [plain.generate([p], params(40, **shaped))[0] for p in prompts]
    techniques = () if use is None else (loader.technique(use)(),)
    llm = make_llm(*techniques, kv_tokens=112 if tight else 600, draft_tokens=14, max_step_tokens=64)
    forest = Forest([(p, list(w.token_ids)) for p, w in zip(prompts, want, strict=True)])
    llm.engine.parts.drafter = forest
    requests = [llm.engine.submit(p, params(40, **shaped)) for p in prompts]
    llm.engine.run()
    for request, expected in zip(requests, want, strict=True):
        found = request.completion()
        assert found.token_ids == expected.token_ids
        for a, b in zip(found.samples[0].logprobs, expected.samples[0].logprobs, strict=True):
            assert (a.token, list(a.top)) == (b.token, list(b.top))
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    accepted = sum(r.ledger.accepted for r in requests)
    assert max(forest.sizes) == 14
    if tight:
        assert sum(r.ledger.preemptions for r in requests) > 0
        assert accepted > 20
    else:
        assert accepted >= sum(forest.kept) > 20
    idle(llm)


@pytest.mark.parametrize("trees", [False, True])
def test_a_verified_round_is_one_native_call(make_llm, trees, monkeypatch):
    """Drafts take the same road as plain steps: the whole step in one call, with as many rows as guesses and one."""
    plain = make_llm(dtype="bfloat16")
    prompt = ids_of(9)
    answer = list(plain.generate([prompt], params(30))[0].token_ids)
    llm, rows = make_llm(dtype="bfloat16"), []
    native = llm.engine.runner._stack
    assert native is not None
    kind, step = type(native.stack), type(native.stack).step
    monkeypatch.setattr(kind, "step", lambda self, x, *more: rows.append(len(x)) or step(self, x, *more))
    llm.engine.parts.drafter = (Forest if trees else Oracle)([(prompt, answer)])
    request = llm.engine.submit(prompt, params(30))
    steps = 0
    while llm.engine.step():
        steps += 1
    assert len(rows) == steps + 1
    assert sum(rows) == request.ledger.computed
    assert max(rows[1:]) == 9
    assert len(request.completion().token_ids) == 30


def test_trees_keep_the_distribution(make_llm):
    """Three guesses for the next token, three after the first of them: same frequencies (chi-square)."""
    llm = make_llm(max_batch=64, max_step_tokens=600)
    prompt, wanted, count = ids_of(6), {"temperature": 0.7, "top_k": 4}, 800
    with torch.inference_mode():
        first = llm._loaded.decoder(torch.tensor([prompt]))[0, -1].topk(3).indices.tolist()

    class Tree(Drafter):
        def propose(self, sequence_id, token_ids, limit):
            with torch.inference_mode():
                likely = llm._loaded.decoder(torch.tensor([list(token_ids)]))[0, -1].topk(3).indices.tolist()
            return Proposal((*likely, *first)[:limit], (-1, -1, -1, 0, 0, 0)[:limit])

    def pairs(drafter, base):
        llm.engine.parts.drafter = drafter
        requests = [llm.engine.submit(prompt, params(5, **wanted, seed=base + i)) for i in range(count)]
        llm.engine.run()
        return [r.completion().token_ids[1:3] for r in requests], sum(r.ledger.accepted for r in requests)

    (a, _), (b, accepted) = pairs(None, 0), pairs(Tree(), 10_000)
    assert accepted > count
    chi2 = degrees = 0
    for pair in sorted(set(a) | set(b)):
        x, y = a.count(pair), b.count(pair)
        if x + y >= 20:
            chi2, degrees = chi2 + (x - y) ** 2 / (x + y), degrees + 1
    assert degrees >= 4
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_a_verifier_decides(make_llm):
    llm = make_llm(Drafting(), Verifying())
    request = llm.engine.submit([5, 6, 7, 5, 6], params(12))
    llm.engine.run()
    assert request.ledger.accepted == request.ledger.drafted
    with pytest.raises(ConflictError, match="nothing proposes"):
        make_llm(Verifying())
