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
from nanovllm.layers.weight_specs import WeightSpec
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
        self._layers: dict[AdapterLinear, LinearBase] = {}
        self._known: dict[bytes, AdapterWeights] = {}
        self._slots: list[bytes | None] = [None] * num_slots
        for layer in model.modules():
            if isinstance(layer, LinearBase) and layer.takes_adapters and layer.spec.names:
                kind = AdapterTable if isinstance(layer, Embedding) else AdapterLinear
                layer.method = kind(layer.method, layer.spec, num_slots, max_rank, self.step)
                self._layers[layer.method] = layer
        self._places: dict[int, dict[str, WeightSpec]] = {}  # by slot: a model takes milliseconds to list them
        self._parts = self._find_parts()
        self._places.clear()  # the stacks may be put elsewhere yet
        model.adapters = self

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return sum(stack.nbytes for stack in self.stacks)

    @property
    def stacks(self) -> list[Tensor]:
        """The memory of all slots."""
        return [stack for method in self._layers for stack in (method.a, method.b, method.b_bias)]

    @property
    def has_head(self) -> bool:
        """Does any adapter have the language-model head?"""
        return bool(self._model.lm_head.method.is_used)

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
            none = "the model has no layer of that name that takes one"
            what = "adapters of experts are not supported" if ".experts" in module else none
            raise ValueError(f"adapter {name!r} is for {module}, and {what}")
        layer = self._layers[parts[0][0]]
        outputs, inputs = sum(layer.spec.sizes[part] for _, part in parts), layer.spec.in_features
        if isinstance(layer, Embedding):
            outputs, inputs = inputs, outputs
            if tensors.bias is not None:
                raise ValueError(f"adapter {name!r} has a bias for {module}, a table, which takes none")
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
        (held,), inputs, method = layer.spec.parts, layer.spec.inputs, layer.method
        assert isinstance(method, AdapterLinear)
        columns = torch.linspace(0, len(inputs) - 1, _NUM_COMPARED, dtype=torch.int64)
        x = F.one_hot(columns, len(inputs)).to(method.a)
        theirs = weight[held.start : held.stop, inputs.start + columns]
        own = method.base.multiply(x, None).T[: len(theirs)]
        return torch.equal(own, theirs.to(own))

    def _parts_of(self, module: str) -> list[tuple[AdapterLinear, int]]:
        """The matrices that a module of the checkpoint is: one, or those of a layer that some checkpoints hold as one.

        Names may lack the "model." in front, as those of a model without its head do.
        """
        return self._parts.get(module) or self._parts.get(f"model.{module}", [])

    def _find_parts(self) -> dict[str, list[tuple[AdapterLinear, int]]]:
        """By module, seen by filling a slot with zeros: only a model itself knows what its checkpoints call a layer."""
        parts = {}
        for name, spec in self._specs(0).items():
            if name.endswith(".lora_B"):
                self.step.filled.clear()
                spec.fill(torch.zeros(spec.shape, device="cpu"))
                parts[name.removesuffix(".lora_B")] = list(self.step.filled)
        return parts

    def _specs(self, slot: int) -> dict[str, WeightSpec]:
        """The places of an adapter's tensors in a slot, by the names of their modules and "lora_B" or "lora_bias"."""
        if slot in self._places:
            return self._places[slot]
        self.step.slot = slot
        try:
            specs = dict(self._model.weights())
            if self._model.lm_head.is_tied:
                specs.update(LinearBase.weights(self._model.lm_head))
        finally:
            self.step.slot = None
        self._places[slot] = {name: spec for name, spec in specs.items() if name.endswith((".lora_B", ".lora_bias"))}
        return self._places[slot]

    # --- slots ---------------------------------------------------------------------------------

    def hold(self, slot: int, key: bytes) -> None:
        """See to it that the slot holds this adapter, which must be known."""
        if self._slots[slot] == key:
            return
        self._slots[slot] = None  # until it is done
        modules = self._known[key].modules
        for method in self._layers:
            method.clear(slot)
        specs = self._specs(slot)
        for module, tensors in modules.items():
            self._fill(slot, module if module in self._parts else f"model.{module}", tensors, specs)
        self.step.filled.clear()  # which `_find_parts` alone asks for
        self._slots[slot] = key

    def forget_slots(self) -> None:
        """Their memory is about to be given back, and reads as zero once it is there again."""
        self._slots = [None] * self.num_slots
        for method in self._layers:
            method.forget()

    def _fill(self, slot: int, module: str, tensors: ModuleWeights, specs: dict[str, WeightSpec]) -> None:
        parts = self._parts[module]
        method = parts[0][0]
        layer = self._layers[method]
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


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return tensor.dim() == len(shape) and all(
        size in (None, got) for got, size in zip(tensor.shape, shape, strict=True)
    )


# What `apply_model` carries to each rank; bound to their first argument they can be pickled.


def add_to(weights: AdapterWeights, model: Any) -> None:
    model.adapters.add(weights)


def drop_from(keys: list[bytes], model: Any) -> None:
    model.adapters.drop(keys)
