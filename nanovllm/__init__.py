"""Nano-vLLM: LLM inference that a person can read in an afternoon.

The public names are loaded on first use, so that importing the package starts nothing: no torch, no device, no
compiler.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "nanovllm.llm",
    "AsyncLLM": "nanovllm.async_llm",
    "Architecture": "nanovllm.models.architecture",
    "AsyncEngineArgs": "nanovllm.engine_args",
    "AsyncLLMEngine": "nanovllm.engine_args",
    "EngineArgs": "nanovllm.engine_args",
    "register_model": "nanovllm.models.registry",
    "EngineConfig": "nanovllm.config",
    "SamplingParams": "nanovllm.sampling_params",
    "RequestOutputKind": "nanovllm.sampling_params",
    "StructuredOutputsParams": "nanovllm.structured_outputs",
    "BeamSearchParams": "nanovllm.beam_search",
    "BeamSearchOutput": "nanovllm.outputs",
    "BeamSearchSequence": "nanovllm.outputs",
    "RequestOutput": "nanovllm.outputs",
    "CompletionOutput": "nanovllm.outputs",
    "Logprob": "nanovllm.outputs",
    "EmbeddingOutput": "nanovllm.embedding",
    "EmbeddingRequestOutput": "nanovllm.embedding",
    "TextPrompt": "nanovllm.prompts",
    "TokensPrompt": "nanovllm.prompts",
    "LoRARequest": "nanovllm.lora.request",
    "Proposer": "nanovllm.engine.speculation.proposer",
    "RequestError": "nanovllm.errors",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
