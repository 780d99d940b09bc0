"""Where Triton twins are tested: on a GPU, or on the CPU in Triton's interpreter when TRITON_INTERPRET=1 is set."""

import importlib
import os
from types import ModuleType
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# In the interpreter, rounding to bfloat16 truncates and products of it are wrong.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
twin_test = [] if INTERPRETED else [pytest.mark.gpu]


def load_twin(operation: str) -> ModuleType:
    """The module kernels/<operation>_triton.py; the tests of whoever asks are skipped where Triton is missing."""
    pytest.importorskip("triton")
    if INTERPRETED:
        _repair_interpreter()
    return importlib.import_module(f"nanovllm.kernels.{operation}_triton")


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|; infinite if `got` is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def _repair_interpreter() -> None:
    """Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "repaired", False):
        return

    def repaired_patch(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    repaired_patch.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = repaired_patch
