"""EngineArgs and AsyncLLMEngine: vLLM's names of `EngineConfig` and `AsyncLLM`, and the way from one to the other."""

from dataclasses import fields

from nanovllm.async_llm import AsyncLLM
from nanovllm.config import EngineConfig

EngineArgs = AsyncEngineArgs = EngineConfig


class AsyncLLMEngine(AsyncLLM):
    """An `AsyncLLM` that programs make of `AsyncEngineArgs`, as they do with vLLM."""

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> "AsyncLLMEngine":
        """engine_args: as `AsyncEngineArgs(model=..., ...)` made them. Raises what `LLM` raises."""
        if not isinstance(engine_args, EngineConfig):
            raise TypeError(f"engine_args must be AsyncEngineArgs, got {engine_args!r}")
        return cls(**{field.name: getattr(engine_args, field.name) for field in fields(engine_args)})
