"""The calibration driver: what a method sees, in which order, resuming, and how segments are drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hasten.core.errors import IntegrityError, SettingError
from hasten.models.config import DecoderConfig, HeadShape, RopeSpec
from hasten.models.decoder import LAYER_LINEARS, Decoder, DenseLinear
from hasten.weights.calibrate import BlockMethod, LinearReport, calibrate
from hasten.weights.calibrate_data import draw_segments, token_digest
from hasten.weights.calibrate_work import WorkFolder

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    shape=HeadShape(heads=4, kv_heads=2, size=4),
    max_positions=64,
    rope=RopeSpec(10000.0, 4),
)


def tiny_decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(CONFIG).eval()


def tokens(samples: int = 5, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 50, (samples, length), generator=torch.Generator().manual_seed(1))


class Rows:
    """A statistic that keeps everything."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def update(self, x_TI: torch.Tensor) -> None:
        self.parts.append(x_TI.clone())

    @property
    def x_TI(self) -> torch.Tensor:
        return torch.cat(self.parts)


class Coarsen(BlockMethod):
    """Replaces a linear by one with coarsely rounded weights and remembers the inputs it was shown."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        self.saved: list[int] = []

    def statistic(self, name, linear):
        return Rows()

    def process(self, name, linear, statistic):
        self.seen[name] = statistic.x_TI
        replaced = DenseLinear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        replaced.weight.data = (linear.weight * 8).round() / 8
        return replaced, LinearReport(name, 0.5, 1.0, 0.0)

    def save(self, index, reports):
        assert [r.name for r in reports] == [f"layers.{index}.{leaf}" for leaf in LAYER_LINEARS]
        self.saved.append(index)


def inputs_of(decoder: Decoder, token_ids_NL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of every linear in an ordinary forward pass."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: found.__setitem__(name, args[0].clone()))
        for name, module in decoder.linears()
    ]
    with torch.no_grad():
        decoder(token_ids_NL)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("chunk_tokens", [1, 24, 25, 10_000])
@pytest.mark.parametrize("stash_bytes", [0, 12 * 16 * 4 * 3, 1 << 30])  # nothing, some chunks, everything
def test_true_sequential_shows_the_inputs_of_the_replaced_model(chunk_tokens, stash_bytes):
    decoder, method, ids_NL = tiny_decoder(), Coarsen(), tokens()
    reports = calibrate(decoder, ids_NL, method, chunk_tokens=chunk_tokens, stash_bytes=stash_bytes)
    expected = inputs_of(decoder, ids_NL)  # everything upstream of a linear was already replaced
    for name, x_TI in method.seen.items():
        assert torch.allclose(x_TI, expected[name], atol=1e-5), name
    assert [r.index for r in reports] == method.saved == [0, 1, 2]
    assert len(method.seen) == 12


def test_at_once_shows_original_block_on_replaced_predecessors():
    decoder, method, ids_NL = tiny_decoder(), Coarsen(), tokens()
    calibrate(decoder, ids_NL, method, true_sequential=False)
    original, replaced = inputs_of(tiny_decoder(), ids_NL), inputs_of(decoder, ids_NL)
    for leaf in LAYER_LINEARS:  # in the first block nothing upstream was replaced
        assert torch.allclose(method.seen[f"layers.0.{leaf}"], original[f"layers.0.{leaf}"], atol=1e-5)
    for index in (1, 2):  # a block's own input comes from replaced blocks, never from the original ones
        name = f"layers.{index}.qkv_proj"
        assert torch.allclose(method.seen[name], replaced[name], atol=1e-5)
        assert not torch.allclose(method.seen[name], original[name], atol=1e-3)
    name = "layers.1.down_proj"
    assert not torch.allclose(method.seen[name], replaced[name], atol=1e-4)


def test_without_keep_nothing_is_left_behind():
    decoder = tiny_decoder()
    calibrate(decoder, tokens(), Coarsen(), keep=False)
    assert all(isinstance(m, nn.Identity) for name, m in decoder.linears() if name != "lm_head")


def test_an_interrupted_run_resumes_to_the_same_result(tmp_path):
    class Resumable(Coarsen):
        stop_after = 99

        def __init__(self) -> None:
            super().__init__()
            self.work = WorkFolder(tmp_path)
            self.fresh: dict[str, torch.Tensor] = {}

        def process(self, name, linear, statistic):
            replaced, report = super().process(name, linear, statistic)
            self.fresh[name] = replaced.weight.data
            return replaced, report

        def save(self, index, reports):
            self.work.save(index, {n: w for n, w in self.fresh.items() if f".{index}." in n}, {})
            if index == self.stop_after:
                raise KeyboardInterrupt

        def load(self, index):
            stored = self.work.load(index)
            if stored is None:
                return None
            modules = {name: DenseLinear(w.shape[1], w.shape[0], bias=False) for name, w in stored.items()}
            for name, module in modules.items():
                module.weight.data = stored[name]
            return modules

    first = Resumable()
    first.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_decoder(), tokens(), first)
    second, resumed = Resumable(), tiny_decoder()
    reports = calibrate(resumed, tokens(), second)
    assert [r.resumed for r in reports] == [True, True, False]
    assert set(second.fresh) == {f"layers.2.{leaf}" for leaf in LAYER_LINEARS}
    whole = tiny_decoder()
    calibrate(whole, tokens(), Coarsen())
    with torch.no_grad():
        assert torch.equal(resumed(tokens()), whole(tokens()))
    truncated = second.work.file(0)
    truncated.write_bytes(truncated.read_bytes()[:100])
    assert second.work.load(0) is None


def test_refuses_bad_tokens_and_poisoned_weights():
    with pytest.raises(SettingError, match="non-empty"):
        calibrate(tiny_decoder(), torch.empty(0, 8, dtype=torch.int64), Coarsen())
    with pytest.raises(SettingError, match="token 50 is outside the vocabulary of 50"):
        calibrate(tiny_decoder(), torch.full((1, 4), 50), Coarsen())
    poisoned = tiny_decoder()
    poisoned.layers[1].mlp_norm.weight.data[0] = float("nan")
    with pytest.raises(IntegrityError, match="after block 1"):
        calibrate(poisoned, tokens(), Coarsen())


class TestDrawSegments:
    @given(
        lengths=st.lists(st.integers(0, 60), min_size=1, max_size=8),
        samples=st.integers(1, 9),
        length=st.integers(1, 30),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=80, deadline=None)
    def test_every_segment_lies_in_one_long_enough_document(self, lengths, samples, length, seed):
        documents = [[1000 * i + j for j in range(n)] for i, n in enumerate(lengths)]

        def draw() -> torch.Tensor:
            return draw_segments(lengths, lambda i: documents[i], samples, length, seed)

        if max(lengths) < length:
            with pytest.raises(SettingError, match=r"longest has|must not be empty"):
                draw()
            return
        drawn_NL = draw()
        assert drawn_NL.shape == (samples, length)
        assert (drawn_NL.diff(dim=1) == 1).all()
        assert torch.equal(drawn_NL, draw())

    def test_is_spread_over_documents_by_size(self):
        documents = [list(range(100)), list(range(1000, 1900))]
        drawn_NL = draw_segments([100, 900], lambda i: documents[i], 400, 10, seed=3)
        share = float((drawn_NL[:, 0] < 100).float().mean())
        assert 0.05 < share < 0.16
        assert len({int(start) for start in drawn_NL[:, 0]}) > 100

    def test_names_the_longest_document(self):
        with pytest.raises(SettingError, match="at most 7"):
            draw_segments([3, 7], lambda i: list(range((3, 7)[i])), 2, 8, seed=0)
        with pytest.raises(SettingError, match="must not be empty"):
            draw_segments([], lambda _i: [], 2, 8, seed=0)
        with pytest.raises(SettingError, match="samples >= 1"):
            draw_segments([10], lambda _i: list(range(10)), 0, 8, seed=0)


def test_token_digest_separates_sequences():
    assert token_digest([[1, 2], [3]]) != token_digest([[1], [2, 3]]) != token_digest([[1, 2, 3]])
