"""Fill a model from a checkpoint, strictly: every tensor used once, every parameter written.

Owns the matching of names and shapes; the layers know how a tensor maps to their weights. Invariant: either the whole
model is loaded or an error names what is missing, unexpected or misshapen.
"""

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from nanovllm.layers.weight_specs import WeightSpec

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_weights(
    model: Any, tensors: Iterable[tuple[str, Tensor]], on_filled: Callable[[int], object] = lambda count: None
) -> None:
    """model: has `weights()`; tensors: (checkpoint name, whole tensor). Raises ValueError naming the tensors at fault.

    Names may lack the "model." in front, as in checkpoints of a model without its head; a tied matrix may go by either
    of its names, or both. With model and tensors on the meta device it is the same check, without memory or numbers.
    on_filled: told how many more specs are filled; in all, those that are not `instead_of` others.
    """
    specs: dict[str, WeightSpec] = dict(model.weights())
    filled: set[str] = set()
    tied_head: Tensor | None = None
    for given_name, tensor in tensors:
        name = given_name if given_name in specs or f"model.{given_name}" not in specs else f"model.{given_name}"
        if name in specs:
            on_filled(_fill(specs[name], name, tensor, filled))
        elif name == _HEAD and model.lm_head.is_tied:
            tied_head = tensor
        elif not name.endswith("rotary_emb.inv_freq"):  # a table that old checkpoints carry and nobody reads
            raise ValueError(f"the checkpoint holds {name!r}, which this model does not have")
    if tied_head is not None and _EMBEDDING in specs and _EMBEDDING not in filled:
        on_filled(_fill(specs[_EMBEDDING], _EMBEDDING, tied_head, filled))
        tied_head = None
    missing = [name for name, spec in specs.items() if not spec.instead_of and name not in filled]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"the checkpoint has no tensor {', '.join(map(repr, missing[:5]))}{more}")
    if tied_head is not None and not tied_head.is_meta and not model.embed_tokens.equals(tied_head):
        raise ValueError("the config ties the head to the embedding, but the checkpoint's 'lm_head.weight' differs")


def _fill(spec: WeightSpec, name: str, tensor: Tensor, filled: set[str]) -> int:
    """Check and fill one spec, and note in `filled` which specs now are; returns how many these are."""
    parts = spec.instead_of or (name,)
    for part in parts:
        if part in filled:
            raise ValueError(f"the checkpoint holds {part!r} twice{f', once in {name!r}' if part != name else ''}")
    if tuple(tensor.shape) != spec.shape and not tensor.numel() == prod(spec.shape) == 1:
        raise ValueError(f"{name!r} has shape {tuple(tensor.shape)} in the checkpoint; the config says {spec.shape}")
    if tensor.dtype not in spec.dtypes:
        dtype, *expected = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *spec.dtypes))
        raise ValueError(
            f"{name!r} has dtype {dtype} in the checkpoint; its config.json, which says how weights are quantized, "
            f"lets it have {' or '.join(expected)}"
        )
    if spec.place is None or tensor.data_ptr() != spec.place.data_ptr():
        spec.fill(tensor)
    filled.update(parts)
    return len(parts)


def places(specs: Mapping[str, WeightSpec]) -> dict[str, Tensor]:
    """By name: parameters on the CPU that a checkpoint may write its numbers to, where it has to compute them."""
    return {
        name: spec.place
        for name, spec in specs.items()
        if spec.place is not None and spec.place.is_cpu and not spec.instead_of
    }


def fill_random(model: Any, seed: int) -> None:
    """Random weights of a sane scale, for load_format="dummy": norms 1, biases 0, matrices with variance 1 / inputs."""
    specs = dict(model.weights())
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, spec in specs.items():
        if spec.instead_of:
            continue
        if spec.stand_in is not None:
            spec.fill(spec.stand_in(generator))
        elif len(spec.shape) == 1:
            spec.fill(torch.full(spec.shape, 0.0 if name.endswith("bias") else 1.0))
        else:
            spec.fill(torch.randn(spec.shape, generator=generator, device=device) * spec.shape[1] ** -0.5)
