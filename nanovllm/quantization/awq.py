"""AWQ checkpoints (Lin et al., 2023), as AutoAWQ writes them: 4 bits, groups of inputs with scale and zero point.

Owns the reading of their config and the layout of their tensors: inputs are rows, and a word holds eight outputs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.quantized_linear import pack_int4
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.weight_specs import WeightSpec
from nanovllm.quantization.quantized_linear import QuantizedLinear
from nanovllm.quantization.scheme import is_named, read_fields
from nanovllm.quantization.words import signed, unpack_words

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, from its lowest bits on
_HALVES = (torch.float16, torch.bfloat16, torch.float32)


class AwqScheme:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        known: dict[str, tuple[Any, ...]] = {
            "bits": (4,),
            "zero_point": (True,),
            "version": ("gemm", "GEMM"),
            "do_fuse": (False,),
            "backend": ("autoawq", "auto", None),
        }
        others = "quant_method", "group_size", "modules_to_not_convert", "modules_to_fuse", "fuse_max_seq_len"
        read_fields(fields, "quantization_config of AWQ", known | dict.fromkeys((*others, "exllama_config")))
        group_size = fields.get("group_size", 128)
        self._method = Awq(None if group_size == -1 else group_size)
        self._dense = ("lm_head", "embed_tokens", *(fields.get("modules_to_not_convert") or ()))

    def method_of(self, name: str) -> "Awq | None":
        return None if is_named(name, self._dense) else self._method


@dataclass(frozen=True)
class Awq:
    group_size: int | None

    def __call__(self, spec: LinearSpec) -> QuantizedLinear:
        return AwqLinear(spec, "int4", self.group_size, has_zeros=True)


class AwqLinear(QuantizedLinear):
    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        size, inputs, groups = self.spec.sizes[part], self.spec.in_features, self.num_groups
        words = (torch.int32,)
        yield self.weight_spec("qweight", part, (inputs, size // 8), words, self._fill_words, outputs=1)
        yield self.weight_spec("qzeros", part, (groups, size // 8), words, self._fill_zeros, outputs=1)
        yield self.weight_spec(
            "scales", part, (groups, size), _HALVES, lambda part, t: self.fill_scale(part, t.t()), outputs=1
        )

    def _fill_words(self, part: int, words: Tensor) -> None:
        self.fill_codes(part, pack_int4(_unpack(words)))

    def _fill_zeros(self, part: int, words: Tensor) -> None:
        self.fill_zero(part, _unpack(words))


def _unpack(words: Tensor) -> Tensor:
    """[rows, outputs / 8] -> int8 [outputs, rows]."""
    in_words = unpack_words(words, 4, dim=1).unflatten(1, (-1, 8))
    place = torch.tensor(_ORDER, device=words.device).argsort()  # of each output in its word
    return signed(in_words[:, :, place].flatten(1), 4).t()
