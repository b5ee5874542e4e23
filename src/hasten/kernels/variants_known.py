"""Attention variants ready to use; each is its definition, in fewer than twenty lines of C++.

Plain softmax attention, sliding windows and soft caps need no variant: the engine's own kernel has them.
"""

from __future__ import annotations

from hasten.kernels.variants import Variant

__all__ = ["ALIBI", "KNOWN", "MASK", "ROPE", "SIGMOID", "SINKS"]

# Linear biases (Press, Smith and Lewis, arXiv 2108.12409): slopes float32 [H].
ALIBI = Variant(
    "alibi",
    logits_transform="return logit + slopes[qo_head] * float(kv - position(batch, qo));",
    params={"slopes": "float*"},
)

# A bit per (query row, cached token), lowest bit first: token trees. bits uint8; start int64 [B]: where a request's
# bits begin (counted in bits), row by row of kv_len bits.
MASK = Variant(
    "mask",
    logits_mask="""
      const std::int64_t at = start[batch] + std::int64_t(qo) * kv_len(batch) + kv;
      return bits[at >> 3] >> (at & 7) & 1;
    """,
    params={"bits": "uint8*", "start": "int64*"},
)

# Sigmoid attention (Ramapuram et al., arXiv 2409.04431): weights do not depend on each other, so there is no lse.
SIGMOID = Variant(
    "sigmoid",
    logits_transform="return sigmoid(logit + bias);",
    use_softmax=False,
    params={"bias": "float"},
)

# A learned logit per head that takes weight and gives nothing (as in gpt-oss): sinks float32 [H].
SINKS = Variant(
    "sinks",
    update="""
      const float top = m > sinks[qo_head] ? m : sinks[qo_head];
      d = d * exp(m - top) + exp(sinks[qo_head] - top);
      m = top;
    """,
    params={"sinks": "float*"},
)

# Rotary embedding on read: keys are cached as they were, and turned by their place among the tokens that are read
# (half-split pairs; RoFormer, arXiv 2104.09864). StreamingLLM re-indexes its window this way.
# cos, sin: float32 [positions, D / 2].
_ROTATE = """
      const int half = size / 2;
      const float *c = cos + std::int64_t({at}) * half, *s = sin + std::int64_t({at}) * half;
      float *a = {x}, *b = {x} + half;
      for (int i = 0; i < half; ++i) {{
        const float left = a[i], right = b[i];
        a[i] = left * c[i] - right * s[i];
        b[i] = right * c[i] + left * s[i];
      }}
"""
ROPE = Variant(
    "rope",
    query_transform=_ROTATE.format(x="q", at="position(batch, qo)"),
    key_transform=_ROTATE.format(x="k", at="kv"),
    params={"cos": "float*", "sin": "float*"},
)

KNOWN = {variant.name: variant for variant in (ALIBI, MASK, SIGMOID, SINKS, ROPE)}
