"""Calibration of `sparge_attn`: theta, tau and the softmax filter's bound of every layer and head, kept as an artefact.

Source: SpargeAttn, arXiv 2502.18137, section 3.6 and its reference code. Error is relative L1 of a head,
``sum |O - dense| / sum |dense|``. For each input and each theta (steps of 1/16), the smallest tau with an error under
``l1`` is found by bisection (to 1e-3), until a larger theta leaves less than a tenth of the blocks out. Inputs are
combined by theta: the one under which most is left out in total, and the largest tau it was given. A head that leaves
out a tenth or less stays dense. With these, the smallest bound of the filter is sought per input (to 0.1) that stays
under ``l2`` and adds no more than ``l2 - l1``, and the largest of them taken.

What a query block gets from a key block is computed once per input and layer (output and mass of the pair, on every
fourth row); any choice of blocks is then a weighted mean of those, so a bisection costs little. The filter is run as
it is.

Legend: T rows, H query heads, G kv heads, D head size, Q query blocks, B key blocks, R rows that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.attention.blocks import block_lists
from hasten.attention.calibration import CapturingAttend
from hasten.attention.layout import AttentionSpec
from hasten.attention.sparge_attn import (
    KEY_BLOCK,
    QUERY_BLOCK,
    HeadSettings,
    SpargeAttn,
    SpargePolicy,
    choose_blocks,
)
from hasten.core.corpus import corpus
from hasten.core.errors import SettingError, UnsupportedError
from hasten.kernels.block_list import Cached, attend_blocks, pool_keys, quantise_keys
from hasten.models.checkpoint import load_decoder
from hasten.weights.calibrate_data import token_digest

if TYPE_CHECKING:
    from hasten.models.context import BuildContext
    from hasten.models.decoder import Decoder

THETA_STEP = 1 / 16
TAU_PRECISION, SKIP_PRECISION = 1e-3, 0.1
SKIP_MOST = 50.0
SPARSE = 0.1  # a head that leaves out no more than this stays dense
STRIDE = 4  # of the rows that errors are measured on


def calibrated(context: BuildContext, settings: SpargeAttn) -> HeadSettings:
    """The artefact of these settings, made if need be.

    Raises SettingError for l2 <= l1, UnsupportedError for too little text.
    """
    if settings.l2 <= settings.l1:
        raise SettingError(f"sparge_attn: l2 = {settings.l2} must be above l1 = {settings.l1}")
    texts = calibration_texts(context, settings.inputs, settings.input_tokens)
    made_from = {
        "tokens": token_digest(texts),
        "l1": settings.l1,
        "l2": settings.l2,
        "bits": settings.bits,
        "sink": settings.sink,
        "version": 1,
    }

    def write(folder: Path) -> None:
        found = calibrate(context, settings, texts)
        save_file(
            {"theta": found.theta_LH, "tau": found.tau_LH, "skip": found.skip_LH},
            folder / "heads.safetensors",
        )

    stored = load_file(context.artefacts.build("sparge-heads", made_from, write) / "heads.safetensors")
    return HeadSettings(stored["theta"], stored["tau"], stored["skip"])


def calibration_texts(context: BuildContext, count: int, tokens: int) -> list[list[int]]:
    """``count`` texts of ``tokens`` tokens: the caller's own run together, else the documentation corpus."""
    if context.calibration is not None:
        ids = [token for sequence in context.calibration for token in sequence]
        texts = [ids[i * tokens : (i + 1) * tokens] for i in range(count)]
    else:
        texts = []
        for document in corpus().documents("calibration"):
            ids = context.tokenizer.encode(document.text)
            if len(ids) >= tokens:
                texts.append(ids[:tokens])
            if len(texts) == count:
                break
    texts = [ids for ids in texts if len(ids) == tokens]
    if not texts:
        raise UnsupportedError(
            f"sparge_attn cannot calibrate: no text has {tokens} tokens; lower input_tokens"
        )
    return texts


