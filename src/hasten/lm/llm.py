"""`LLM`: a loaded model with the verbs people use: generate, stream, chat, score."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

from hasten.catalog import loader
from hasten.core.errors import HastenError, IntegrityError, PlanError, RequestError
from hasten.core.plan import Plan, Use
from hasten.lm import scoring
from hasten.lm.batch import Job
from hasten.lm.build import load
from hasten.lm.context.transform import Prompt, PromptTransform
from hasten.lm.engine import Engine
from hasten.lm.intake import Given
from hasten.lm.interrupt import deferred_interrupt
from hasten.lm.openai import ChatBody
from hasten.lm.request import Completion, Delta, SamplingParams, Score
from hasten.lm.sequence import Request
from hasten.models.tokenizer import Tokenizer
from hasten.weights.format import PackedLinear

Message = Mapping[str, Any]


class LLM:
    """A language model, ready to answer.

        llm = hasten.LLM("smollm2-135m-instruct", use=["gptq", hasten.Adamas(budget=128)])
        print(llm.chat([{"role": "user", "content": "Name three rivers."}]).text)

    model: a known name, a folder or file, a Hugging Face id, a folder that `hasten.prepare` wrote (with its plan), a
        `Plan`, or the path of a plan file (``.toml``).
    use: techniques, as slugs (``"gptq:bits=3"``) or objects. dtype: ``auto``, ``float32`` or ``bfloat16``.
    calibration: token sequences for techniques that calibrate, None for the documentation corpus.
    engine: see `hasten.lm.settings.EngineSettings`, e.g. ``max_batch=16``, ``kv_memory_mb=500``.

    The engine runs inside the calling method, not in the background. Several threads may call the verbs: they take
    turns step by step, and what they ask runs in one batch. (`engine` itself is for one thread.) Ctrl-C cancels what
    the call started, at the end of the running step; the model is usable afterwards.
    """

    def __init__(
        self,
        model: str | Path | Plan | None = None,
        use: Iterable[Use] = (),
        dtype: str | None = None,
        plan: Plan | str | Path | None = None,
        calibration: Sequence[Sequence[int]] | None = None,
        **engine: Any,
    ) -> None:
        self._loaded = load(_plan(model, tuple(use), dtype, plan, engine), calibration)
        self.plan = self._loaded.plan
        self._lock = threading.RLock()

    @property
    def engine(self) -> Engine:
        """For orchestration: submit, step, cancel, fork, priorities, ledger."""
        return self._loaded.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def mends_answers(self) -> bool:
        """Whether a prompt transform rewrites finished answers: what is streamed may differ from the completion."""
        base = PromptTransform.on_answer
        return any(type(transform).on_answer is not base for transform in self.engine.parts.transforms)

    # -- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Given | Sequence[Given],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or several (text, token ids or `Prompt`), batched; results in order.

        A prompt that cannot be served raises `RequestError` and nothing runs. A request whose logits are not finite
        ends with finish reason ``error`` and leaves the others alone; any other failure is raised when the rest is
        done.
        """
        many = _many(prompts)
        chosen = list(params) if isinstance(params, Sequence) else [params] * len(many)
        if len(chosen) != len(many):
            raise RequestError(f"{len(chosen)} sampling parameters for {len(many)} prompts")
        requests: list[Request] = []
        try:
            for prompt, wanted in zip(many, chosen, strict=True):
                requests.append(self._submit(prompt, wanted))
            while not all(r.done for r in requests):
                self._step()
        finally:
            self._cancel(requests)
        for request in requests:
            if request.failure is not None and not isinstance(request.failure, IntegrityError):
                raise request.failure
        return [request.completion() for request in requests]

    def stream(self, prompt: Given, params: SamplingParams | None = None) -> Stream:
        """Complete one prompt, yielding `Delta`s as they come. Closing the iterator cancels the request."""
        return Stream(self, self._submit(prompt, params))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        stream: Literal[False] = False,
        contexts: Sequence[str] = (),
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        contexts: Sequence[str] = (),
    ) -> Stream: ...

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        stream: bool = False,
        contexts: Sequence[str] = (),
    ) -> Completion | Stream:
        """Answer a conversation (``[{"role": "user", "content": "..."}]``) with the model's chat template.

        contexts: passages that the last message asks about, put before it; see `chat_prompt`.
        """
        prompt = self.chat_prompt(messages, contexts)
        return self.stream(prompt, params) if stream else self.generate([prompt], params)[0]

    def chat_prompt(self, messages: Sequence[Message], contexts: Sequence[str] = ()) -> Prompt:
        """The conversation as the prompt that the model reads.

        contexts: passages that stand between the beginning of the last message and its text, a blank line after each;
        the prompt names the parts, so that a technique may treat them apart. Without one they are read in a row.
        Raises `RequestError` if the last message is not a user's text.
        """
        if isinstance(contexts, str):
            raise RequestError("contexts is one text; give a list of texts")
        turns = [dict(m) for m in messages]
        if not contexts:
            return Prompt(text=self.tokenizer.apply_chat(turns), extra={"templated": True})
        question = turns[-1].get("content") if turns else None
        if not isinstance(question, str) or turns[-1].get("role") != "user":
            raise RequestError("contexts need a last message of the user that asks about them")
        mark = "[contexts]"
        while any(mark in str(turn.get("content")) for turn in turns):
            mark = f"[{mark}]"
        turns[-1]["content"] = mark + question
        head, found, tail = self.tokenizer.apply_chat(turns).partition(mark)
        if not found:
            raise RequestError(
                "this model's chat template changes its messages: contexts have no place in it"
            )
        return Prompt(
            head=head,
            contexts=tuple(f"{text.strip()}\n\n" for text in contexts),
            tail=tail,
            question=question,
            extra={"templated": True},
        )

    def answer_jobs(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Completion | HastenError]]:
        """Run the requests of a batch file, continuously batched; each comes back as soon as it is finished."""
        ahead = math.inf if self.engine.scheduler.offline else 2 * self.engine.settings.max_batch
        source = iter(jobs)
        running: dict[int, tuple[Job, Request]] = {}
        ready: deque[tuple[Job, Completion | HastenError]] = deque()
        more = True
        try:
            while more or running:
                while more and len(running) < ahead:
                    job = next(source, None)
                    if job is None:
                        more = False
                        break
                    try:
                        request = self._submit_job(job)
                    except HastenError as error:
                        ready.append((job, error))
                    else:
                        running[request.id] = (job, request)
                if running:
                    self._step()
                for key in [k for k, (_, request) in running.items() if request.done]:
                    job, request = running.pop(key)
                    ready.append((job, _result(request)))
                while ready:
                    yield ready.popleft()
        finally:
            self._cancel([request for _, request in running.values()])

    def _submit_job(self, job: Job) -> Request:
        if job.error is not None:
            raise job.error
        if job.body is None:
            raise RequestError(f"line {job.line}: no body")
        params = job.body.params()
        if isinstance(job.body, ChatBody):
            return self._submit(self.chat_prompt([m.plain() for m in job.body.messages]), params)
        return self._submit(job.body.prompt, params)

    # -- scoring -------------------------------------------------------------------------------------------------

    @overload
    def score(
        self,
        given: str | Sequence[int],
        context: int = 0,
        mode: scoring.Mode = "prefill",
        chunk: int | None = None,
    ) -> Score: ...

    @overload
    def score(
        self,
        given: Sequence[str] | Sequence[Sequence[int]],
        context: int = 0,
        mode: scoring.Mode = "prefill",
        chunk: int | None = None,
    ) -> list[Score]: ...

    def score(
        self, given: Any, context: int = 0, mode: scoring.Mode = "prefill", chunk: int | None = None
    ) -> Score | list[Score]:
        """Log-likelihood of tokens, teacher forced; see `hasten.lm.scoring.score`. A list gives a list."""
        many = _many(given)
        single = isinstance(given, str) or many is not given
        with self._lock:
            scores = scoring.score(
                self.engine, [self.engine.intake.tokens(g) for g in many], context, mode, chunk
            )
        return scores[0] if single else scores

    # -- the rest ------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Figures of the loaded plan: bytes that one decoded token reads, KV capacity, pages in use, drafts."""
        cache, config = self.engine.cache, self._loaded.decoder.config
        weights = sum(_weight_bytes(module) for _, module in self._loaded.decoder.linears())
        drafter, beside = self.engine.parts.drafter, {}
        if drafter is not None:
            beside = {
                "draft_kv_bytes": drafter.page_bytes(cache.page_size) * cache.pool.count,
                "speculation": self.engine.speculation.to_dict(),
            }
        return {
            "model": str(self._loaded.path),
            "family": config.family,
            "dtype": self.plan.dtype,
            "weight_bytes_per_token": weights,
            "kv_bytes_per_token": cache.page_bytes / cache.page_size,
            "kv_bytes": cache.bytes(),
            "pages": cache.pool.count,
            "pages_used": cache.pool.used,
            "pages_stored": len(cache.store),
            "page_size": cache.page_size,
            "context": self.engine.context,
            "max_batch": self.engine.settings.max_batch,
            **self.engine.scheduler.facts(),
            **beside,
            **({} if (policy := self.engine.runner.policy) is None else policy.figures()),
        }

    def close(self) -> None:
        """Cancel everything and forget the prefix cache."""
        with self._lock:
            self.engine.cancel_all()
            self.forget_prefixes()

    def forget_prefixes(self) -> None:
        """Drop the pages kept of texts that were read, the drafter's too."""
        with self._lock:
            self.engine.cache.store.clear()
            if self.engine.parts.drafter is not None:
                self.engine.parts.drafter.forget_prefixes()
            for transform in self.engine.parts.transforms:
                transform.forget_prefixes()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, prompt: Given, params: SamplingParams | None) -> Request:
        with self._lock:
            return self.engine.submit(prompt, params)

    def _step(self) -> None:
        with deferred_interrupt(), self._lock:
            self.engine.step()

    def _cancel(self, requests: Iterable[Request]) -> None:
        with deferred_interrupt(), self._lock:
            for request in requests:
                if not request.done:
                    self.engine.cancel(request)


