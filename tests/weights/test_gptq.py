"""The technique on tiny models: artefact, resuming, packing, settings, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from gptq_models import LLAMA, QWEN, TIED, context, random_documents, write_model

from hasten.core.artefact import ArtefactStore
from hasten.core.errors import ArtefactError, IntegrityError, SettingError, UnknownNameError, UnsupportedError
from hasten.core.plan import Plan
from hasten.models.checkpoint import load_decoder, open_checkpoint
from hasten.models.decoder import LAYER_LINEARS
from hasten.weights import calibrate_work
from hasten.weights import gptq as module
from hasten.weights.calibrate import calibrate
from hasten.weights.calibrate_work import WorkFolder
from hasten.weights.format import LinearSource, PackedLinear, WeightFormat
from hasten.weights.gptq import GPTQ, GPTQMethod, read_reports
from hasten.weights.gptq_sweep import quantize
from hasten.weights.hessian import Hessian

QUICK = {"samples": 6, "sample_length": 24, "group_size": 32}
IDS = torch.arange(40)[None] * 5 % 256


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def logits(decoder) -> torch.Tensor:
    with torch.no_grad():
        return decoder(IDS)


def test_packed_model_is_the_quantised_model(model):
    """Packed layers hold exactly what the sweep gave on the inputs of the quantised model so far."""
    settings, ctx = GPTQ(**QUICK), context(model)
    weights = settings.provide("weight_format", ctx)
    packed = load_decoder(ctx.checkpoint, pack=weights.pack)
    reference = load_decoder(ctx.checkpoint)
    ids_NL = settings.calibration_tokens(ctx)
    for index in range(LLAMA.num_layers):
        for leaf in LAYER_LINEARS:
            name = f"layers.{index}.{leaf}"
            linear = reference.get_submodule(name)
            hessian = Hessian(linear.weight.shape[1])
            handle = linear.register_forward_pre_hook(lambda _m, args, h=hessian: h.update(args[0]))
            with torch.no_grad():
                reference(ids_NL)
            handle.remove()
            weight, _ = quantize(
                linear.weight.detach(),
                hessian.matrix_II,
                settings.grid(),
                32,
                act_order=True,
                static_groups=True,
            )
            got_OI = packed.get_submodule(name).dequantize()
            # Float sums in another order may tip a rounding; what follows then moves a little.
            assert (got_OI == weight.dequantize()).float().mean() > 0.98
            linear.weight.data = got_OI
    assert torch.allclose(logits(packed), logits_with_head(reference, packed), atol=2e-3)


def logits_with_head(reference, packed) -> torch.Tensor:
    reference.lm_head.weight.data = packed.lm_head.dequantize()
    return logits(reference)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, "ternary"])
@pytest.mark.parametrize(
    "more",
    [
        {"group_size": 32},
        {"group_size": -1, "act_order": False},
        {"group_size": 32, "static_groups": False},  # columns of a group lie apart: needs the permutation
        {"group_size": 40, "act_order": False},  # a short last group
    ],
    ids=["static", "row", "perm", "short"],
)
def test_every_grid_runs_packed(tmp_path, bits, more):
    ctx = context(write_model(tmp_path / "model", replace(QWEN, num_layers=1)))
    settings = GPTQ(**{**QUICK, "bits": bits, **more})
    weights = settings.provide("weight_format", ctx)
    packed = load_decoder(ctx.checkpoint, pack=weights.pack)
    for name, layer in packed.linears():
        assert isinstance(layer, PackedLinear)
        x_TI = torch.randn(5, layer.inputs)
        source = ctx.checkpoint.linear(name)
        expected_TO = x_TI @ layer.dequantize().t()
        if source.bias_O is not None:
            expected_TO = expected_TO + source.bias_O
        assert torch.allclose(layer(x_TI), expected_TO, rtol=1e-4, atol=1e-4)
        if name != "lm_head":
            assert torch.equal(layer.dequantize(), weights.weight(name).dequantize())
            assert layer.weight_bytes() < source.inputs * source.outputs * 4 / 2
    errors = [line["error"] for line in read_reports(settings.prepare(ctx))]
    assert len(errors) == 4
    assert all(0 < error < {2: 1.0, 3: 0.3, 4: 0.06, 8: 1e-3, "ternary": 1.0}[bits] for error in errors)


def test_the_artefact_is_built_once(model, monkeypatch):
    settings = GPTQ(**QUICK)
    folder = settings.prepare(context(model))
    assert {p.name for p in folder.iterdir()} == {
        "artefact.json",
        *(f"block-{i:03d}.safetensors" for i in range(3)),
    }
    assert not [p for p in folder.parent.iterdir() if p.name.endswith(".work")]
    monkeypatch.setattr(calibrate_work, "calibrate", lambda *_a, **_k: pytest.fail("calibrated again"))
    assert settings.prepare(context(model)) == folder
    assert GPTQ(**QUICK, quantize_head="float32").prepare(context(model)) == folder
    made_from = settings.made_from(context(model))
    for other in (GPTQ(**QUICK, bits=3), GPTQ(**QUICK, seed=1), GPTQ(**{**QUICK, "samples": 7})):
        assert other.made_from(context(model)) != made_from
    assert settings.made_from(context(model, random_documents(seed=9))) != made_from


def test_settings_act_order_and_sequence_change_the_result(model):
    results = []
    for more in ({}, {"act_order": False}, {"true_sequential": False}, {"mse": True}, {"percdamp": 0.3}):
        folder = GPTQ(**QUICK, **more).prepare(context(model))
        results.append(load_file(folder / "block-002.safetensors")["layers.2.down_proj.codes"])
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[i + 1 :])


def test_killed_between_blocks_it_resumes_to_the_same_bytes(tmp_path, model):
    """SIGKILL after the second block; the next run does only the rest, and the artefact is the same."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from gptq_models import context
