"""EngineConfig (what the user chose) and ModelConfig (what a Hugging Face config.json says); both frozen.

Owns the options and their bounds; `models/hf_config.py` reads a config.json. Invariant: nothing measured is ever
written back here; the number of KV blocks, say, is a result of loading and lives with the engine. Dtypes are strings,
so that this file needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nanovllm.errors import reject_unknown_options
from nanovllm.sampling_params import LogitsProcessor

DTYPES = ("float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
EXECUTOR_BACKENDS = ("uni", "mp", "external_launcher")
COMPILATIONS = ("kernels", "inductor", "none")
_POSITIVE_INTEGERS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "overlap_depth",
    "tensor_parallel_size",
    "data_parallel_size",
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of `LLM(model, ...)`, with vLLM's names. Raises TypeError or ValueError that names option and value.

    model: a folder, a .gguf file, a Hugging Face Hub name, or "demo".
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
    enable_chunked_prefill: compute a prompt in parts where the budget of a step cuts it; off, a prompt waits until it
        fits whole, and max_num_batched_tokens must be at least max_model_len.
    enforce_eager: run without CUDA graphs.
    compilation: how the layers between the matrix products run: "kernels" (this project's own: Triton on a GPU, C++ on
        a CPU), "inductor" (plain PyTorch, fused by torch.compile) or "none" (plain PyTorch).
    dependent_launch: let a kernel start while the one before it still runs, where the device can (an NVIDIA GPU of
        compute capability 9.0 or more); off, one starts when the other has ended, with the same results to the bit.
    overlap_depth: steps in flight; 2 plans the next step while the device runs, 1 is synchronous. None chooses by
        device.
    tensor_parallel_size: devices of this host that share the model. With several, "cuda:N" is the first of them.
    data_parallel_size: engines that share the requests, each with the whole model on devices of its own.
    distributed_executor_backend: who runs the model: "uni" (this process, on one device), "mp" (worker processes that
        the engine starts, one for each device) or "external_launcher" (torchrun, say: every rank runs the same script
        with the same prompts). None chooses "uni" for one device and "mp" for several.
    disable_custom_all_reduce: sum over devices with NCCL alone; else, for few rows and with "mp", by a kernel that
        writes straight into the other devices' memory, where they reach each other's.
    distributed_timeout_seconds: how long a step, or a message between devices, may take before the engine ends.
    seed: what requests without a seed of their own derive theirs from.
    load_format: "auto", "safetensors", "gguf", or "dummy" for random weights of the right shape.
    skip_tokenizer_init: work on token ids only.
    deterministic: make tokens and log-probabilities of a seeded (or greedy) request equal to the bit whatever else
        runs: alone or in any batch, in chunks, after a preemption, on a prefix-cache hit. Slower; see
        docs/determinism.md.
    logits_processors: functions (token ids of prompt and output so far, logits [vocab_size] float32) -> logits, run for
        every request before its own `SamplingParams.logits_processors`.
    """

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    block_size: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    compilation: str = "kernels"
    dependent_launch: bool = True
    overlap_depth: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    disable_custom_all_reduce: bool = False
    distributed_timeout_seconds: float = 300.0
    seed: int = 0
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    deterministic: bool = False
    logits_processors: tuple[LogitsProcessor, ...] | list[LogitsProcessor] = ()

    def __new__(cls, *args: object, **options: object) -> "EngineConfig":
        if "trust_remote_code" in options:
            raise TypeError("EngineConfig has no option 'trust_remote_code': remote code is never run, drop the option")
        reject_unknown_options("EngineConfig", options, [option.name for option in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be a folder, a .gguf file, a Hub name or 'demo', got {self.model!r}")
        for name, allowed in (
            ("dtype", ("auto", *DTYPES)),
            ("load_format", LOAD_FORMATS),
            ("compilation", COMPILATIONS),
            ("block_size", (None, 8, 16, 32, 64)),
            ("distributed_executor_backend", (None, *EXECUTOR_BACKENDS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}")
        for name in _POSITIVE_INTEGERS:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in (
            "enable_prefix_caching",
            "enable_chunked_prefill",
            "enforce_eager",
            "dependent_launch",
            "disable_custom_all_reduce",
            "skip_tokenizer_init",
            "deterministic",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("device", "tokenizer", "revision"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "device"):
                raise TypeError(f"{name} must be a string, got {value!r}")
        utilization = self.gpu_memory_utilization
        if utilization is not None and (isinstance(utilization, bool) or not isinstance(utilization, (int, float))):
            raise TypeError(f"gpu_memory_utilization must be a number, got {utilization!r}")
        if utilization is not None and not 0 < utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {utilization}")
        if not isinstance(self.logits_processors, (list, tuple)) or not all(map(callable, self.logits_processors)):
            raise TypeError(
                f"logits_processors must be a list of functions (token_ids, logits) -> logits, got "
                f"{self.logits_processors!r}"
            )
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        timeout = self.distributed_timeout_seconds
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"distributed_timeout_seconds must be a number, got {timeout!r}")
        if not 0 < timeout < float("inf"):
            raise ValueError(f"distributed_timeout_seconds must be more than 0 and finite, got {timeout}")
        if self.data_parallel_size > 1 and self.distributed_executor_backend == "external_launcher":
            raise ValueError(
                f"data_parallel_size must be 1 with distributed_executor_backend='external_launcher', got "
                f"{self.data_parallel_size}; use 'mp'"
            )
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
        if self.deterministic and self.tensor_parallel_size > 1:
            raise ValueError(
                f"deterministic=True needs tensor_parallel_size=1, got {self.tensor_parallel_size}: the order in which "
                "ranks are added depends on the batch"
            )
        if (self.max_num_batched_tokens or self.max_num_seqs or 0) < (self.max_num_seqs or 0):
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request gets a token in every step"
            )

    def resolve(self, model_config: "ModelConfig", device_type: str) -> "EngineConfig":
        """A new config with every None decided for this model and device ("cpu" or "cuda").

        Raises ValueError if max_model_len is more than the model was made for, or if the model has a part that cannot
        be computed as `deterministic` asks.
        """
        if self.deterministic and model_config.logits_softcap is not None:
            raise ValueError("deterministic=True does not cover models with a soft-cap on their logits; leave it off")
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
        return replace(
            self,
            dtype=model_config.dtype,
            device=device_type if self.device == "auto" else self.device,
            max_model_len=self.max_model_len or model_len,
            max_num_batched_tokens=batched,
            max_num_seqs=self.max_num_seqs or min(batched, 512 if on_gpu else 64),
            gpu_memory_utilization=self.gpu_memory_utilization or (0.9 if on_gpu else 0.3),
            block_size=self.block_size or (64 if on_gpu else 16),
            distributed_executor_backend=self.distributed_executor_backend
            or ("uni" if self.tensor_parallel_size == 1 else "mp"),
            overlap_depth=self.overlap_depth or (2 if on_gpu else 1),
        )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: its base and how it is stretched. `parameters` holds what the type needs, by its HF name.

    share: of a head's dimensions that are rotated, from the first on.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    share: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def max_positions(self, max_position_embeddings: int) -> int:
        """How far the model reaches when its positions are stretched as this says."""
        if self.rope_type in ("linear", "dynamic"):
            return int(max_position_embeddings * self.parameters["factor"])
        if self.rope_type == "yarn":
            return int(self.parameters["original_max_position_embeddings"] * self.parameters["factor"])
        return max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a decoder is, with this project's names for the fields of a Hugging Face config.json.

    Made by `models/hf_config.py`. dtype: of the weights and the computation. max_model_len: positions that the model
    was made for, stretched as its rope says.
    windows: per layer, how many last tokens attention sees, None for all. ropes: per layer, None for no rotation.
    qk_norm: "head" norms each head of q and k, "projection" all heads of a token together.
    norms: where a layer's norms are: "before" attention and MLP, "after" them, or "both". norm_offset: what is added to
    the norm weights of the checkpoint.
    attention_scale: of q k^T. Soft-caps: x -> cap tanh(x / cap). residual_scale: of what a layer adds to the residual.
    extra: the config.json fields that this architecture has beyond those of all decoders.
    """

    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_model_len: int
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig | None, ...]
    attention_scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    norms: str = "before"
    norm_offset: float = 0.0
    activation: str = "silu"
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kv_bytes_per_token(self) -> int:
        element_size = 4 if self.dtype == "float32" else 2
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * element_size

    @property
    def long_from(self) -> int | None:
        """Contexts longer than this are computed with other frequencies, from their first token; None if none are."""
        longrope = (rope for rope in self.ropes if rope is not None and rope.rope_type == "longrope")
        return next((rope.parameters["original_max_position_embeddings"] for rope in longrope), None)

    @property
    def length_dependent_from(self) -> int | None:
        """Keys of prompts longer than this depend on the prompt's length; None if they never do."""
        dynamic = (rope for rope in self.ropes if rope is not None and rope.rope_type == "dynamic")
        return next((rope.parameters["original_max_position_embeddings"] for rope in dynamic), None)
