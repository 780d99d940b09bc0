"""Values of `SamplingParams` that are more than a number or a list: how each is read, and what is wrong with it.

Owns one function for each. Invariant: what it returns is plain, and valid on its own.
"""

from collections.abc import Mapping
from typing import Any

from nanovllm.errors import reject_unknown_options
from nanovllm.plain_lists import read_list
from nanovllm.plain_numbers import read_integer, read_number

# Bounds that keep logits finite in float32: 1e30 times 1000, divided by the smallest temperature, is 1e38.
_MOST_BIAS = 1e30
MOST_REPETITION = 1000.0


def read_form(form: Any) -> Any:
    if form is not None:
        from nanovllm.structured_outputs import StructuredOutputsParams  # a leaf: few requests have a form

        if not isinstance(form, StructuredOutputsParams):
            raise TypeError(f"structured_outputs must be StructuredOutputsParams, got {form!r}")
    return form


def read_capture(capture: Any) -> dict[str, tuple[int | str, ...]] | None:
    if capture is None:
        return None
    if not isinstance(capture, Mapping):
        raise TypeError(f"capture must be a dict like {{'layers': [0, 5]}}, got {capture!r}")
    reject_unknown_options("capture", capture, ["layers"])
    layers: Any = capture.get("layers")
    norm = ("norm",) if isinstance(layers, (list, tuple)) and "norm" in layers else ()
    layers = read_list("capture['layers']", [one for one in layers if one != "norm"] if norm else layers, int) + norm
    if not layers:
        raise ValueError("capture['layers'] is empty; name a layer, or leave capture out")
    return {"layers": tuple(dict.fromkeys(layers))}


def read_logit_bias(biases: Any) -> dict[int, float] | None:
    if biases is None:
        return None
    if not isinstance(biases, Mapping):
        raise TypeError(f"logit_bias must be a dict of token ids to numbers, got {biases!r}")
    checked = {}
    for token_id, bias in biases.items():
        token_id = read_integer("each key of logit_bias", token_id)
        checked[token_id] = read_number(f"logit_bias[{token_id}]", bias)
        if abs(checked[token_id]) > _MOST_BIAS:
            raise ValueError(f"logit_bias[{token_id}] must be in [-{_MOST_BIAS:g}, {_MOST_BIAS:g}], got {bias}")
    return checked