class Stream(Iterator[Delta]):
    """The deltas of one request. Iterating runs the engine; `close` (also by ``with`` or garbage) cancels."""

    def __init__(self, llm: LLM, request: Request) -> None:
        self._llm, self.request = llm, request

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        request = self.request
        try:
            while not request.deltas and not request.done:
                self._llm._step()
        except BaseException:
            self.close()
            raise
        if request.deltas:
            return request.deltas.popleft()
        if request.failure is not None:
            failure, request.failure = request.failure, None
            raise failure
        raise StopIteration

    def completion(self) -> Completion:
        """Everything produced so far."""
        return self.request.completion()

    def close(self) -> None:
        """Cancel the request if it is not finished, and drop what was not read."""
        self._llm._cancel([self.request])
        self.request.deltas.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.request.done:
            self.close()


def _plan(
    model: str | Path | Plan | None,
    use: tuple[Use, ...],
    dtype: str | None,
    plan: Plan | str | Path | None,
    engine: dict[str, Any],
) -> Plan:
    if isinstance(model, Plan) or (model is not None and Path(model).suffix == ".toml"):
        if plan is not None:
            raise PlanError("a plan was given twice: as the model and as plan=")
        model, plan = None, model
    if plan is None:
        return Plan.of(
            use,
            loader.technique,
            model=None if model is None else str(model),
            dtype=dtype or "auto",
            engine=engine,
        )
    if model is not None or use or dtype is not None:
        raise PlanError(
            "a plan says which model, techniques and dtype to use; give them there or leave the plan out"
        )
    base = plan if isinstance(plan, Plan) else Plan.read(plan, loader.technique)
    return Plan(base.model, base.techniques, base.dtype, {**base.engine, **engine}).check()


def _many(given: Any) -> Sequence[Any]:
    """One prompt or several, as a list of prompts."""
    if isinstance(given, str | bytes | Prompt):
        return [given]
    if not isinstance(given, Sequence):
        raise RequestError(f"prompts are text, token ids or a list of those, not {type(given).__name__}")
    return [given] if given and isinstance(given[0], int) else given


def _result(request: Request) -> Completion | HastenError:
    failure = request.failure
    if failure is None:
        return request.completion()
    return (
        failure if isinstance(failure, HastenError) else HastenError(f"{type(failure).__name__}: {failure}")
    )


def _weight_bytes(module: Any) -> int:
    if isinstance(module, PackedLinear):
        return module.weight_bytes()
    return sum(p.numel() * p.element_size() for p in module.parameters())
