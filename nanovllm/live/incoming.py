"""Incoming: new tensors for a model, checked one by one as they come, before any of them is written.

Owns names and checks; `live/model_weights.py` writes. Invariant: what has passed here fills the model without an error,
so an update is either refused while the old weights are whole, or written.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from nanovllm.live.model_weights import Named, Slot, Table
from nanovllm.weights.wrapped import text_name

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Incoming:
    def __init__(self, table: Table) -> None:
        self._table = table
        self._places: dict[tuple[torch.device, int], str] = {}  # where the tensors lie, and which lies there
        self._tied_head: Tensor | None = None
        self.filled: dict[str, Tensor] = {}  # by the parts that the tensors fill

    def add(self, name: Any, tensor: Any) -> list[Named]:
        """The tensor by the name that the model knows it by; none where it is there already by another name.

        Raises TypeError or ValueError that names the tensor, NotImplementedError for one that cannot be written again.
        """
        if not isinstance(name, str):
            raise TypeError(f"weights must be pairs of a name and a tensor, got the name {name!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} must be a torch.Tensor, got {type(tensor).__name__}")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name!r} is spread over devices: give its full_tensor()")
        known = self._known(name)
        if known is None:
            return self._add_tied(tensor) if name == _HEAD and self._table.is_tied else self._refuse(name)
        slot = self._table.slots[known]
        self._check(known, slot, tensor)
        if known == _EMBEDDING and self._tied_head is not None:
            self._check_tied(tensor, self._tied_head)
            self._tied_head = None
            return []
        parts = slot.instead_of or (known,)
        for part in parts:
            if part in self.filled:
                raise ValueError(f"{part!r} comes twice{f', once in {known!r}' if part != known else ''}")
        self._check_place(known, tensor)
        self.filled.update(dict.fromkeys(parts, tensor))
        return [(known, tensor)]

    def _known(self, name: str) -> str | None:
        """As the loader finds them: with or without "model." in front, or inside a multimodal model."""
        for one in (name, f"model.{name}", text_name(name)):
            if one is not None and one in self._table.slots:
                return one
        return None

    def _refuse(self, name: str) -> list[Named]:
        if name.endswith("rotary_emb.inv_freq"):  # a table that nobody reads
            return []
        layer = name.rpartition(".")[0]
        for other, slot in self._table.slots.items():
            if slot.frozen and other.rpartition(".")[0] == layer:
                raise NotImplementedError(f"{name!r} cannot be updated: of this layer's weights, {slot.frozen}")
        raise ValueError(f"{name!r} is no tensor of this model")

    def _check(self, name: str, slot: Slot, tensor: Tensor) -> None:
        if slot.frozen:
            raise NotImplementedError(f"{name!r} cannot be updated: of this layer's weights, {slot.frozen}")
        if tuple(tensor.shape) != slot.shape and not tensor.numel() == prod(slot.shape) == 1:
            raise ValueError(f"{name!r} has shape {tuple(tensor.shape)}, and {slot.shape} in this model")
        if tensor.dtype not in slot.dtypes:
            dtype, *expected = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *slot.dtypes))
            raise ValueError(f"{name!r} has dtype {dtype}, and must have {' or '.join(expected)}")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"{name!r} must be a dense tensor with values")

    def _check_place(self, name: str, tensor: Tensor) -> None:
        """Tensors are read when all have come, so one that is lent again for another name would be read wrongly."""
        if not tensor.numel():
            return
        place = tensor.device, tensor.data_ptr()
        other = self._places.setdefault(place, name)
        if other != name:
            raise ValueError(f"{name!r} lies where {other!r} did, and both are read at the end: give a copy of each")

    def _add_tied(self, head: Tensor) -> list[Named]:
        embedding = self.filled.get(_EMBEDDING)
        if embedding is not None:
            self._check_tied(embedding, head)
            return []
        self._check(_HEAD, self._table.slots[_EMBEDDING], head)
        self._tied_head = head
        self.filled[_EMBEDDING] = head
        return [(_EMBEDDING, head)]

    def _check_tied(self, embedding: Tensor, head: Tensor) -> None:
        is_same = embedding.data_ptr() == head.data_ptr() and embedding.device == head.device
        if not is_same and not torch.equal(embedding, head.to(embedding.device)):
            raise ValueError(f"{_HEAD!r} differs from {_EMBEDDING!r}, which this model's config.json ties it to")
