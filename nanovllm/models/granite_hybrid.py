"""The feed-forward block of Granite 4 where it has neither experts nor Mamba layers.

Owns its tensor names, and the refusal of what is not there. Invariant: called and loaded as `llama.MLP`.
"""

import torch

from nanovllm.config import ModelConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs, with_joined
from nanovllm.models.llama import MLP


class SharedMLP(MLP):
    """Gate and up projection are one matrix in the checkpoint."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        experts, layer_types = config.extra["num_local_experts"], config.extra["layer_types"]
        if experts != 0 or layer_types is None:  # without layer_types, all are Mamba layers
            raise NotImplementedError(
                f"{config.architecture} with num_local_experts={experts!r} and layer_types={layer_types!r} is not "
                "supported: only models without experts are, whose layer_types are all attention"
            )
        super().__init__(config, layer_idx, dtype, tp, ops)

    def weights(self, name: str) -> WeightSpecs:
        block = f"{name.removesuffix('mlp')}shared_mlp"
        parts = list(self.gate_up_proj.weights(f"{block}.gate", f"{block}.up"))
        yield from with_joined(f"{block}.input_linear", parts)
        yield from self.down_proj.weights(f"{block}.output_linear")
