"""The feed-forward blocks of mixture-of-experts families: what their config.json fields say about a layer's experts.

Owns the reading of those fields and their bounds, which layers have experts, and the tensors' names; the layer is
`layers/experts.py`, how it chooses `kernels/routing.py`, the decoder around it that of `llama.py`. Invariant: each
function takes the arguments of `llama.MLP` and returns a block that is called like it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import Gate
from nanovllm.kernels.routing import Routing
from nanovllm.layers.experts import ExpertNames, Experts, StackedNames
from nanovllm.layers.ops import Ops
from nanovllm.layers.shared_expert import SharedExpert, SharedExpertNames
from nanovllm.model_config import ModelConfig
from nanovllm.models.hf_fields import MAX_EXPERTS, MAX_SIZE, flag, integer, items, number
from nanovllm.models.lfm2 import Lfm2MLP
from nanovllm.models.llama import MLP

MIXTRAL_NAMES = ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2")
_GRANITE_NAMES = ExpertNames(
    "block_sparse_moe",
    router="router.layer",
    stacked=tuple(
        StackedNames(*(f"block_sparse_moe.{name}" for name in names))
        for names in (
            ("input_linear.weight", "output_linear.weight", "router.layer.weight"),
            ("experts.gate_up_proj", "experts.down_proj", "router.weight"),
        )
    ),
)
_HUNYUAN_NAMES = ExpertNames(router="gate.wg", stacked=(StackedNames(router="mlp.gate.wg.weight"),))
_ERNIE_NAMES = ExpertNames(
    bias="moe_statics.e_score_correction_bias",
    bias_is_row=True,
    stacked=(StackedNames(bias="mlp.gate.moe_statics.e_score_correction_bias"),),
)

_LFM2_NAMES = ExpertNames(
    "feed_forward",
    *("w1", "w3", "w2"),
    bias="expert_bias",
    stacked=(
        StackedNames(
            *("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
            *("feed_forward.gate.weight", "feed_forward.expert_bias"),
        ),
    ),
)


def qwen3_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """Experts in every `decoder_sparse_step`-th layer but those of `mlp_only_layers`; a plain MLP in the others."""
    if not _is_sparse_in_qwen(config, layer_idx):
        return MLP(config, layer_idx, dtype, tp, ops)
    fields = config.extra
    count_name = "num_experts" if fields["num_local_experts"] is None else "num_local_experts"
    size = integer(fields, "moe_intermediate_size")
    routing = Routing(integer(fields, "num_experts_per_tok"), flag(fields, "norm_topk_prob"))
    return _experts(config, size, count_name, routing, ExpertNames(), dtype, tp, ops)


def qwen2_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """As `qwen3_moe`, and a shared expert with a gate of its own."""
    fields = config.extra
    if not _is_sparse_in_qwen(config, layer_idx):
        return MLP(config, layer_idx, dtype, tp, ops)
    routing = Routing(integer(fields, "num_experts_per_tok"), flag(fields, "norm_topk_prob"))
    shared = SharedExpert(
        config.hidden_size,
        integer(fields, "shared_expert_intermediate_size"),
        config.mlp_bias,
        SharedExpertNames("mlp.shared_expert"),
        dtype,
        tp,
        ops,
        gate="mlp.shared_expert_gate",
    )
    size = integer(fields, "moe_intermediate_size")
    return _experts(config, size, "num_experts", routing, ExpertNames(), dtype, tp, ops, shared)


def mixtral(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    routing = Routing(integer(config.extra, "num_experts_per_tok"))
    return _experts(config, config.intermediate_size, "num_local_experts", routing, MIXTRAL_NAMES, dtype, tp, ops)


def olmoe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    routing = Routing(integer(config.extra, "num_experts_per_tok"), flag(config.extra, "norm_topk_prob"))
    return _experts(config, config.intermediate_size, "num_experts", routing, ExpertNames(), dtype, tp, ops)


def granite_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """With a shared expert if `shared_intermediate_size` is not 0."""
    fields = config.extra
    size = integer(fields, "shared_intermediate_size", low=0) if "shared_intermediate_size" in fields else 0
    names = SharedExpertNames("shared_mlp", gate_up="input_linear", down="output_linear")
    shared = SharedExpert(config.hidden_size, size, False, names, dtype, tp, ops) if size else None
    routing = Routing(integer(fields, "num_experts_per_tok"))
    return _experts(
        config, config.intermediate_size, "num_local_experts", routing, _GRANITE_NAMES, dtype, tp, ops, shared
    )


def deepseek_moe(
    config: ModelConfig,
    layer_idx: int,
    dtype: torch.dtype,
    tp: TensorParallel,
    ops: Ops,
    names: ExpertNames = ExpertNames(),  # noqa: B008  (plain data)
    dense: type[MLP] = MLP,
) -> nn.Module:
    """As in DeepSeek-V3: sigmoid scores with a bias, groups, shared experts; in the first layers `dense`."""
    fields = config.extra
    for name, supported in (("scoring_func", ("sigmoid", "noaux_tc")), ("topk_method", ("noaux_tc",))):
        if fields[name] not in supported:
            raise ValueError(f"config.json of {config.architecture}: {name}={fields[name]!r} is not supported")
    if layer_idx < integer(fields, "first_k_dense_replace", low=0):
        return dense(config, layer_idx, dtype, tp, ops)
    size = integer(fields, "moe_intermediate_size")
    shared = _shared_experts(config, size, "n_shared_experts", dtype, tp, ops, names.block)
    return _experts(config, size, "n_routed_experts", deepseek_routing(fields), names, dtype, tp, ops, shared)


def deepseek_v2_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """As in DeepSeek-V2: softmax scores, which weigh as they are; a group, if there are any, is as good as its best."""
    fields = config.extra
    for name, supported in (("scoring_func", "softmax"), ("norm_topk_prob", False)):
        if fields[name] != supported:
            raise ValueError(f"config.json of {config.architecture}: {name}={fields[name]!r} is not supported")
    if layer_idx < integer(fields, "first_k_dense_replace", low=0):
        return MLP(config, layer_idx, dtype, tp, ops)
    groups: dict[str, int] = {}
    if fields["topk_method"] == "group_limited_greedy":
        groups = _expert_groups(fields, judges=1)
    elif fields["topk_method"] != "greedy":
        raise ValueError(
            f"config.json of {config.architecture}: topk_method={fields['topk_method']!r} is not supported; supported "
            "are 'greedy' and 'group_limited_greedy'"
        )
    routing = Routing(
        integer(fields, "num_experts_per_tok"),
        renormalize=False,
        scores="softmax",
        has_bias=False,
        scale=number(fields, "routed_scaling_factor"),
        **groups,
    )
    size = integer(fields, "moe_intermediate_size")
    shared = _shared_experts(config, size, "n_shared_experts", dtype, tp, ops)
    return _experts(config, size, "n_routed_experts", routing, ExpertNames(), dtype, tp, ops, shared)


def ernie_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """Experts in every `moe_layer_interval`-th layer between a start and an end, of which -1 is the last layer."""
    fields = config.extra
    start = integer(fields, "moe_layer_start_index", low=0)
    end = integer(fields, "moe_layer_end_index", low=-1)
    is_inside = start <= layer_idx <= (config.num_layers if end == -1 else end)
    if not is_inside or (layer_idx + 1) % integer(fields, "moe_layer_interval"):
        return MLP(config, layer_idx, dtype, tp, ops)
    routing = Routing(integer(fields, "moe_k"), has_bias=True, least_sum=number(fields, "moe_norm_min", at_least=0.0))
    size = integer(fields, "moe_intermediate_size")
    shared = _shared_experts(config, size, "moe_num_shared_experts", dtype, tp, ops)
    return _experts(config, size, "moe_num_experts", routing, _ERNIE_NAMES, dtype, tp, ops, shared)


def hunyuan_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """The shared expert is as wide as one of the others. `moe_topk` may be a list with one number a layer."""
    top_k, size = config.extra["moe_topk"], config.intermediate_size
    if isinstance(top_k, list) and len(top_k) == config.num_layers:
        top_k = top_k[layer_idx]
    routing = Routing(integer({"moe_topk": top_k}, "moe_topk"))
    names = SharedExpertNames("mlp.shared_mlp")
    shared = SharedExpert(config.hidden_size, size, config.mlp_bias, names, dtype, tp, ops)
    return _experts(config, size, "num_experts", routing, _HUNYUAN_NAMES, dtype, tp, ops, shared)


def lfm2_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """Experts in all layers but the first ones."""
    fields = config.extra
    if layer_idx < integer(fields, "num_dense_layers", low=0):
        return Lfm2MLP(config, layer_idx, dtype, tp, ops)
    routing = Routing(
        integer(fields, "num_experts_per_tok"),
        flag(fields, "norm_topk_prob"),
        scores="sigmoid",
        has_bias=flag(fields, "use_expert_bias"),
        scale=number(fields, "routed_scaling_factor"),
        least_sum=1e-6,
    )
    size = integer(fields, "moe_intermediate_size")
    return _experts(config, size, "num_experts", routing, _LFM2_NAMES, dtype, tp, ops)


def gpt_oss_moe(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """Biases everywhere, and a gate that is clamped."""
    fields = config.extra
    routing = Routing(integer(fields, "num_experts_per_tok"))
    gate = Gate("clamped", number(fields, "swiglu_alpha"), number(fields, "swiglu_limit"))
    size, names = config.intermediate_size, ExpertNames(router="router", stacked=())
    return _experts(config, size, "num_local_experts", routing, names, dtype, tp, ops, gate=gate, is_interleaved=True)


def _is_sparse_in_qwen(config: ModelConfig, layer_idx: int) -> bool:
    fields = config.extra
    if fields["use_sliding_window"] and fields["max_window_layers"] and fields.get("layer_types") is None:
        raise ValueError(
            f"{config.architecture} with use_sliding_window and max_window_layers={fields['max_window_layers']} is not "
            "supported: transformers gives every layer the window; remove max_window_layers for that"
        )
    plain = fields["mlp_only_layers"] and items(
        fields, "mlp_only_layers", lambda layer: isinstance(layer, int), "layers"
    )
    return layer_idx not in (plain or ()) and (layer_idx + 1) % integer(fields, "decoder_sparse_step") == 0


def deepseek_routing(fields: Mapping[str, Any]) -> Routing:
    """DeepSeek-V3's."""
    return Routing(
        integer(fields, "num_experts_per_tok"),
        flag(fields, "norm_topk_prob"),
        scores="sigmoid",
        has_bias=True,
        scale=number(fields, "routed_scaling_factor"),
        least_sum=1e-20,
        **_expert_groups(fields),
    )


