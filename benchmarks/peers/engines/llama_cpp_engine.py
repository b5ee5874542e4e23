"""llama.cpp through the low-level functions of llama-cpp-python: its batch API, without the package's Python loop."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.peers.engines.engine import Answer, Clock, Engine, Limits
from hasten.core.errors import MeasureError, UnsupportedError

_BATCH = 2048  # llama.cpp's own defaults of logical and physical batch
_MICROBATCH = 512


class LlamaCppEngine(Engine):
    """Weights and KV cache (float16) as llama.cpp keeps them by default, flash attention chosen by itself.

    The greedy token is the argmax over the logits array, which is faster than its sampler chain. A shared prefix is
    read once and copied to the other sequences (which copies no data: the cache is unified for that).
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        import llama_cpp
        import numpy

        self.c, self.np = llama_cpp, numpy
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = limits.file("gguf")
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise UnsupportedError(f"llama.cpp cannot load {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        # A cell per token of every sequence; llama.cpp rounds a sequence's share up to 256.
        each = -(-limits.context // 256) * 256
        params.n_ctx = each * limits.batch
        params.n_seq_max = limits.batch
        params.kv_unified = limits.prefix_cache
        params.n_batch, params.n_ubatch = _BATCH, _MICROBATCH
        params.n_threads = params.n_threads_batch = limits.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise UnsupportedError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self.batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        c, memory = self.c, self.c.llama_get_memory(self.context)
        c.llama_memory_clear(memory, True)
        clock = Clock(len(prompts))
        start = shared if self.limits.prefix_cache else 0
        if start:
            for _ in self._read([(prompts[0][i], i, 0, False) for i in range(start)]):
                pass
            for number in range(1, len(prompts)):
                c.llama_memory_seq_cp(memory, 0, number, 0, start)
        chosen: dict[int, int] = {}
        rows = [
            (token, position, number, position == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
            if position >= start
        ]
        for number, token in self._read(rows):
            chosen[number] = token
            clock.hear(number, [token])
        for step in range(tokens - 1):
            rows = [
                (chosen[number], len(prompt) + step, number, True) for number, prompt in enumerate(prompts)
            ]
            for number, token in self._read(rows):
                chosen[number] = token
                clock.hear(number, [token])
        return clock.answer(tokens)

    def _read(self, rows: Sequence[tuple[int, int, int, bool]]) -> Iterator[tuple[int, int]]:
        """Run rows of (token, position, sequence, wanted) in batches, as the iterator goes; (sequence, most probable
        next token) of the wanted ones."""
        for start in range(0, len(rows), _BATCH):
            part = rows[start : start + _BATCH]
            self._decode(part)
            for index, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    yield sequence, int(self.np.argmax(self._logits(index)))

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        batch.n_tokens = len(rows)
        code = self.c.llama_decode(self.context, batch)
        if code != 0:
            raise MeasureError(f"llama_decode answered {code} to {len(rows)} rows")

    def _logits(self, index: int) -> Any:
        pointer = self.c.llama_get_logits_ith(self.context, index)
        if not pointer:
            raise MeasureError(f"llama.cpp has no logits of row {index}")
        return self.np.ctypeslib.as_array(pointer, shape=(self.vocabulary,))

    def score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        np, out = self.np, []
        memory = self.c.llama_get_memory(self.context)
        for text in texts:
            self.c.llama_memory_clear(memory, True)
            logprobs: list[float] = []
            for start in range(0, len(text) - 1, _MICROBATCH):
                rows = [
                    (text[i], i, 0, i >= context - 1)
                    for i in range(start, min(start + _MICROBATCH, len(text) - 1))
                ]
                self._decode(rows)
                for index, (_, position, _, wanted) in enumerate(rows):
                    if wanted:
                        logits = self._logits(index).astype(np.float64)
                        highest = logits.max()
                        total = highest + np.log(np.exp(logits - highest).sum())
                        logprobs.append(float(logits[text[position + 1]] - total))
            out.append(logprobs)
        return out

    def facts(self) -> dict[str, Any]:
        system = self.c.llama_print_system_info().decode()
        return {
            "version": f"llama-cpp-python {self.c.__version__}",
            "settings": "KV float16, flash attention auto, native build",
            "build": system,
        }
