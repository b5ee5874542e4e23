"""OpenVINO GenAI: its continuous-batching pipeline on the GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.peers.engines.engine import Answer, Clock, Engine, Limits
from hasten.core.errors import UnsupportedError

_ALL_AT_ONCE = 1 << 20  # prompt tokens of one step: its own pipeline for one user cuts no prompt either


class OpenVINOEngine(Engine):
    """Weights as the reader of GGUF files keeps them, everything else as the CPU plugin chooses.

    It looks for cached blocks when a request is submitted, so with the prefix cache the shared prefix is read by a
    request of its own before the questions are.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        import openvino
        import openvino_genai

        self.openvino, self.genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = limits.prefix_cache
        scheduler.max_num_batched_tokens = _ALL_AT_ONCE
        scheduler.max_num_seqs = max(limits.batch, 1)
        try:
            self.pipeline = openvino_genai.ContinuousBatchingPipeline(
                limits.file("gguf"), scheduler, "CPU", {"INFERENCE_NUM_THREADS": limits.threads}
            )
        except RuntimeError as error:
            raise UnsupportedError(f"OpenVINO GenAI cannot load this model: {_short(error)}") from None
        self._ids = 0

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, shared: int = 0) -> Answer:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        given = [self._tensor(prompt) for prompt in prompts]
        clock = Clock(len(prompts))
        if shared and self.limits.prefix_cache:
            self._read(prompts[0][:shared])
        handles = [self._submit(tensor, config) for tensor in given]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        clock.hear(number, output.generated_ids)
        return clock.answer(tokens)

    def score(self, texts: Sequence[Sequence[int]], context: int) -> list[list[float]]:
        """Log-probabilities of an echoed prompt."""
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = 1, True, False
        config.echo, config.logprobs = True, 1
        out = []
        for text in texts:
            handle = self._submit(self._tensor(text), config)
            while self.pipeline.has_non_finished_requests():
                self.pipeline.step()
            found = handle.read_all()[0]
            logprobs = [float(value) for value in found.generated_log_probs]
            ids = list(found.generated_ids)
            if ids[: len(text)] != list(text) or len(logprobs) < len(text):
                raise UnsupportedError("this release does not echo the prompt with its log-probabilities")
            out.append(logprobs[context : len(text)])
        return out

    def _read(self, prefix: Sequence[int]) -> None:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = 1, True, False
        self._submit(self._tensor(prefix), config)
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()

    def _tensor(self, ids: Sequence[int]) -> Any:
        import numpy

        return self.openvino.Tensor(numpy.array([ids], dtype=numpy.int64))

    def _submit(self, tensor: Any, config: Any) -> Any:
        self._ids += 1
        return self.pipeline.add_request(self._ids, tensor, config)

    def facts(self) -> dict[str, Any]:
        cache = "prefix cache on" if self.limits.prefix_cache else "prefix cache off"
        return {
            "version": f"openvino-genai {self.genai.__version__}",
            "settings": f"continuous batching, prompts uncut, {cache}",
        }


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
