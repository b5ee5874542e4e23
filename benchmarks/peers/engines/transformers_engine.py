"""PyTorch: the `transformers` model on the dequantised weights, in a plain greedy loop over its own KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.engines.engine import Answer, Clock, Engine, Limits


class TransformersEngine(Engine):
    """Fused attention (``sdpa``), logits of the last position alone; bfloat16 where the CPU multiplies it, else
    float32. A shared prefix is read once and its cache repeated."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(limits.threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.dtype = torch.bfloat16 if _multiplies_bfloat16() else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(
            limits.file("hf"), dtype=self.dtype, attn_implementation="sdpa", local_files_only=True
        ).eval()

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        from transformers import DynamicCache

        torch = self.torch
        start = shared if self.limits.prefix_cache else 0
        clock = Clock(len(prompts))
        cache = DynamicCache(config=self.model.config)
        if start:
            self.model(
                torch.tensor([prompts[0][:start]]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache.batch_repeat_interleave(len(prompts))
        rest = [list(prompt[start:]) for prompt in prompts]
        longest = max(map(len, rest))
        pads = [longest - len(part) for part in rest]
        ids_BT = torch.tensor([[0] * pad + part for pad, part in zip(pads, rest, strict=True)])
        # Left padding lies between the shared prefix and each question: masked, and skipped by the positions.
        mask_BS = None
        if any(pads):
            mask_BS = torch.ones(len(prompts), start + longest, dtype=torch.long)
            for row, pad in enumerate(pads):
                mask_BS[row, start : start + pad] = 0
        for _ in range(tokens):
            positions_BT = None
            if mask_BS is not None:
                positions_BT = (mask_BS.cumsum(1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
            logits_BV = self.model(
                ids_BT,
                attention_mask=mask_BS,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            ids_BT = logits_BV.argmax(-1, keepdim=True)
            for row, token in enumerate(ids_BT[:, 0].tolist()):
                clock.hear(row, [token])
            if mask_BS is not None:
                mask_BS = torch.cat([mask_BS, torch.ones(len(prompts), 1, dtype=torch.long)], 1)
        return clock.answer(tokens)

    def score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        out = []
        for text in texts:
            logits_TV = self.model(self.torch.tensor([text])).logits[0, context - 1 : -1].double()
            wanted_T = self.torch.tensor(text[context:])
            chosen_T = logits_TV.gather(1, wanted_T[:, None])[:, 0] - logits_TV.logsumexp(-1)
            out.append(chosen_T.tolist())
        return out

    def facts(self) -> dict[str, Any]:
        import transformers

        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "version": f"transformers {transformers.__version__}, torch {self.torch.__version__}",
            "settings": f"{dtype}, sdpa, greedy loop",
        }


def _multiplies_bfloat16() -> bool:
    try:
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False
