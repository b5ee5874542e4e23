"""Statistics of queries and keys that attention policies calibrate on.

Legend: L layers, T tokens, H query heads, G kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.core.corpus import corpus
from hasten.core.errors import UnsupportedError
from hasten.models.checkpoint import load_decoder
from hasten.models.decoder import CausalAttend, Decoder
from hasten.weights.calibrate_data import calibration_name

if TYPE_CHECKING:
    from hasten.models.context import BuildContext


def calibration_ids(context: BuildContext, tokens: int) -> list[int]:
    """``tokens`` tokens of calibration text: the caller's own, else the documentation corpus."""
    if context.calibration is not None:
        ids = [token for sequence in context.calibration for token in sequence][:tokens]
    else:
        ids = []
        for document in corpus().documents("calibration"):
            ids.extend(context.tokenizer.encode(document.text))
            if len(ids) >= tokens:
                break
        ids = ids[:tokens]
    if len(ids) < min(tokens, 32):
        raise UnsupportedError(f"calibration needs at least 32 tokens, got {len(ids)}")
    return ids


class CapturingAttend(CausalAttend):
    """Causal attention that also keeps the rotated queries and keys of every layer."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.q_LTHD: list[Tensor] = []
        self.k_LTGD: list[Tensor] = []

    def __call__(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, position_T: Tensor) -> Tensor:
        rope = self.decoder.rope(layer)
        self.q_LTHD.append(rope.rotate(q_THD, position_T))
        self.k_LTGD.append(rope.rotate(k_TGD, position_T))
        return super().__call__(layer, q_THD, k_TGD, v_TGD, position_T)


@torch.inference_mode()
def capture(context: BuildContext, ids: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Rotated (q_THD, k_TGD) per layer of one forward pass over ``ids`` (float32 weights)."""
    decoder = load_decoder(context.checkpoint, torch.float32)
    attend = CapturingAttend(decoder)
    x_TE = decoder.embed(torch.tensor(ids))
    position_T = torch.arange(len(ids))
    for layer in decoder.layers:
        x_TE = layer.mlp(layer.attention(x_TE, position_T, attend))
    return attend.q_LTHD, attend.k_LTGD


def coordinate_spread(context: BuildContext, tokens: int) -> tuple[Tensor, Tensor]:
    """(sigma_q_L, sigma_k_L): standard deviation of the rotated queries' and keys' coordinates per layer, float32.

    An orthonormal transform keeps the root mean square over all coordinates, so no Hadamard transform is needed here.
    Kept as an artefact of the model.
    """
    made_from = {"calibration": calibration_name(context), "tokens": tokens, "version": 2}

    def write(folder: Path) -> None:
        q_LTHD, k_LTGD = capture(context, calibration_ids(context, tokens))
        spread = {
            "q": torch.stack([q.square().mean().sqrt() for q in q_LTHD]),
            "k": torch.stack([k.square().mean().sqrt() for k in k_LTGD]),
        }
        save_file(spread, folder / "spread.safetensors")

    folder = context.artefacts.build("coordinate-spread", made_from, write)
    spread = load_file(folder / "spread.safetensors")
    return spread["q"], spread["k"]