class _Capture(CapturingAttend):
    """Also keeps the values."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.v_LTGD: list[Tensor] = []

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, position_T: Tensor) -> Tensor:
        self.v_LTGD.append(v_TGD)
        return super().__call__(layer, q_THD, k_TGD, v_TGD, position_T)


@torch.inference_mode()
def calibrate(context: BuildContext, settings: SpargeAttn, texts: Sequence[Sequence[int]]) -> HeadSettings:
    """Settings of every layer and head from the queries, keys and values of ``texts``, run with float32 weights."""
    decoder = load_decoder(context.checkpoint, torch.float32)
    captured = []
    for ids in texts:
        attend = _Capture(decoder)
        x_TE, position_T = decoder.embed(torch.tensor(ids)), torch.arange(len(ids))
        for layer in decoder.layers:
            x_TE = layer.mlp(layer.attention(x_TE, position_T, attend))
        captured.append(attend)
    rows = []
    for index in range(context.config.num_layers):
        spec = context.config.attention(index)
        inputs = [
            (c.q_LTHD[index].contiguous(), as_pages(c.k_LTGD[index], c.v_LTGD[index])) for c in captured
        ]
        rows.append(calibrate_layer(inputs, spec, settings))
    return HeadSettings(*(torch.stack(column) for column in zip(*rows, strict=True)))


def calibrate_layer(
    inputs: Sequence[tuple[Tensor, Cached]], spec: AttentionSpec, settings: SpargeAttn
) -> tuple[Tensor, Tensor, Tensor]:
    """(theta_H, tau_H, skip_H) of a layer; per input its queries (float32 [T, H, D], contiguous), keys and values."""
    theta_H, tau_H = combine([Candidates.of(q, cached, spec, settings) for q, cached in inputs])
    bound = [filter_bound(q, cached, spec, settings, theta_H, tau_H) for q, cached in inputs]
    skip_H = torch.stack(bound).amax(0).masked_fill(theta_H >= 1, 0.0)
    return theta_H, tau_H, skip_H


def as_pages(k_TGD: Tensor, v_TGD: Tensor) -> Cached:
    """Keys and values as pages of one key block."""
    length = k_TGD.shape[0]
    pad = -length % KEY_BLOCK
    k, v = (
        torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, pad))
        .reshape(-1, KEY_BLOCK, *x.shape[1:])
        .transpose(1, 2)
        for x in (k_TGD, v_TGD)
    )
    return Cached(k.contiguous(), v.contiguous(), torch.arange(k.shape[0], dtype=torch.int32), length)


class Pairs:
    """Attention of each query block with each key block of one layer and input, on every `STRIDE`-th row."""

    def __init__(self, q_THD: Tensor, cached: Cached, center_GD: Tensor, scale: float, bits: int) -> None:
        length, heads, _ = q_THD.shape
        k_GLD = cached.k_NGPD.transpose(0, 1).flatten(1, 2)[:, :length]
        v_GLD = cached.v_NGPD.transpose(0, 1).flatten(1, 2)[:, :length]
        repeat, blocks = heads // k_GLD.shape[0], -(-length // KEY_BLOCK)
        self.row_R = torch.arange(0, length, STRIDE)
        exact = torch.einsum("rhd,hld->hrl", q_THD[::STRIDE], k_GLD.repeat_interleave(repeat, 0)) * scale
        hidden = torch.arange(length) > self.row_R[:, None]
        v_HLD = v_GLD.repeat_interleave(repeat, 0)
        self.dense_HRD = exact.masked_fill(hidden, -torch.inf).softmax(-1) @ v_HLD
        scores = exact
        if bits:
            codes = quantise_keys(cached, center_GD, bits)
            k_GWPD = codes.code_GWD2.float().transpose(2, 3).flatten(3) * codes.scale_GW[..., None, None]
            k_HLD = k_GWPD.flatten(1, 2)[:, :length].repeat_interleave(repeat, 0)
            q_THD = torch.cat([_rounded(part, codes.limit) for part in torch.split(q_THD, QUERY_BLOCK)])
            scores = torch.einsum("rhd,hld->hrl", q_THD[::STRIDE], k_HLD) * scale
        scores = scores.masked_fill(hidden, -torch.inf)
        pad = blocks * KEY_BLOCK - length
        s_HRBP = torch.nn.functional.pad(scores, (0, pad), value=-torch.inf)
        s_HRBP = s_HRBP.reshape(heads, -1, blocks, KEY_BLOCK)
        v_HBPD = torch.nn.functional.pad(v_HLD, (0, 0, 0, pad)).view(heads, blocks, KEY_BLOCK, -1)
        top_HR = scores.amax(-1)
        weight_HRBP = (s_HRBP - top_HR[:, :, None, None]).exp()
        self.mass_HRB = weight_HRBP.sum(-1)
        self.value_HRBD = torch.einsum("hrbp,hbpd->hrbd", weight_HRBP, v_HBPD)

    def error(self, keep_HQB: Tensor) -> Tensor:
        """Relative L1 error [H] of reading the blocks that are kept."""
        keep_HRB = keep_HQB[:, self.row_R // QUERY_BLOCK].float()
        total_HR1 = (self.mass_HRB * keep_HRB).sum(-1, keepdim=True)
        out_HRD = (keep_HRB[:, :, None] @ self.value_HRBD)[:, :, 0] / total_HR1
        return relative(out_HRD, self.dense_HRD)


def relative(out_HRD: Tensor, dense_HRD: Tensor) -> Tensor:
    """Relative L1 error per head, [H]. A row that read nothing counts as wrong altogether."""
    off = (out_HRD - dense_HRD).abs().nan_to_num(nan=torch.inf)
    return off.sum((1, 2)) / dense_HRD.abs().sum((1, 2)).clamp_min(1e-30)


def _rounded(q_THD: Tensor, limit: int) -> Tensor:
    scale = q_THD.abs().amax((0, 2), keepdim=True) / limit + 1e-7
    return (q_THD / scale).round() * scale


@dataclass(frozen=True)
class Candidates:
    """What one input asks of one layer: theta [C], and per theta and head tau and the share left out [C, H]."""

    theta_C: Tensor
    tau_CH: Tensor
    sparsity_CH: Tensor

    @classmethod
    def of(cls, q_THD: Tensor, cached: Cached, spec: AttentionSpec, settings: SpargeAttn) -> Candidates:
        heads = q_THD.shape[1]
        center_GD = pool_keys(cached, cached.length)[0].view(spec.shape.kv_heads, -1)
        pairs = Pairs(q_THD, cached, center_GD, spec.scale, settings.bits)

        def keep(theta: float, tau_H: Tensor) -> Tensor:
            theta_H = torch.full((heads,), theta)
            return choose_blocks(
                q_THD, cached, center_GD, spec.scale, theta_H, tau_H, topk=None, sink=settings.sink
            )

        every = keep(1.0, torch.ones(heads)).sum((1, 2)).float()
        found: list[tuple[float, Tensor, Tensor]] = []
        last: Tensor | None = None
        for step in range(round(2 / THETA_STEP)):
            theta = -1 + step * THETA_STEP
            always = keep(theta, torch.zeros(heads))
            if last is not None and torch.equal(always, last):
                continue  # no block changes sides: the same as the theta before
            last = always

            def accepts(tau_H: Tensor, theta: float = theta) -> Tensor:
                return pairs.error(keep(theta, tau_H)) < settings.l1

            tau_H = bisect(accepts, heads, 1.0, TAU_PRECISION)
            sparsity_H = 1 - keep(theta, tau_H).sum((1, 2)) / every
            found.append((theta, tau_H, sparsity_H))
            if bool((sparsity_H < SPARSE).all()):
                break
        theta_C = torch.tensor([theta for theta, _, _ in found])
        tau_CH = torch.stack([tau for _, tau, _ in found])
        sparsity_CH = torch.stack([sparsity for _, _, sparsity in found])
        return cls(theta_C, tau_CH, sparsity_CH)


def filter_bound(
    q_THD: Tensor,
    cached: Cached,
    spec: AttentionSpec,
    settings: SpargeAttn,
    theta_H: Tensor,
    tau_H: Tensor,
) -> Tensor:
    """The smallest bound [H] under which the filter's error stays below l2; the largest, if none does."""
    if spec.softcap is not None:  # then there is no filter
        return torch.full((q_THD.shape[1],), SKIP_MOST)
    chosen = HeadSettings(theta_H[None], tau_H[None], torch.zeros(1, len(theta_H)))
    policy = SpargePolicy(settings.model_copy(update={"mode": "cdf"}), 1, chosen)
    selection = policy.choose(0, 0, q_THD, cached, spec)
    lists = block_lists(selection, q_THD.shape[0], cached.length, spec)
    whole = replace(selection, keep_XQB=torch.ones_like(selection.keep_XQB))
    every = block_lists(whole, q_THD.shape[0], cached.length, spec)
    dense_HTD = attend_blocks(q_THD, cached, every, spec.scale, spec.softcap)[0].transpose(0, 1)

    def error(floor_H: Tensor | None) -> Tensor:
        out, _ = attend_blocks(q_THD, cached, lists, spec.scale, floor_H=floor_H, codes=selection.codes)
        return relative(out.transpose(0, 1), dense_HTD)

    # Below l2 alone, a head whose blocks err less than l1 would give the filter all that they left.
    allowed_H = (error(None) + settings.l2 - settings.l1).clamp_max(settings.l2)

    def within(bound_H: Tensor) -> Tensor:
        return error(-bound_H) < allowed_H

    return bisect(within, q_THD.shape[1], SKIP_MOST, SKIP_PRECISION)


