"""The feed-forward blocks of mixture-of-experts families: what their config.json fields say about a layer's experts.

Owns the reading of those fields and their bounds; the layer is `layers/experts.py`, the decoder around it that of
`llama.py`. Invariant: each function takes the arguments of `llama.MLP` and returns a block that is called like it.
"""

import torch
from torch import nn

from nanovllm.config import ModelConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.experts import ExpertNames, Experts
from nanovllm.layers.ops import Ops
from nanovllm.models.hf_fields import MAX_EXPERTS, flag, integer, items
from nanovllm.models.llama import MLP


def qwen3_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """Experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`; a plain MLP in the others."""
    fields = config.extra
    if fields["use_sliding_window"] and fields["max_window_layers"]:
        raise ValueError(
            f"{config.architecture} with use_sliding_window and max_window_layers={fields['max_window_layers']} is not "
            "supported: transformers gives every layer the window; remove max_window_layers for that"
        )
    step = integer(config.extra, "decoder_sparse_step")
    plain = fields["mlp_only_layers"] and items(
        fields, "mlp_only_layers", lambda layer: isinstance(layer, int), "layers"
    )
    if layer_idx in (plain or ()) or (layer_idx + 1) % step != 0:
        return MLP(config, layer_idx, dtype, tp, ops)
    num_experts = "num_experts" if fields["num_local_experts"] is None else "num_local_experts"
    size = integer(config.extra, "moe_intermediate_size")
    return _experts(config, size, num_experts, flag(fields, "norm_topk_prob"), ExpertNames(), dtype, tp, ops)


def mixtral(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    names = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")
    return _experts(config, config.intermediate_size, "num_local_experts", True, names, dtype, tp, ops)


def olmoe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    renormalize = flag(config.extra, "norm_topk_prob")
    return _experts(config, config.intermediate_size, "num_experts", renormalize, ExpertNames(), dtype, tp, ops)


def _experts(
    config: ModelConfig,
    intermediate_size: int,
    count_name: str,
    renormalize: bool,
    names: ExpertNames,
    dtype: torch.dtype,
    tp: TensorParallel,
    ops: Ops,
) -> Experts:
    num_experts = integer(config.extra, count_name, high=MAX_EXPERTS)
    top_k = integer(config.extra, "num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(f"config.json: num_experts_per_tok={top_k} is more than {count_name}={num_experts}")
    if config.activation != "silu":
        raise ValueError(f"{config.architecture} with another hidden_act than 'silu' is not supported")
    return Experts(config.hidden_size, intermediate_size, num_experts, top_k, renormalize, names, dtype, tp, ops)
