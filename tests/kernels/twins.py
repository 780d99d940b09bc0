"""Where Triton twins are tested: on a GPU, or on the CPU in Triton's interpreter when TRITON_INTERPRET=1 is set.

In the interpreter `tl.dot` sums in one order wherever a row lies in its tile: what tests to the bit see is the kernel,
not what NumPy's BLAS does on this processor.
"""

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# In the interpreter, rounding to bfloat16 truncates and products of it are wrong.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
twin_test = [] if INTERPRETED else [pytest.mark.gpu]


def in_each_dtype(cases: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Each case with each dtype behind it. In the interpreter, which is slow, only the first with more than float32."""
    first, *others = cases
    return [(*first, dtype) for dtype in DTYPES] + [
        (*case, dtype) for case in others for dtype in (DTYPES[:1] if INTERPRETED else DTYPES)
    ]


def load_twin(operation: str) -> ModuleType:
    """Module `nanovllm.kernels.triton.<operation>`; the tests of whoever asks are skipped where Triton is missing."""
    pytest.importorskip("triton")
    if INTERPRETED:
        _repair_interpreter()
    return importlib.import_module(f"nanovllm.kernels.triton.{operation}")


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; infinite if `got` is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def ordered_dot(a: np.ndarray, b: np.ndarray, dtype: Any) -> np.ndarray:
    """a @ b without a BLAS, which may pick the order of a sum by where its row lies in the tile.

    OpenBLAS's kernels for AVX2 do: of twelve rows of a tile, the last six get other bits than the first six.
    """
    return np.einsum("...ij,...jk->...ik", np.ascontiguousarray(a, dtype), np.ascontiguousarray(b, dtype))


def _repair_interpreter() -> None:
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if builder.create_dot is _create_dot:
        return
    patch, splat = interpreter._patch_lang_tensor, builder.create_splat

    def patch_with_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def splat_with_type(builder: Any, block_type: Any, scalar: Any) -> Any:
        """A condition stays one: Triton makes an integer of it, which Triton 3.9 takes for no part of a mask."""
        block = splat(builder, block_type, scalar)
        if scalar.data.dtype == np.bool_:
            block.data = block.data.astype(np.bool_)
        return block

    interpreter._patch_lang_tensor = patch_with_index
    builder.create_splat = splat_with_type
    builder.create_dot = _create_dot
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patching_once(interpreter)


def _patching_once(interpreter: ModuleType) -> Callable[[Any], Any]:
    """Triton replaces its language's operations for a launch, and anew for each call of a function inside it, which
    takes longer than all that is computed. Here what has been replaced, and has not been put back, stays.
    """
    patch, languages, scopes = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core), {}

    def patch_once(function: Any, *more: Any) -> Any:
        known = tuple(any(value is module for value in function.__globals__.values()) for module in languages)
        if getattr(scopes.get(known), "_changes", None):
            return interpreter._LangPatchScope()
        scopes[known] = patch(function, *more)
        return scopes[known]

    return patch_once


def _create_dot(builder: Any, a: Any, b: Any, accumulator: Any, precision: Any, max_num_imprecise_acc: Any) -> Any:
    """As a matrix unit does it: 16 elements of the inner dimension at a time are added to what there is."""
    total = accumulator.data
    for start in range(0, a.data.shape[-1], 16):
        inner = slice(start, start + 16)
        total = total + ordered_dot(a.data[..., inner], b.data[..., inner, :], total.dtype)
    return type(accumulator)(total, accumulator.dtype.scalar)
