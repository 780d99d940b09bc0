"""A transformers model of what a GGUF file holds, for files that transformers itself cannot read.

Owns what transformers is told. Invariant: transformers computes with config and tensors as this package reads them, so
the comparison is of the computation, and of the reading only as far as a wrong one makes no sense.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from nanovllm.weights.checkpoint import open_checkpoint

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # defaults of a family may be beyond a vocabulary


def load_as_read_here(path: Path, dtype: torch.dtype) -> Any:
    """Raises NotImplementedError if transformers does not know an architecture or a tensor by this name."""
    checkpoint = open_checkpoint(str(path), load_format="gguf", revision=None)
    (architecture,) = checkpoint.config["architectures"]
    fields = {name: value for name, value in checkpoint.config.items() if value is not None and name != "dtype"}
    fields = {**dict.fromkeys(_TOKENS), **fields}
    if not hasattr(transformers, architecture):
        raise NotImplementedError(f"{path}: the installed transformers has no {architecture}: update it")
    model, report = getattr(transformers, architecture).from_pretrained(
        None,
        config=transformers.AutoConfig.for_model(fields.pop("model_type"), **fields),
        state_dict=_joined(dict(checkpoint.tensors(dtype)), checkpoint.config),
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise NotImplementedError(
            f"{path}: transformers has {missing[0]} and {len(missing) - 1} more in one tensor, which are apart here; "
            "compare the model's safetensors"
        )
    return model


def _joined(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """What transformers has in one tensor: parts of Granite's MLPs and experts, and of Qwen3-Next's delta nets."""
    for gate in [name for name in tensors if ".shared_mlp.gate" in name]:
        block, up = gate.partition(".gate")[0], gate.replace(".gate", ".up")
        tensors[f"{block}.input_linear.weight"] = torch.cat((tensors.pop(gate), tensors.pop(up)))
    for first in [name for name in tensors if name.endswith(".block_sparse_moe.experts.0.gate_proj.weight")]:
        experts = first.removesuffix(".0.gate_proj.weight")
        gates, ups, downs = (
            torch.stack([tensors.pop(f"{experts}.{i}.{part}_proj.weight") for i in range(config["num_local_experts"])])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{experts}.gate_up_proj": torch.cat((gates, ups), dim=1), f"{experts}.down_proj": downs}
    if config["architectures"] == ["Qwen3NextForCausalLM"]:  # one key head after another
        heads, keys = config["linear_num_key_heads"], config["linear_num_key_heads"] * config["linear_key_head_dim"]
        for name in [name for name in tensors if name.endswith(".in_proj_qkv.weight")]:
            qkv, z = tensors.pop(name), tensors.pop(name.replace("_qkv", "_z"))
            parts = (*qkv.split((keys, keys, len(qkv) - 2 * keys)), z)
            by_head = torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1)
            tensors[name.replace("_qkv", "_qkvz")] = by_head.flatten(0, 1)
    return tensors