from hasten.weights.calibrate_work import WorkFolder
from hasten.weights.gptq import GPTQ
keep = WorkFolder.save
def save(self, index, *rest):
    keep(self, index, *rest)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
WorkFolder.save = save
GPTQ(**{QUICK!r}).prepare(context(Path({str(model)!r})))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    settings, ctx = GPTQ(**QUICK), context(model)
    assert ctx.artefacts.find("gptq", settings.made_from(ctx)) is None
    (work,) = (p for p in ctx.artefacts.root.iterdir() if p.name.endswith(".work"))
    assert len(list(work.glob("block-*.safetensors"))) == 2
    processed = []
    original = GPTQMethod.process
    try:
        GPTQMethod.process = lambda self, name, *rest: processed.append(name) or original(self, name, *rest)
        resumed = settings.prepare(ctx)
    finally:
        GPTQMethod.process = original
    assert {name.split(".")[1] for name in processed} == {"2"}
    assert not work.exists()
    other = write_model(tmp_path / "other" / "model")
    whole = settings.prepare(context(other))
    for file in whole.glob("block-*.safetensors"):
        ours, theirs = load_file(resumed / file.name), load_file(file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [line["name"] for line in read_reports(resumed)] == [line["name"] for line in read_reports(whole)]


def test_two_at_once_give_one_artefact(model, monkeypatch):
    runs, found = [], []
    monkeypatch.setattr(calibrate_work, "calibrate", lambda *a, **k: runs.append(1) or calibrate(*a, **k))
    threads = [
        threading.Thread(target=lambda: found.append(GPTQ(**QUICK).prepare(context(model)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(runs) == 1


class TestDamage:
    def test_truncated_artefact(self, model):
        settings = GPTQ(**QUICK)
        file = settings.prepare(context(model)) / "block-001.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(ArtefactError, match=r"block-001.safetensors is missing or damaged; delete"):
            load_decoder(
                context(model).checkpoint, pack=settings.provide("weight_format", context(model)).pack
            )

    def test_artefact_of_another_model(self, tmp_path, model):
        settings, ctx = GPTQ(**QUICK), context(model)
        folder = settings.prepare(ctx)
        other = context(write_model(tmp_path / "other" / "model", seed=1))
        elsewhere = ArtefactStore(ctx.artefacts.root, other.checkpoint.fingerprint)
        impostor = elsewhere.path("gptq", settings.made_from(other))
        assert impostor != folder  # another model never finds it by itself
        folder.rename(impostor)
        with pytest.raises(ArtefactError, match="was made for model"):
            settings.prepare(replace(other, artefacts=elsewhere))

    def test_nan_weights(self, model):
        file = model / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, file)
        ctx = context(model)
        with pytest.raises(IntegrityError, match=r"layers\.1\.up_proj"):
            GPTQ(**QUICK).prepare(ctx)
        assert ctx.artefacts.find("gptq", GPTQ(**QUICK).made_from(ctx)) is None

    def test_unreadable_work_is_done_again(self, model, caplog):
        settings, ctx = GPTQ(**QUICK), context(model)
        target = ctx.artefacts.path("gptq", settings.made_from(ctx))
        work = WorkFolder(target.parent / f".{target.name}.work")
        work.file(0).write_bytes(b"not safetensors")
        assert len(read_reports(settings.prepare(ctx))) == 12
        assert "its block is done again" in caplog.text

    def test_calibration_data(self, model):
        with pytest.raises(SettingError, match="must not be empty"):
            GPTQ(**QUICK).prepare(context(model, []))
        with pytest.raises(SettingError, match="sample_length to at most 10"):
            GPTQ(**QUICK).prepare(context(model, [[1] * 10, [2] * 9]))
        with pytest.raises(SettingError, match="outside the vocabulary of 256"):
            GPTQ(**QUICK).prepare(context(model, [[300] * 60]))

    def test_constant_inputs_are_damped_not_rounded_blindly(self, model):
        """One token over and over gives a Hessian of rank one; dampening makes it usable."""
        folder = GPTQ(**QUICK).prepare(context(model, [[7] * 60]))
        assert all(line["error"] <= line["rtn_error"] for line in read_reports(folder))


class TestSettings:
    @pytest.mark.parametrize(
        ("bad", "error", "match"),
        [
            ({"bits": 5}, SettingError, r"gptq\.bits = 5"),
            ({"group_size": 0}, SettingError, "must be positive, or -1"),
            ({"group_size": -2}, SettingError, "must be positive, or -1"),
            ({"percdamp": 0.0}, SettingError, r"gptq\.percdamp"),
            ({"samples": 0}, SettingError, r"gptq\.samples"),
            ({"blocksize": -1}, SettingError, r"gptq\.blocksize"),
            ({"quantize_head": "int4"}, SettingError, r"gptq\.quantize_head"),
            ({"bits": "ternary", "symmetric": True}, SettingError, "ternary grid is neither symmetric"),
            ({"group_sise": 64}, UnknownNameError, "did you mean 'group_size'"),
        ],
    )
    def test_refused(self, bad, error, match):
        with pytest.raises(error, match=match):
            GPTQ(**bad)

    def test_whole_row_survives_toml(self):
        plan = Plan.of([GPTQ(group_size=None, bits="ternary")])
        again = Plan.from_toml(plan.to_toml(), {"gptq": GPTQ}.__getitem__)
        assert again == plan
        assert again.techniques[0].group is None

    def test_from_the_command_line(self):
        plan = Plan.of(["gptq:bits=3,group_size=-1,mse=true"], {"gptq": GPTQ}.__getitem__)
        assert plan.techniques[0] == GPTQ(bits=3, group_size=-1, mse=True)
        assert plan.label() == "gptq(bits=3, group_size=-1, mse=True)"

    def test_contract(self, model):
        weights = GPTQ().provide("weight_format", context(model))
        assert isinstance(weights, WeightFormat)
        # The engine hands a dense model to formats that override `begin`; this one reads its own, block by block.
        assert type(weights).begin is WeightFormat.begin


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("head", ["float32", "bfloat16", "int8"])
def test_head_formats(tmp_path, config, head):
    ctx = context(write_model(tmp_path / "model", replace(config, num_layers=1)))
    weights = GPTQ(**QUICK, quantize_head=head).provide("weight_format", ctx)
    layer = weights.pack(ctx.checkpoint.linear("lm_head"))
    exact_OI = ctx.checkpoint.linear("lm_head").dense()
    steps_OI = (
        exact_OI.view(256, 2, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(256, 64) / 127
    )
    tolerance = {"float32": 0.0, "bfloat16": exact_OI.abs() / 256, "int8": 0.51 * steps_OI}[head]
    assert ((layer.dequantize() - exact_OI).abs() <= tolerance).all()
    x_TI = torch.randn(3, 64)
    assert torch.allclose(layer(x_TI), x_TI @ layer.dequantize().t(), rtol=1e-4, atol=1e-4)


def test_int8_head_keeps_q8_0_weights_exactly():
    """A GGUF's Q8_0 rows are float16 scale times int8 with the largest at 127: the head's own grid."""
    scale_OG1 = (torch.rand(256, 2, 1) * 0.01 + 1e-3).half().float()
    codes_OGI = torch.randint(-127, 128, (256, 2, 32)).float()
    codes_OGI[..., 5] = 127
    exact_OI = (codes_OGI * scale_OG1).reshape(256, 64)

    class Fixed(LinearSource):
        def dense(self) -> torch.Tensor:
            return exact_OI

    layer = module.pack_head(Fixed("lm_head", 256, 64, None, None), "int8")
    assert torch.equal(layer.dequantize(), exact_OI)


def test_default_models_head_is_repacked_as_it_is(default_model_path):
    source = open_checkpoint(default_model_path).linear("lm_head")
    assert source.blocks is not None
    layer = module.pack_head(source, "int8")
    assert torch.equal(layer.dequantize(), source.dense())
    assert layer.weight_bytes() < 1.1 * source.outputs * source.inputs


def test_stored_settings_that_contradict_are_refused(tmp_path, model):
    GPTQ(**QUICK).save(context(model), tmp_path / "saved")
    ctx = context(tmp_path / "saved")
    GPTQ().provide("weight_format", ctx)
    with pytest.raises(
        UnsupportedError, match=r"gptq\.bits = 3, but .*saved already holds GPTQ weights with bits = 4"
    ):
        GPTQ(bits=3).provide("weight_format", ctx)
    with pytest.raises(UnsupportedError, match="copy the folder"):
        GPTQ().save(ctx, tmp_path / "again")
