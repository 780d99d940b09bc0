"""EngineConfig (what the user chose) and ResolvedConfig (what runs); both frozen.

Owns the options and their bounds; what a model is stands in `model_config.py`. Invariant: nothing measured is ever
written back here; the number of KV blocks, say, is a result of loading and lives with the engine. Dtypes are strings,
so that this file needs no torch.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.model_config import ModelConfig
from nanovllm.options import check_fields, option, takes_options
from nanovllm.sampling_params import LogitsProcessor
from nanovllm.speculative_config import SpeculativeConfig, read_speculative_config

DTYPES = ("float32", "bfloat16", "float16")
ROW_BYTES = 8 * 2**30  # of states, by default
GPU_MEMORY_UTILIZATION, HOST_MEMORY_UTILIZATION = 0.9, 0.3  # what gpu_memory_utilization=None means
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")
QUANTIZATIONS = ("fp8", "int8", "int8_dynamic", "int4", "gguf")  # of weights, at load
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
# vLLM's names for what "fp8" and "int8" are here: a scale for each token and head.
_KV_CACHE_DTYPES = {"fp8_e4m3": "fp8", "fp8_per_token_head": "fp8", "int8_per_token_head": "int8", None: "auto"}


def _read_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class NamedModule(str):
    """A model that is in this process already, under the name of where it came from."""

    module: Any

    @classmethod
    def of(cls, module: Any) -> "NamedModule":
        named = cls(module.config.name_or_path or type(module).__name__)
        named.module = module
        return named


def _read_model(value: Any) -> str:
    if callable(getattr(value, "named_parameters", None)) and hasattr(value, "config"):
        return NamedModule.of(value)
    value = _read_path(value)
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"model must be a folder, a .gguf file, a Hub name, 'demo' or a transformers model, got {value!r}"
        )
    return value


def _read_torch_name(value: Any) -> Any:
    """The name of a torch.dtype or torch.device."""
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def _read_dtype(value: Any) -> Any:
    name = _read_torch_name(value)
    return {"half": "float16", "float": "float32"}.get(name, name) if isinstance(name, str) else name


def _read_kv_cache_dtype(value: Any) -> Any:
    return _KV_CACHE_DTYPES.get(value, value) if value is None or isinstance(value, str) else value


def _read_max_model_len(value: Any) -> Any:
    return None if isinstance(value, int) and value == -1 else value  # vLLM's other word for "the model's own"


@takes_options
@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of `LLM(model, ...)`, with vLLM's names. Raises TypeError or ValueError that names option and value.

    model: a folder, a .gguf file, a Hugging Face Hub name, or "demo" (docs/checkpoints.md); or a transformers model, of
        which the engine then shares the parameters (docs/training.md).
    tokenizer: where the tokenizer is, if not with the model: a folder, a .gguf file or a Hub name.
    revision: branch, tag or commit of a Hub name.
    dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
    device: "auto", "cpu", "cuda" or "cuda:N".
    max_model_len: longest prompt plus output, in tokens; None takes the model's own.
    max_num_seqs: most requests that hold KV blocks at once; None chooses by device.
    max_num_batched_tokens: token budget of one step; longer prompts are computed in chunks. None chooses by device.
    gpu_memory_utilization: share of the device's memory that the engine may use in all; None is 0.9 on a GPU, and 0.3
        of the machine's memory on a CPU.
    kv_cache_memory_bytes: size of the KV cache, instead of what gpu_memory_utilization leaves.
    num_gpu_blocks_override: number of KV blocks, on any device, instead of what the memory would hold.
    block_size: tokens in one KV block: 8, 16, 32 or 64; None chooses by device.
    enable_prefix_caching: let requests share the KV blocks of equal prompt beginnings.
    kv_offload_gb: GiB of host memory (pinned, on a GPU), for each engine, that keep evicted blocks of the prefix cache;
        one that is asked for again is copied back instead of computed. See docs/prefix-caching.md.
    prefix_store: a folder that keeps blocks of prefixes that were used again, for later processes with the same model.
    prefix_store_gb: GiB that the folder may have for each rank; what was used longest ago goes first.
    prefix_store_warm_gb: GiB of pinned host memory for each GPU, for the blocks used last: they are read before
        the engine is ready. A CPU reads them from the page cache.
    enable_chunked_prefill: compute a prompt in parts where the budget of a step cuts it; off, a prompt waits until it
        fits whole, and max_num_batched_tokens must be at least max_model_len.
    enable_sleep_mode: on a GPU, keep weights and KV cache in memory that `LLM.sleep` can give back; a CPU always can.
    enforce_eager: run without CUDA graphs.
    compilation: how the layers between the matrix products run: "kernels" (this project's own: Triton on a GPU, C++ on
        a CPU), "inductor" (plain PyTorch, fused by torch.compile) or "none" (plain PyTorch).
    dependent_launch: let a kernel start while the one before it still runs, where the device can (an NVIDIA GPU of
        compute capability 9.0 or more); off, one starts when the other has ended, with the same results to the bit.
    overlap_depth: steps in flight; 2 plans the next step while the device runs, 1 is synchronous. None chooses by
        device.
    tensor_parallel_size: devices of this host that share the model. With several, "cuda:N" is the first of them.
    data_parallel_size: engines that share the requests, each with the whole model on devices of its own.
    engine_process: run the engine in a process of its own, so that what this one does beside it, such as a server's
        work, takes no time from it; several by data_parallel_size always do.
    distributed_executor_backend: who runs the model: "uni" (this process, on one device), "mp" (worker processes that
        the engine starts, one for each device) or "external_launcher" (torchrun, say: every rank runs the same script
        with the same prompts). None chooses "uni" for one device and "mp" for several.
    disable_custom_all_reduce: sum over devices with NCCL alone; else, for few rows and with "mp", by a kernel that
        writes straight into the other devices' memory, where they reach each other's.
    disable_cascade_attn: let each request read the whole of its context by itself; else, on a GPU, what decodes share
        is read once for all of them where that saves enough.
    logprobs_mode: what a token's log-probabilities are: "raw_logprobs", of the model's own logits;
        "processed_logprobs", of those that the token was drawn from, with penalties, temperature and filters; or
        "raw_logits" and "processed_logits", these numbers without the logarithm. Those of prompts are raw_logprobs.
    max_logprobs: most log-probabilities of one token that a request may ask for; -1 allows a whole vocabulary's.
    distributed_timeout_seconds: how long a step, or a message between devices, may take before the engine ends.
    seed: what requests without a seed of their own derive theirs from.
    load_format: "auto", "safetensors", "gguf", or "dummy" for random weights of the right shape.
    use_tqdm_on_load: show a bar while weights are loaded, on a terminal.
    quantization: what the weights of linear layers become while they are loaded: "fp8" or "int8_dynamic" (weights and
        inputs in 8 bits), "int8" or "int4" (weights alone); "gguf" keeps those of a GGUF file packed; None keeps them
        as the checkpoint has them, and makes those of a GGUF file dense. See docs/quantization.md.
    kv_cache_dtype: what keys and values are kept in: "auto" (the model's dtype), or 8 bits with a scale for each token
        and head, "fp8" (e4m3, also "fp8_e4m3") or "int8". See docs/quantization.md.
    enable_lora: let requests name a LoRA adapter (`lora_request`); see docs/adapters.md.
    max_loras: most adapters in one batch; each has room of its own on the device.
    max_lora_rank: most that an adapter's rank may be.
    max_cpu_loras: most adapters that the engine keeps, those on the device among them; None is max_loras. One more
        takes the place of the one that was not asked for the longest.
    skip_tokenizer_init: work on token ids only.
    trace: a file that tells of every step, ending in .json or .json.gz, for ui.perfetto.dev, `nanovllm trace` and
        `LLM.explain`; several engines put a number before the ending. See docs/tracing.md.
    speculative_config: guess tokens ahead and verify several in one step, with the same tokens as result: a dict with
        vLLM's keys, "method" and "num_speculative_tokens" first. See docs/speculation.md.
    deterministic: make tokens and log-probabilities of a seeded (or greedy) request equal to the bit whatever else
        runs: alone or in any batch, in chunks, after a preemption, on a prefix-cache hit. Slower; see
        docs/determinism.md.
    logits_processors: functions (token ids of prompt and output so far, logits [vocab_size] float32) -> logits, run for
        every request before its own `SamplingParams.logits_processors`.
    """

    model: str = option(read=_read_model, has_flag=False)  # each command takes it in its own way
    tokenizer: str | None = option(None, read=_read_path)
    revision: str | None = None
    dtype: str = option("auto", choices=("auto", *DTYPES), read=_read_dtype)
    device: str = option("auto", read=_read_torch_name)
    max_model_len: int | None = option(None, low=1, read=_read_max_model_len)
    max_num_seqs: int | None = option(None, low=1)
    max_num_batched_tokens: int | None = option(None, low=1)
    gpu_memory_utilization: float | None = option(None, above=0, high=1)
    kv_cache_memory_bytes: int | None = option(None, low=1)
    num_gpu_blocks_override: int | None = option(None, low=1)
    block_size: int | None = option(None, choices=(None, 8, 16, 32, 64))
    enable_prefix_caching: bool = True
    kv_offload_gb: float = option(0.0, low=0)
    prefix_store: str | None = option(None, read=_read_path)
    prefix_store_gb: float = option(16.0, above=0)
    prefix_store_warm_gb: float = option(2.0, low=0)
    enable_chunked_prefill: bool = True
    enable_sleep_mode: bool = False
    enforce_eager: bool = False
    compilation: str = option("kernels", choices=("kernels", "inductor", "none"))
    dependent_launch: bool = True
    overlap_depth: int | None = option(None, low=1)
    tensor_parallel_size: int = option(1, low=1)
    data_parallel_size: int = option(1, low=1)
    engine_process: bool = False
    distributed_executor_backend: str | None = option(None, choices=(None, "uni", "mp", "external_launcher"))
    disable_custom_all_reduce: bool = False
    disable_cascade_attn: bool = False
    logprobs_mode: str = option("raw_logprobs", choices=LOGPROBS_MODES)
    max_logprobs: int = option(-1, low=-1, words="-1 (no limit), 0 or more")
    distributed_timeout_seconds: float = option(300.0, above=0, words="more than 0 and finite")
    seed: int = option(0, read=lambda seed: 0 if seed is None else seed)
    load_format: str = option("auto", choices=("auto", "safetensors", "gguf", "dummy"))
    use_tqdm_on_load: bool = option(True, has_flag=False)  # the commands' --quiet
    quantization: str | None = option(None, choices=(None, *QUANTIZATIONS))
    kv_cache_dtype: str = option("auto", choices=KV_CACHE_DTYPES, read=_read_kv_cache_dtype)
    enable_lora: bool = False
    max_loras: int = option(1, low=1)
    max_lora_rank: int = option(16, low=1, high=512)
    max_cpu_loras: int | None = option(None, low=1)
    skip_tokenizer_init: bool = False
    trace: str | None = option(None, read=_read_path)
    speculative_config: SpeculativeConfig | Mapping[str, Any] | None = option(None, read=read_speculative_config)
    deterministic: bool = False
    logits_processors: tuple[LogitsProcessor, ...] | list[LogitsProcessor] = option((), has_flag=False)

    @property
    def has_replicas(self) -> bool:
        """Whether engines run in processes of their own, also if it is a single one."""
        return self.data_parallel_size > 1 or self.engine_process

    @property
    def has_tiers(self) -> bool:
        """Whether blocks that the KV cache evicts, or shares, are kept elsewhere as well."""
        return self.kv_offload_gb > 0 or self.prefix_store is not None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.has_replicas and self.distributed_executor_backend == "external_launcher":
            raise ValueError(
                f"distributed_executor_backend='external_launcher' runs one engine in this process, but "
                f"engine_process is {self.engine_process} and data_parallel_size {self.data_parallel_size}; use 'mp'"
            )
        if (self.kv_offload_gb or self.prefix_store) and not self.enable_prefix_caching:
            raise ValueError(
                "kv_offload_gb and prefix_store keep blocks of the prefix cache, and enable_prefix_caching is False; "
                "leave it on"
            )
        if self.prefix_store and self.distributed_executor_backend == "external_launcher":
            raise ValueError(
                "prefix_store needs one planner, and with distributed_executor_backend='external_launcher' every rank "
                "plans for itself: use kv_offload_gb, or 'mp'"
            )
        if self.trace is not None and not self.trace.endswith((".json", ".json.gz")):
            raise ValueError(f"trace must be a file that ends in .json or .json.gz, got {self.trace!r}")
        if self.tensor_parallel_size > 1 and self.distributed_executor_backend == "uni":
            raise ValueError(
                f"distributed_executor_backend='uni' is one process on one device, but tensor_parallel_size is "
                f"{self.tensor_parallel_size}; use 'mp'"
            )
        if self.deterministic and self.compilation != "kernels":
            raise ValueError(
                f"deterministic=True needs compilation='kernels', got {self.compilation!r}: only those kernels compute "
                "each row on its own"
            )
        if self.deterministic and self.quantization is not None:
            raise ValueError(f"deterministic=True does not cover quantization={self.quantization!r}; leave one off")
        if self.deterministic and self.tensor_parallel_size > 1:
            raise ValueError(
                f"deterministic=True needs tensor_parallel_size=1, got {self.tensor_parallel_size}: the order in which "
                "ranks are added depends on the batch"
            )
        if (self.max_cpu_loras or self.max_loras) < self.max_loras:
            raise ValueError(
                f"max_cpu_loras ({self.max_cpu_loras}) counts those on the device, so it must be at least max_loras "
                f"({self.max_loras})"
            )
        if (self.max_num_batched_tokens or self.max_num_seqs or 0) < (self.max_num_seqs or 0):
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request gets a token in every step"
            )

    def resolve(self, model_config: "ModelConfig", device_type: str) -> "ResolvedConfig":
        """The config with everything that was left open decided for this model and device ("cpu" or "cuda").

        Raises ValueError if max_model_len is more than the model was made for, or if the model has a part that cannot
        be computed as `deterministic` asks.
        """
        if self.deterministic and model_config.logits_softcap is not None:
            raise ValueError("deterministic=True does not cover models with a soft-cap on their logits; leave it off")
        if self.deterministic and model_config.quantization is not None:
            raise ValueError("deterministic=True does not cover quantized checkpoints; leave it off")
        if self.quantization not in (None, "gguf") and model_config.quantization is not None:
            raise ValueError(
                f"quantization={self.quantization!r} is for checkpoints that are not quantized, and this one is, by "
                f"{model_config.quantization.get('quant_method')!r}; leave it out"
            )
        if self.deterministic and model_config.length_dependent_from is not None:
            raise ValueError("deterministic=True does not cover dynamic RoPE scaling; leave it off")
        on_gpu = device_type == "cuda"
        model_len = model_config.max_model_len
        if self.max_model_len is not None and self.max_model_len > model_len:
            raise ValueError(
                f"max_model_len {self.max_model_len} is more than the {model_len} positions of the model; lower it, or "
                "set rope scaling in the model's config.json if it supports longer inputs"
            )
        whole = 1 if self.enable_chunked_prefill else self.max_model_len or model_len  # what a step must have room for
        if (self.max_num_batched_tokens or whole) < whole:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_model_len ({whole}) with "
                "enable_chunked_prefill=False; raise it, lower max_model_len, or leave chunked prefill on"
            )
        batched = self.max_num_batched_tokens or max(16384 if on_gpu else 2048, self.max_num_seqs or 1, whole)
        decided = {
            "dtype": model_config.dtype,
            "device": device_type if self.device == "auto" else self.device,
            "max_model_len": self.max_model_len or model_len,
            "max_num_batched_tokens": batched,
            "max_num_seqs": self.max_num_seqs or min(batched, _most_rows(model_config.bytes_per_state, on_gpu)),
            "gpu_memory_utilization": self.gpu_memory_utilization
            or (GPU_MEMORY_UTILIZATION if on_gpu else HOST_MEMORY_UTILIZATION),
            "block_size": self.block_size or (64 if on_gpu else 16),
            "distributed_executor_backend": self.distributed_executor_backend
            or ("uni" if self.tensor_parallel_size == 1 else "mp"),
            "overlap_depth": self.overlap_depth or (2 if on_gpu else 1),
            "max_cpu_loras": self.max_cpu_loras or self.max_loras,
        }
        return ResolvedConfig(**{**vars(self), **decided})


def _most_rows(bytes_per_state: int, on_gpu: bool) -> int:
    """Requests at once, where the user says nothing: a state of each is in memory all the time."""
    most = 512 if on_gpu else 64
    return min(most, max(16, ROW_BYTES // bytes_per_state)) if bytes_per_state else most


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig in which nothing is left open: what `EngineConfig.resolve` makes, and all parts work with."""

    dtype: str = field()
    max_model_len: int = field()
    max_num_seqs: int = field()
    max_num_batched_tokens: int = field()
    gpu_memory_utilization: float = field()
    block_size: int = field()
    overlap_depth: int = field()
    speculative_config: SpeculativeConfig | None = field(default=None)
    max_cpu_loras: int = field()
    distributed_executor_backend: str = field()
