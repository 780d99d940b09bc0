"""GPTQ checkpoints (Frantar et al., 2022), as AutoGPTQ and GPTQModel write them: 4 or 8 bits, groups of inputs.

Owns the reading of their config and the layout of their tensors: inputs are rows, of which a word holds eight (or
four), and `g_idx` names the group of each input. Files of the first version store zero points less one.
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

_ONES = {4: 0x11111111, 8: 0x01010101}  # by bits: one in every number of a word
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_WITHOUT_EFFECT = (  # on what the tensors mean, but for those that are read below
    "quant_method group_size desc_act sym lm_head damp_percent damp_auto_increment static_groups true_sequential meta "
    "model_name_or_path model_file_base_name model_seqlen block_name_to_quantize cache_block_outputs dataset tokenizer "
    "batch_size pad_token_id use_cuda_fp16 exllama_config max_input_length use_exllama backend quantizer mse "
    "offload_to_disk act_group_aware module_name_preceding_first_block"
).split()


class GptqScheme:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        versions = ("gptq", "gptq_v2")
        known: dict[str, tuple[Any, ...]] = {
            "bits": (4, 8),
            "checkpoint_format": versions,
            "format": versions,
            "method": ("gptq",),
            "pack_dtype": ("int32",),
        }
        read_fields(fields, "quantization_config of GPTQ", known | dict.fromkeys(_WITHOUT_EFFECT))
        group_size = fields.get("group_size", 128)
        version = fields.get("checkpoint_format") or fields.get("format") or "gptq"
        self._method = Gptq(
            fields["bits"], None if group_size == -1 else group_size, bool(fields.get("desc_act")), version == "gptq"
        )
        self._dense = ("embed_tokens",) if fields.get("lm_head") else ("embed_tokens", "lm_head")

    def method_of(self, name: str) -> "Gptq | None":
        return None if is_named(name, self._dense) else self._method


@dataclass(frozen=True)
class Gptq:
    bits: int
    group_size: int | None
    has_order: bool
    is_less_one: bool

    def __call__(self, spec: LinearSpec) -> QuantizedLinear:
        return GptqLinear(spec, self)


class GptqLinear(QuantizedLinear):
    def __init__(self, spec: LinearSpec, form: Gptq) -> None:
        super().__init__(spec, f"int{form.bits}", form.group_size, has_zeros=True, has_order=form.has_order)
        self.form = form

    def weights(self, part: int) -> Iterator[tuple[str, WeightSpec]]:
        size, inputs, groups = self.spec.sizes[part], self.spec.in_features, self.num_groups
        words, per_word = (torch.int32,), 32 // self.form.bits
        yield self.weight_spec("qweight", part, (inputs // per_word, size), words, self._fill_words, outputs=1)
        yield self.weight_spec("qzeros", part, (groups, size // per_word), words, self._fill_zeros, outputs=1)
        yield self.weight_spec(
            "scales", part, (groups, size), _FLOATS, lambda part, t: self.fill_scale(part, t.t()), outputs=1
        )
        in_order = self.groups_of_neighbours()
        yield self.weight_spec("g_idx", part, (inputs,), words, self._fill_groups, stand_in=in_order)

    def _fill_words(self, part: int, words: Tensor) -> None:
        values = signed(unpack_words(words, self.form.bits, dim=0), self.form.bits).t()
        self.fill_codes(part, pack_int4(values) if self.form.bits == 4 else values)

    def _fill_zeros(self, part: int, words: Tensor) -> None:
        if self.form.is_less_one:
            words = words + _ONES[self.form.bits]  # of words, as they were taken off: a zero had borrowed
        self.fill_zero(part, signed(unpack_words(words, self.form.bits, dim=1), self.form.bits).t())

    def _fill_groups(self, part: int, group_of_input: Tensor) -> None:
        if self.form.has_order:
            self.fill_groups(part, group_of_input)
        elif not group_of_input.is_meta and not torch.equal(group_of_input.cpu().long(), self.groups_of_neighbours()):
            name = f"{self.spec.names[part]}.g_idx"
            raise ValueError(f"{name!r} has groups in another order, but quantization_config says desc_act=False")
