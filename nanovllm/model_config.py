"""ModelConfig: what a config.json says of a decoder, with this project's names for its fields; frozen.

Owns what these fields mean, and the sizes that follow from them: bytes of a token in the cache, of a state. Does not
own reading them (`models/hf_config.py`). Dtypes are strings, so that this file needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.cache_specs import CacheGroups, LatentShape, StateMemory, StateShape, group_layers


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

    dtype: of the weights and the computation. max_model_len: positions that the model
    was made for, stretched as its rope says.
    windows: per layer, how many last tokens attention sees, None for all, 0 for a layer that keeps a `state` instead.
    ropes: per layer, None for no rotation.
    qk_norm: "head" norms each head of q and k, "projection" all heads of a token together.
    norms: where a layer's norms are: "before" attention and MLP, "after" them, "both", or "shared": one before the two,
    which run side by side. norm_names: what the checkpoint calls some of them, by their names in `models/llama.py`.
    norm_offset: what is added to the norm weights of the checkpoint. is_neox_style: rotation turns dimensions i and
    i + rotated / 2 together; otherwise 2i and 2i + 1.
    attention_scale: of q k^T. Soft-caps: x -> cap tanh(x / cap). residual_scale: of what a layer adds to the residual.
    extra: the config.json fields that this architecture has beyond those of all decoders. quantization: its
    quantization_config, read by `quantization/scheme.py`. layer_heads: per layer, KV heads and their size, where layers
    differ in them; empty else. kv_sources: per layer, the one whose keys and values it reads; empty where each has its
    own. latent: where all attention is over latents; num_kv_heads is 1 then, and head_dim what the cache holds of a
    token.
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
    norm_names: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    is_neox_style: bool = True
    activation: str = "silu"
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None
    state: StateShape | None = None
    latent: LatentShape | None = None
    layer_heads: tuple[tuple[int, int], ...] = ()
    kv_sources: tuple[int, ...] = ()

    @property
    def rope_dim(self) -> int:
        """Of a head's dimensions, those that a rotation is made for; it may leave some of them as they are."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    @property
    def num_cache_planes(self) -> int:
        """Keys and values; or keys alone, whose first numbers are the values."""
        return 2 if self.latent is None else 1

    @property
    def num_attention_layers(self) -> int:
        return sum(window != 0 for window in self.windows)

    def kv_bytes_per_token(self, kv_cache_dtype: str) -> int:
        """kv_cache_dtype: as in `EngineConfig`; two scales of 8-bit codes take 4 bytes."""
        size, beside = (4 if self.dtype == "float32" else 2, 0) if kv_cache_dtype == "auto" else (1, 4)
        heads = self.layer_heads or ((self.num_kv_heads, self.head_dim),) * self.num_layers
        kept = (heads[i] for i in range(self.num_layers) if self.windows[i] != 0 and self.kv_source(i) == i)
        return sum(count * (self.num_cache_planes * dim * size + beside) for count, dim in kept)

    def kv_source(self, layer: int) -> int:
        return self.kv_sources[layer] if self.kv_sources else layer

    def cache_groups(self, max_model_len: int) -> CacheGroups:
        row_sizes = [count * dim for count, dim in self.layer_heads]
        return group_layers(self.windows, max_model_len, row_sizes, self.kv_sources)

    @property
    def bytes_per_state(self) -> int:
        """Of one request, in all layers that keep one."""
        num_layers = self.num_layers - self.num_attention_layers
        return 0 if self.state is None else 4 * num_layers * self.state.num_floats

    def state_memory(self, kv_cache_dtype: str, block_size: int) -> StateMemory | None:
        """None if no layer keeps a state."""
        if not self.bytes_per_state:
            return None
        return StateMemory(self.bytes_per_state, self.kv_bytes_per_token(kv_cache_dtype) * block_size)

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
