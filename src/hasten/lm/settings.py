"""`EngineSettings`: limits of one loaded engine (the ``[engine]`` table of a plan)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hasten.core.errors import SettingError, UnknownNameError


class EngineSettings(BaseModel):
    """Memory, batch and context limits. An unknown name or a value out of range raises `SettingError`.

    The KV cache holds ``kv_tokens`` tokens, or as many as fit in ``kv_memory_mb`` (10^6 bytes, sidecars of the
    attention policy included). Neither given: every sequence of a full batch may reach the whole context, but no
    more than 2000 MB and no more than a quarter of the memory that is free.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    page_size: int = Field(32, ge=1, le=1024, description="tokens per KV page")
    kv_memory_mb: float | None = Field(None, gt=0, description="budget of the KV cache, 10^6 bytes")
    kv_tokens: int | None = Field(None, ge=1, description="KV capacity in tokens, instead of kv_memory_mb")
    kv_dtype: Literal["float32", "bfloat16", "int8"] | None = Field(
        None, description="how KV pages store numbers; None: float32 under dtype float32, else bfloat16"
    )
    max_batch: int = Field(64, ge=1, le=65536, description="sequences that run together")
    max_step_tokens: int = Field(512, ge=1, description="rows of one step: decode rows plus prefill chunks")
    max_context: int | None = Field(
        None, ge=2, description="prompt plus output tokens; None: the model's limit"
    )
    prefix_cache: bool = Field(True, description="reuse KV pages of prompts seen before")
    draft_tokens: int = Field(8, ge=1, le=1024, description="most tokens a drafter may propose at once")
    threads: int | None = Field(None, ge=1, description="torch threads of the process; None: leave as is")
    seed: int = Field(0, ge=0, description="of requests that bring none, and of techniques")

    @model_validator(mode="after")
    def _consistent(self) -> EngineSettings:
        if self.kv_memory_mb is not None and self.kv_tokens is not None:
            raise ValueError("give kv_memory_mb or kv_tokens, not both")
        return self

    @classmethod
    def of(cls, values: dict[str, Any]) -> EngineSettings:
        """Build from plain values; the error names the setting, its value and what it wants."""
        for name in values:
            if name not in cls.model_fields:
                raise UnknownNameError(
                    "engine setting", name, cls.model_fields, "settings: " + ", ".join(cls.model_fields)
                )
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            what = f"engine.{where} = {first.get('input')!r}" if where else "engine"
            raise SettingError(f"{what}: {first['msg'].removeprefix('Value error, ')}") from None
