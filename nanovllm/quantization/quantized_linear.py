"""QuantizedLinear: weights in 4 or 8 bits with scales for groups of inputs, whatever format they came in.

Owns the tensors that are kept and how they are multiplied by; each format is a subclass that says which tensors of a
checkpoint fill them. Invariant: no dense copy of a layer outlives the product that needs it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.kernels.quantized_linear import (
    NormOfRow,
    QuantizedWeight,
    RowRounding,
    dequantize,
    fp8_linear,
    fused_row,
    int8_linear,
    pack_int4,
    quantized_linear,
    round_rows,
    unpack_int4,
)
from nanovllm.layers.linear_method import Gate, LinearMethod, LinearSpec, Norm
from nanovllm.layers.weight_specs import FLOATS, WeightSpec

_CODES = {"int4": torch.uint8, "e2m1": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


_ROOT_MEAN_SQUARES = {"int4": 4.6, "e2m1": 2.9, "int8": 74.0, "fp8": 1.0}  # of random codes


def usual_scale(kind: str, num_inputs: int) -> float:
    """With which random codes have the variance 1 / inputs."""
    return num_inputs**-0.5 / _ROOT_MEAN_SQUARES[kind]


def random_codes(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random bits, or normal numbers in 8 bits."""
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, generator=generator, device=generator.device, dtype=dtype)


class Rounding(NamedTuple):
    """How a format rounds a layer's inputs before the product. kind: "fp8" or "int8".

    group_size: inputs of a row that share a scale, None for all. is_static: the checkpoint has the scale.
    """

    kind: str
    group_size: int | None = None
    is_static: bool = False


