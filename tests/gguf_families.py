"""What llama.cpp's converter does to tensors of families that are laid out in a way of their own."""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, np.ndarray]
PACKED_BYTES = np.dtype(np.uint8)  # of a tensor that is in MXFP4's blocks already


# --- gpt-oss -----------------------------------------------------------------------


def with_gpt_oss(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Gate and up of experts apart, and outputs as rows; MXFP4 with the exponent before its codes."""
    converted: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, part = name.partition(".experts.")
        if part.endswith("_blocks"):
            tensor = _mxfp4(tensor, tensors[name.replace("_blocks", "_scales")])
        elif part in ("gate_up_proj", "down_proj"):
            tensor = tensor.swapaxes(1, 2)
        ending = "bias" if part.endswith("_bias") else "weight"
        if part.startswith("gate_up_proj") and not part.endswith("_scales"):
            for first, projection in enumerate(("gate", "up")):
                half = np.ascontiguousarray(tensor[:, first::2])
                converted[f"{layer}.experts.{projection}_proj.{ending}"] = half
        elif part.startswith("down_proj") and not part.endswith("_scales"):
            converted[f"{layer}.experts.down_proj.{ending}"] = np.ascontiguousarray(tensor)
        elif not part:
            converted[f"{name}.weight" if name.endswith("sinks") else name] = tensor
    return converted


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    inputs = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*blocks.shape[:-1], 32)
    codes = inputs[..., :16] | inputs[..., 16:] << 4
    return np.concatenate((scales[..., None], codes), axis=-1).reshape(*blocks.shape[:2], -1)


def add_gpt_oss(writer: gguf.GGUFWriter, hf: Mapping[str, Any]) -> None:
    writer.add_sliding_window(hf["sliding_window"])
    writer.add_expert_feed_forward_length(hf["intermediate_size"])
