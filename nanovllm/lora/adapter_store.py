"""AdapterStore: the adapters of one model, on one rank: all that are known on the host, a few of them in slots.

Owns the slots' content and which layers have any; which adapter is in which slot is the planner's decision, and travels
with a plan. Invariant: a slot holds one adapter whole, and is filled between two steps of the device's queue.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.batch_invariant_linear import batch_invariant_linear
from nanovllm.layers.embedding import Embedding
from nanovllm.layers.linear import LinearBase, RowParallelLinear
from nanovllm.lora.adapter_files import AdapterWeights, ModuleWeights
from nanovllm.lora.adapter_linear import AdapterLinear, AdapterTable, StepAdapters

_NUM_COMPARED = 16  # columns


class AdapterStore:
    """Wraps the methods of all of the model's linear layers; these must have their weights.

    is_fixed: as in `kernels.lora.AdapterRows`.
    """

    def __init__(self, model: Any, num_slots: int, max_rank: int, tp: TensorParallel, is_fixed: bool = False) -> None:
        self.num_slots, self.max_rank, self.is_fixed = num_slots, max_rank, is_fixed
        self.step = StepAdapters(linear=batch_invariant_linear if is_fixed else F.linear)
        self.generation = 0  # how often a layer was used that no adapter had used before
        self._model, self._tp = model, tp
        self._layers: dict[str, LinearBase] = {}  # by what they are called here
        self._known: dict[bytes, AdapterWeights] = {}
        self._slots: list[bytes | None] = [None] * num_slots
        for path, layer in model.named_modules():
            if isinstance(layer, LinearBase) and layer.spec.names:
                kind = AdapterTable if isinstance(layer, Embedding) else AdapterLinear
                layer.method = kind(layer.method, layer.spec, num_slots, max_rank, self.step)
                self._layers[path] = layer
        self._parts = {
            name: (layer, part) for layer in self._layers.values() for part, name in enumerate(layer.spec.names)
        }
        model.adapters = self

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        methods = map(_method, self._layers.values())
        return sum(stack.nbytes for method in methods for stack in (method.a, method.b, method.b_bias))

    @property
    def has_head(self) -> bool:
        """Does any adapter have the language-model head?"""
        return _method(self._model.lm_head).is_used

    # --- what is known -------------------------------------------------------------------------

    def add(self, weights: AdapterWeights) -> None:
        """Raises ValueError for one that does not fit the model, and then nothing has changed."""
        if weights.rank > self.max_rank:
            raise ValueError(
                f"adapter {weights.name!r} has rank {weights.rank}, and max_lora_rank is {self.max_rank}; raise that"
            )
        for module, tensors in weights.modules.items():
            self._check(weights.name, module, tensors)
        self._known[weights.key] = weights

    def drop(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._known.pop(key, None)

    def _check(self, name: str, module: str, tensors: ModuleWeights) -> None:
        parts = self._parts_of(module)
        if not parts:
            what = "adapters of experts are not supported" if ".experts" in module else "the model has no such layer"
            raise ValueError(f"adapter {name!r} is for {module}, and {what}")
        layer = parts[0][0]
        outputs, inputs = sum(layer.spec.sizes[part] for _, part in parts), layer.spec.in_features
        if isinstance(layer, Embedding):
            outputs, inputs = inputs, outputs
        expected = {"a": (None, inputs), "b": (outputs, None), "bias": (outputs,), "base_bias": (outputs,)}
        for field, shape in expected.items():
            tensor = getattr(tensors, field)
            if tensor is not None and not _fits(tensor, shape):
                wanted = " x ".join("rank" if size is None else str(size) for size in shape)
                raise ValueError(f"adapter {name!r}: {field} of {module} is {tuple(tensor.shape)}, not {wanted}")
        if tensors.base_bias is not None and layer.bias is None:
            raise ValueError(f"adapter {name!r} has a bias for {module}, which has none")
        weight = tensors.base_weight
        if weight is not None and (len(parts) > 1 or len(layer.spec.parts) > 1 or not self._is_own(layer, weight)):
            raise NotImplementedError(
                f"adapter {name!r} brings another matrix for {module}; merge it into the weights, and load those"
            )

    def _is_own(self, layer: LinearBase, weight: Tensor) -> bool:
        """Is this what the layer has? PEFT repeats tables and heads, which training may have changed."""
        table = self._model.embed_tokens if layer is self._model.lm_head and layer.is_tied else layer
        if isinstance(table, Embedding):
            return table.equals(weight)
        (held,), method = layer.spec.parts, _method(layer)
        columns = torch.linspace(0, layer.spec.in_features - 1, _NUM_COMPARED, dtype=torch.int64)
        device = method.a.device
        x = F.one_hot(columns, layer.spec.in_features).to(device, layer.spec.dtype)
        own = method.base.multiply(x, None).T[: weight[held.start : held.stop].shape[0]]
        return torch.equal(own, weight[held.start : held.stop, columns].to(own))

    def _parts_of(self, module: str) -> list[tuple[LinearBase, int]]:
        """The matrices that a module of the checkpoint is: one, or all of a layer that some checkpoints hold as one."""
        if module in self._parts:
            return [self._parts[module]]
        layer = self._layers.get(module.removeprefix("model."))
        return [] if layer is None else [(layer, part) for part in range(len(layer.spec.names))]

    # --- slots ---------------------------------------------------------------------------------

    def hold(self, slot: int, key: bytes) -> None:
        """See to it that the slot holds this adapter, which must be known."""
        if self._slots[slot] == key:
            return
        self._slots[slot] = None  # until it is done
        modules = self._known[key].modules
        for layer in self._layers.values():
            _method(layer).clear(slot)
        self.step.slot = slot
        try:
            specs = dict(self._model.weights())
            if self._model.lm_head.is_tied:
                specs.update(LinearBase.weights(self._model.lm_head))
            for module, tensors in modules.items():
                self._fill(slot, module, tensors, specs)
        finally:
            self.step.slot = None
        self._slots[slot] = key

    def _fill(self, slot: int, module: str, tensors: ModuleWeights, specs: dict[str, Any]) -> None:
        parts = self._parts_of(module)
        layer = parts[0][0]
        method = _method(layer)
        self.generation += method.begin(slot)
        if tensors.a is not None and tensors.b is not None:
            for _, part in parts:
                method.fill_a(slot, part, tensors.a)
            b = tensors.b.float() * tensors.scale
            specs[f"{module}.lora_B"].fill(F.pad(b, (0, method.rank - b.shape[1])))
        if tensors.bias is None and tensors.base_bias is None:
            return
        bias = 0 if tensors.bias is None else tensors.bias.float() * tensors.scale
        if tensors.base_bias is not None:
            bias = bias + tensors.base_bias.float()
        specs[f"{module}.lora_bias"].fill(bias[:, None])  # type: ignore[index]
        for _, part in parts:
            rows = layer.spec.rows(part)
            if tensors.base_bias is not None and layer.bias is not None:
                method.b_bias[slot, rows] -= layer.bias[rows]  # the layer adds it
            if isinstance(layer, RowParallelLinear) and self._tp.rank:
                method.b_bias[slot, rows] = 0  # the ranks' results are summed: rank 0 adds it


def _method(layer: LinearBase) -> AdapterLinear:
    assert isinstance(layer.method, AdapterLinear)
    return layer.method


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return tensor.dim() == len(shape) and all(
        size in (None, got) for got, size in zip(tensor.shape, shape, strict=True)
    )


# What `apply_model` carries to each rank; bound to their first argument they can be pickled.


def add_to(weights: AdapterWeights, model: Any) -> None:
    model.adapters.add(weights)


def drop_from(keys: list[bytes], model: Any) -> None:
    model.adapters.drop(keys)