class QuantizedLinear(LinearMethod):
    """kind: of the codes, "int4", "e2m1", "int8" or "fp8". group_size: None for one scale for all inputs of an output.

    has_order: groups may be of inputs that are not neighbours (`fill_groups`). has_low: what code 0 stands for is told
    (`fill_low`), in scale_dtype.
    """

    frozen: str | None = "they are kept as the checkpoint has quantized them"

    def __init__(
        self,
        spec: LinearSpec,
        kind: str,
        group_size: int | None,
        has_zeros: bool = False,
        has_order: bool = False,
        rounding: Rounding | None = None,
        has_low: bool = False,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(spec)
        self.kind, self.rounding = kind, rounding
        self.per_byte = 2 if _CODES[kind] == torch.uint8 else 1
        self.is_grouped = group_size is not None
        self.group_size = group_size or spec.in_features
        self.num_groups = -(-spec.in_features // self.group_size)  # of the whole matrices
        inputs = len(spec.inputs)
        self._check_sizes(inputs, has_order)

        def room(columns: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(spec.num_outputs, columns, dtype=dtype), requires_grad=False)

        self.codes = room(inputs // self.per_byte, _CODES[kind])
        self.scale = room(len(self.groups), scale_dtype)
        self.low = room(len(self.groups), scale_dtype) if has_low else None
        self.zero = room(len(self.groups), torch.int8) if has_zeros else None
        self.input_scale: nn.Parameter | None = None
        if rounding is not None and rounding.is_static:
            self.input_scale = nn.Parameter(torch.zeros(len(spec.sizes)), requires_grad=False)
        self.order: Tensor | None = None  # of the inputs, where groups are not of neighbours
        self.semaphores: Tensor | None = None  # room that a GPU counts in
        self._group_of_input: dict[int, Tensor] = {}

    def _check_sizes(self, inputs: int, has_order: bool) -> None:
        spec = self.spec
        if self.per_byte == 2 and (inputs % 32 or spec.inputs.start % 32):
            raise ValueError(
                f"{self._names}: {inputs} inputs (on each rank) are no multiple of 32, which {self.kind!r} needs"
            )
        if inputs == spec.in_features:
            return
        if has_order:
            raise NotImplementedError(
                f"{self._names}: groups of inputs in another order (desc_act, actorder) are not split over "
                "tensor-parallel ranks; use tensor_parallel_size=1"
            )
        if self.is_grouped and (spec.inputs.start % self.group_size or inputs % self.group_size):
            raise ValueError(
                f"{self._names}: {inputs} inputs on each tensor-parallel rank are not whole groups of "
                f"{self.group_size}, which share a scale; choose another tensor_parallel_size"
            )

    @property
    def _names(self) -> str:
        return ", ".join(self.spec.names)

    @property
    def groups(self) -> range:
        """Which of the groups of the whole matrices this rank holds."""
        if not self.is_grouped:
            return range(1)
        first = self.spec.inputs.start // self.group_size
        return range(first, first - (-len(self.spec.inputs) // self.group_size))

    def groups_of_neighbours(self) -> Tensor:
        """Of each input of the whole matrices its group, where groups are of neighbours; int64, on the CPU."""
        return torch.arange(self.spec.in_features, device="cpu") // self.group_size

    # --- from a checkpoint ---------------------------------------------------------------------

    def weight_spec(
        self,
        name: str,
        part: int,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...],
        fill: Callable[[int, Tensor], object],
        outputs: int | None = None,
        stand_in: Tensor | float | None = None,
    ) -> tuple[str, WeightSpec]:
        """(name, spec) of a tensor, for `weights`; fill(part, tensor) gets it on the device of the layer.

        stand_in: the tensor, or all of its numbers, for load_format="dummy"; None for codes, and for scales with which
        codes are as large as the weights of a dense matrix.
        """
        device = self.codes.device
        if stand_in is None and dtypes[0] in FLOATS:
            stand_in = 0.05 if fill == self.fill_input_scale else usual_scale(self.kind, self.spec.in_features)

        def made(generator: torch.Generator) -> Tensor:
            if stand_in is None:
                return random_codes(shape, dtypes[0], generator)
            return stand_in if isinstance(stand_in, Tensor) else torch.full(shape, stand_in, device=device)

        def fill_part(tensor: Tensor) -> None:
            fill(part, tensor.to(device))

        return name, WeightSpec(shape, fill_part, dtypes=dtypes, outputs=outputs, stand_in=made)

    def fill_codes(self, part: int, codes: Tensor) -> None:
        """codes: of the whole matrix, in the form that is kept; of "int4" and "e2m1", two inputs in a byte."""
        inputs = self.spec.inputs
        self._fill(self.codes, part, codes, range(inputs.start // self.per_byte, inputs.stop // self.per_byte))

    def fill_scale(self, part: int, scale: Tensor) -> None:
        """scale [outputs or 1, groups or 1] of the whole matrix."""
        columns = self.num_groups if self.is_grouped else 1
        self._fill(self.scale, part, scale.expand(self.spec.sizes[part], columns), self.groups)

    def fill_zero(self, part: int, zero: Tensor) -> None:
        """zero [outputs, groups] of the whole matrix, less what is taken off the codes to make them signed."""
        assert self.zero is not None
        self._fill(self.zero, part, zero, self.groups)

    def fill_low(self, part: int, low: Tensor) -> None:
        """low [outputs, groups] of the whole matrix."""
        assert self.low is not None
        self._fill(self.low, part, low, self.groups)

    def fill_groups(self, part: int, group_of_input: Tensor) -> None:
        """group_of_input [inputs]: which scale each input has."""
        self._group_of_input[part] = group_of_input.to(self.codes.device, torch.int64)

    def fill_input_scale(self, part: int, scale: Tensor) -> None:
        assert self.input_scale is not None
        self.input_scale.data[part].copy_(scale.squeeze())

    def _fill(self, target: Tensor, part: int, source: Tensor, columns: range) -> None:
        rows = self.spec.parts[part]
        held = source[rows.start : rows.stop, columns.start : columns.stop]
        target.data[self.spec.rows(part)][: len(held)].copy_(held)

    def finish(self) -> None:
        if self.codes.is_cuda:
            from nanovllm.kernels.triton.linear.skinny_gemm import new_semaphores

            self.semaphores = new_semaphores(self.codes.device)
        if self.zero is not None and not self.zero.any():
            self.zero = None
        if self._group_of_input:
            self._sort_inputs(list(self._group_of_input.values()))
            self._group_of_input.clear()
        if self.input_scale is not None and (self.input_scale == self.input_scale[0]).all():
            self.input_scale = nn.Parameter(self.input_scale[:1].clone(), requires_grad=False)

    def _sort_inputs(self, groups: list[Tensor]) -> None:
        """Bring the inputs of a group together, if they are not."""
        neighbours = self.groups_of_neighbours().to(self.codes.device)
        if all(torch.equal(group, neighbours) for group in groups):
            return
        order = groups[0].argsort(stable=True)
        if not all(torch.equal(group, groups[0]) for group in groups) or not torch.equal(groups[0][order], neighbours):
            raise NotImplementedError(
                f"{self._names}: their groups of inputs differ or are not of {self.group_size} inputs each"
            )
        if self.kind == "int4":
            self.codes.copy_(pack_int4(unpack_int4(self.codes)[:, order]))
        else:
            self.codes.copy_(self.codes[:, order])
        self.order = order

    # --- multiplying ---------------------------------------------------------------------------

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.scale, self.zero, self.group_size, self.low)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.order is not None:
            x = x[:, self.order]
        if (fused := self._fused_row(None, x, bias, None)) is not None:
            return fused[0]
        rounding, weight = self.rounding, self.weight
        if rounding is None:
            return quantized_linear(x, weight, bias, self.semaphores)
        if rounding == Rounding(self.kind) and not self.is_grouped:
            return (fp8_linear if self.kind == "fp8" else int8_linear)(x, weight, bias, self.semaphores)
        if self.input_scale is not None and len(self.input_scale) > 1:
            return self._multiply_parts(rounding, x, bias, self.input_scale)
        rounded = round_rows(x, rounding.kind, rounding.group_size, self.input_scale)
        return quantized_linear(rounded, weight, bias, self.semaphores)

    def multiply_after_norm(
        self, norm: Norm, x: Tensor, residual: Tensor | None, bias: Tensor | None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        of_row, total = None, x
        if norm.weight is None:
            x, total = norm(x, residual)
        else:
            of_row = NormOfRow(residual, norm.weight, norm.eps)
        if self.order is None and (fused := self._fused_row(of_row, x, bias, gate)) is not None:
            return fused[0], total if of_row is None else fused[1]
        if of_row is not None:
            x, total = norm(x, residual)
        product = self.multiply(x, bias)
        return product if gate is None else gate.apply(product), total

    def _fused_row(
        self, norm: NormOfRow | None, x: Tensor, bias: Tensor | None, gate: Gate | None
    ) -> tuple[Tensor, Tensor] | None:
        """See `quantized_linear.fused_row`."""
        rounding, scale = self.rounding, self.input_scale
        if scale is not None and len(scale) > 1:
            return None
        of_row = None if rounding is None else RowRounding(rounding.kind, rounding.group_size, scale)
        return fused_row(x, norm, self.weight, bias, of_row, None if gate is None else gate.activation)

    def _multiply_parts(self, rounding: Rounding, x: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
        """Each matrix has rounded its inputs in its own way."""
        products = []
        for part in range(len(scales)):
            rows = self.spec.rows(part)
            own = QuantizedWeight(self.codes[rows], self.scale[rows], None, self.group_size)
            rounded = round_rows(x, rounding.kind, scale=scales[part : part + 1])
            products.append(quantized_linear(rounded, own, None if bias is None else bias[rows], self.semaphores))
        return torch.cat(products, dim=1)

    def gather_rows(self, ids: Tensor) -> Tensor:
        zero, low = (None if of_groups is None else of_groups[ids] for of_groups in (self.zero, self.low))
        weight = QuantizedWeight(self.codes[ids], self.scale[ids], zero, self.group_size, low)
        return dequantize(weight, self.spec.dtype)
