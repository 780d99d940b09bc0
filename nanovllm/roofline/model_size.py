"""What a roofline has to know of a model, from its layers on no device.

Owns the counting. Invariant: no weight is read, so it takes milliseconds for any model.
"""

import torch

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor.worker import with_quantization
from nanovllm.layers.experts import Experts
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.ops import PLAIN
from nanovllm.model_config import ModelConfig
from nanovllm.models.registry import model_class
from nanovllm.roofline.roofline import ModelSize


def model_size(config: ModelConfig, quantization: str | None, kv_cache_dtype: str) -> ModelSize:
    with torch.device("meta"):
        ops = with_quantization(PLAIN, config, quantization)
        model = model_class(config.architecture)(config, 1, getattr(torch, config.dtype), TensorParallel(), ops)
        dict(model.weights())  # makes the weights
    num_weights, num_bytes = 0, 0.0
    for layer in model.modules():
        if isinstance(layer, LinearBase) and layer not in (model.embed_tokens, model.lm_head):
            num_weights += layer.spec.num_outputs * layer.spec.in_features
            num_bytes += sum(p.nbytes for p in layer.method.parameters())
        elif isinstance(layer, Experts):
            num_weights += 3 * layer.spec.hidden_size * layer.spec.intermediate_size * layer.routing.top_k
            num_bytes += sum(p.nbytes for p in layer.method.parameters()) * layer.routing.top_k / layer.num_experts
    head = model.lm_head
    return ModelSize(
        num_weights=num_weights,
        num_head_weights=head.spec.num_outputs * head.spec.in_features,
        weight_bytes=round(num_bytes) + sum(p.nbytes for p in head.method.parameters()),
        kv_bytes_per_token=config.kv_bytes_per_token(kv_cache_dtype),
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        head_dim=_head_dim(config),
    )


def _head_dim(config: ModelConfig) -> float:
    """Numbers of a key that a query meets, and of a value; their mean where they differ: of latents, as they would be
    if each head's were made."""
    latent = config.latent
    return config.head_dim if latent is None else (latent.nope_dim + latent.rope_dim + latent.value_dim) / 2