def bisect(accepts: Callable[[Tensor], Tensor], heads: int, most: float, precision: float) -> Tensor:
    """Per head the smallest number in (0, most] that ``accepts`` ([H] -> bool [H]), to ``precision``; else ``most``."""
    low_H, high_H = torch.zeros(heads), torch.full((heads,), most)
    while float((high_H - low_H).max()) > precision:
        middle_H = (low_H + high_H) / 2
        good_H = accepts(middle_H)
        high_H = torch.where(good_H, middle_H, high_H)
        low_H = torch.where(good_H, low_H, middle_H)
    return high_H


def combine(inputs: Sequence[Candidates]) -> tuple[Tensor, Tensor]:
    """(theta_H, tau_H) of one layer from what each input asks for; both 1 where a head stays dense."""
    theta_X = torch.unique(torch.cat([c.theta_C for c in inputs]))
    at = [torch.searchsorted(c.theta_C, theta_X, right=True).sub(1).clamp_min(0) for c in inputs]
    # A theta that changed nothing for an input was left out of its list: it does what the one before does.
    total_XH = torch.stack([c.sparsity_CH[i] for c, i in zip(inputs, at, strict=True)]).sum(0)
    best_H = total_XH.argmax(0)
    head = torch.arange(total_XH.shape[1])
    tau_H = torch.stack([c.tau_CH[i][best_H, head] for c, i in zip(inputs, at, strict=True)]).amax(0)
    theta_H = theta_X[best_H]
    dense_H = total_XH[best_H, head] / len(inputs) <= SPARSE
    one = torch.ones(())
    return torch.where(dense_H, one, theta_H), torch.where(dense_H, one, tau_H)