def _expert_groups(fields: Mapping[str, Any], judges: int = 2) -> dict[str, int]:
    """Arguments of `Routing`. judges: experts that say how good a group is."""
    num_experts = integer(fields, "n_routed_experts", high=MAX_EXPERTS)
    top_k = integer(fields, "num_experts_per_tok")
    num_groups, top_groups = integer(fields, "n_group"), integer(fields, "topk_group")
    size = num_experts // num_groups
    if top_groups > num_groups or num_experts % num_groups or size < judges or top_k > top_groups * size:
        raise ValueError(
            f"config.json: n_group={num_groups} with topk_group={top_groups} does not fit "
            f"n_routed_experts={num_experts} and num_experts_per_tok={top_k}"
        )
    return {"num_groups": num_groups, "top_groups": top_groups, "group_judges": judges}


def _shared_experts(
    config: ModelConfig,
    size: int,
    count_name: str,
    dtype: torch.dtype,
    tp: TensorParallel,
    ops: Ops,
    block: str = "mlp",
) -> SharedExpert | None:
    """Several are one as wide as all of them. block: what the layer of experts is called."""
    if config.extra[count_name] is None:
        return None
    width = size * integer(config.extra, count_name, low=0, high=MAX_SIZE // size)
    names = SharedExpertNames(f"{block}.shared_experts")
    return SharedExpert(config.hidden_size, width, config.mlp_bias, names, dtype, tp, ops) if width else None


def _experts(
    config: ModelConfig,
    intermediate_size: int,
    count_name: str,
    routing: Routing,
    names: ExpertNames,
    dtype: torch.dtype,
    tp: TensorParallel,
    ops: Ops,
    shared: SharedExpert | None = None,
    **more: Any,
) -> Experts:
    num_experts = integer(config.extra, count_name, high=MAX_EXPERTS)
    if routing.top_k > num_experts:
        raise ValueError(f"config.json: num_experts_per_tok={routing.top_k} is more than {count_name}={num_experts}")
    if config.activation != "silu":
        raise ValueError(f"{config.architecture} with another hidden_act than 'silu' is not supported")
    return Experts(config.hidden_size, intermediate_size, num_experts, routing, names, dtype, tp, ops, shared, **more)
