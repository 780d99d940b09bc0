"""EngineConfig (what the user chose) and ModelConfig (what a Hugging Face config.json says); both frozen.

Owns parsing and bounds. Invariant: nothing measured is ever written back here; the number of KV blocks, say, is a
result of loading and lives with the engine. Dtypes are strings, so that this file needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nanovllm.errors import reject_unknown_options
from nanovllm.sampling_params import LogitsProcessor

DTYPES = ("float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
COMPILATIONS = ("kernels", "inductor", "none")
_POSITIVE_INTEGERS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "overlap_depth",
    "tensor_parallel_size",
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
    enforce_eager: run without CUDA graphs.
    compilation: how the layers between the matrix products run: "kernels" (this project's own: Triton on a GPU, C++ on
        a CPU), "inductor" (plain PyTorch, fused by torch.compile) or "none" (plain PyTorch).
    overlap_depth: steps in flight; 2 plans the next step while the device runs, 1 is synchronous. None chooses by
        device.
    tensor_parallel_size: devices that share the model; 1 in this version.
    seed: what requests without a seed of their own derive theirs from.
    load_format: "auto", "safetensors", "gguf", or "dummy" for random weights of the right shape.
    skip_tokenizer_init: work on token ids only.
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
    enforce_eager: bool = False
    compilation: str = "kernels"
    overlap_depth: int | None = None
    tensor_parallel_size: int = 1
    seed: int = 0
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
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
        for name in ("enable_prefix_caching", "enforce_eager", "skip_tokenizer_init"):
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
        if self.tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size must be 1 in this version, got {self.tensor_parallel_size}")
        if (self.max_num_batched_tokens or self.max_num_seqs or 0) < (self.max_num_seqs or 0):
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request gets a token in every step"
            )

    def resolve(self, model_config: "ModelConfig", device_type: str) -> "EngineConfig":
        """A new config with every None decided for this model and device ("cpu" or "cuda").

        Raises ValueError if max_model_len is more than the model was made for.
        """
        on_gpu = device_type == "cuda"
        model_len = model_config.max_model_len
        if self.max_model_len is not None and self.max_model_len > model_len:
            raise ValueError(
                f"max_model_len {self.max_model_len} is more than the {model_len} positions of the model; lower it, or "
                "set rope scaling in the model's config.json if it supports longer inputs"
            )
        batched = self.max_num_batched_tokens or max(16384 if on_gpu else 2048, self.max_num_seqs or 1)
        return replace(
            self,
            dtype=model_config.dtype,
            device=device_type if self.device == "auto" else self.device,
            max_model_len=self.max_model_len or model_len,
            max_num_batched_tokens=batched,
            max_num_seqs=self.max_num_seqs or min(batched, 512 if on_gpu else 64),
            gpu_memory_utilization=self.gpu_memory_utilization or (0.9 if on_gpu else 0.3),
            block_size=self.block_size or (64 if on_gpu else 16),
            overlap_depth=self.overlap_depth or (2 if on_gpu else 1),
        )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: its base and how it is stretched. `parameters` holds what the type needs, by its HF name."""

    rope_type: str = "default"
    theta: float = 10000.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length_dependent_from(self) -> int | None:
        """Keys of prompts longer than this depend on the prompt's length; None if they never do."""
        return self.parameters["original_max_position_embeddings"] if self.rope_type == "dynamic" else None

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

    windows: per layer, how many last tokens attention sees, None for all. dtype: of the weights and the computation.
    max_model_len: positions that the model was made for, stretched as its rope says.
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
    rope: RopeConfig
    max_model_len: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        element_size = 4 if self.dtype == "float32" else 2
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * element_size

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, dtype: str, qkv_bias: bool | None, qk_norm: bool) -> "ModelConfig":
        """Read a config.json dict. dtype is resolved already; qkv_bias None takes the config's `attention_bias`.

        Raises ValueError for a missing field, and for one that changes the maths in a way that is not implemented.
        """
        architecture = hf["architectures"][0]
        for name, neutral in _NEUTRAL.items():
            if hf.get(name, neutral) not in (neutral, None):
                raise ValueError(f"{architecture} with {name}={hf[name]!r} is not supported; only {neutral!r} is")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(hf.get(name), int):
                raise ValueError(f"config.json of {architecture}: {name} must be an integer, got {hf.get(name)!r}")
        num_heads = hf["num_attention_heads"]
        num_kv_heads = hf.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}"
            )
        attention_bias = bool(hf.get("attention_bias", False))
        max_position_embeddings = hf.get("max_position_embeddings") or 2048
        rope = _read_rope(hf, max_position_embeddings)
        return cls(
            architecture=architecture,
            dtype=dtype,
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
            rms_norm_eps=hf.get("rms_norm_eps") or 1e-6,
            rope=rope,
            max_model_len=rope.max_positions(max_position_embeddings),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if qkv_bias is None else qkv_bias,
            o_bias=attention_bias if qkv_bias is None else False,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            qk_norm=qk_norm,
            windows=_read_windows(hf),
        )


# Fields of other models' config.json files that change the computation; any other value than these is refused.
_NEUTRAL: Mapping[str, Any] = {
    "hidden_act": "silu",
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "logits_scaling": 1.0,
    "no_rope_layers": None,
}

_ROPE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def _read_rope(hf: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """RoPE from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    parameters = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    theta = parameters.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    if rope_type not in _ROPE_PARAMETERS:
        raise ValueError(f"rope type {rope_type!r} is not supported; supported are {', '.join(_ROPE_PARAMETERS)}")
    for name in _ROPE_PARAMETERS[rope_type]:
        if not isinstance(parameters.get(name), (int, float)):
            raise ValueError(f"rope type {rope_type!r} needs a number {name!r} in rope_parameters, got {parameters}")
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1.0 is not supported")
    original = parameters.get("original_max_position_embeddings")
    if rope_type == "dynamic" or (rope_type == "yarn" and original is None):  # dynamic never looks at it, as in HF
        parameters["original_max_position_embeddings"] = max_position_embeddings
    return RopeConfig(rope_type=rope_type, theta=float(theta), parameters=parameters)


def _read_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Sliding windows per layer, from `layer_types`, or from the older switches of Mistral and Qwen2."""
    num_layers = hf["num_hidden_layers"]
    window = hf.get("sliding_window")
    if window is None or hf.get("use_sliding_window") is False:
        return (None,) * num_layers
    layer_types = hf.get("layer_types")
    if layer_types is not None:
        if len(layer_types) != num_layers:
            raise ValueError(f"config.json has {len(layer_types)} layer_types for {num_layers} layers")
        known = {"full_attention": None, "sliding_attention": window}
        for layer_type in layer_types:
            if layer_type not in known:
                raise ValueError(f"layer type {layer_type!r} is not supported; supported are {', '.join(known)}")
        return tuple(known[layer_type] for layer_type in layer_types)
    if hf.get("use_sliding_window"):
        first = hf.get("max_window_layers", num_layers)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    return (window,) * num_layers
