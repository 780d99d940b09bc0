"""What a checkpoint's quantization_config, or the option `quantization`, says about each layer.

Owns the choice of the format by its name, and the rules that fused layers keep. Invariant: what is not known is refused
by name, before any weight is read.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from nanovllm.layers.linear_method import LinearMethod, LinearSpec
from nanovllm.quantization.parts_linear import PartsLinear

MakeLinear = Callable[[LinearSpec], LinearMethod]


class Scheme(Protocol):
    def method_of(self, name: str) -> MakeLinear | None:
        """How the layer of this name is held; equal for layers that are held alike, None for one that is dense."""
        ...


def read_scheme(fields: Mapping[str, Any]) -> Scheme:
    """fields: `quantization_config` of a config.json. Raises NotImplementedError for what is not known."""
    from nanovllm.quantization import awq, compressed_tensors, fp8, gguf, gptq, modelopt, mxfp4

    readers: dict[str, Callable[[Mapping[str, Any]], Scheme]] = {
        "awq": awq.AwqScheme,
        "compressed-tensors": compressed_tensors.CompressedTensorsScheme,
        "fp8": fp8.Fp8Scheme,
        "gguf": gguf.GgufScheme,
        "gptq": gptq.GptqScheme,
        "modelopt": modelopt.ModelOptScheme,
        "modelopt_fp4": modelopt.ModelOptScheme,
        "mxfp4": mxfp4.Mxfp4Scheme,
    }
    method = fields.get("quant_method")
    if method not in readers:
        raise NotImplementedError(
            f"quantization_config: quant_method={method!r} is not supported; supported are {', '.join(readers)}"
        )
    return readers[method](fields)


def quantized_by(scheme: Scheme, dense: MakeLinear) -> MakeLinear:
    """The linear method of each layer; dense: of those that are not quantized."""

    def make(spec: LinearSpec) -> LinearMethod:
        methods = [scheme.method_of(name) or dense for name in spec.names]
        return methods[0](spec) if len(set(methods)) == 1 else PartsLinear(spec, methods)

    return make


def read_fields(fields: Mapping[str, Any], where: str, known: Mapping[str, Iterable[Any] | None]) -> None:
    """Raises NotImplementedError for a field that is not known, or has none of the values that are.

    known: by name, the values; None for any. A field that is null, or empty, asks for nothing.
    """
    for name, value in fields.items():
        if name not in known:
            if value not in (None, False, [], {}):
                raise NotImplementedError(f"{where}: {name}={value!r} is not supported")
        elif (values := known[name]) is not None and value not in tuple(values):
            raise NotImplementedError(f"{where}: {name}={value!r} is not supported")


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Is the layer, or a module around it, in the list? A pattern is a part of the dotted name, or "re:" and a regular
    expression for all of it from the start."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif f".{pattern}." in f".{name}.":
            return True
    return False
