"""CPU kernels in C++: the operations between matrix products, and quantized ones, built once, kept in a cache.

Owns the build, its cache, and every check that stands between a tensor and a raw pointer. Invariant: what the C++ does
not take (another dtype, strides, sizes that do not fit together) goes to the PyTorch operation of the same name, so a
method accepts whatever that one accepts.

A step of a small model runs a hundred of these operations, of some microseconds each: eager PyTorch would spend as long
on them as on the matrix products.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.cache_codes import LARGEST
from nanovllm.kernels.cpu.rounded_product import RoundedProduct, make_rounded_product
from nanovllm.kernels.cpu.state_kernels import StateKernels
from nanovllm.kernels.qkv_rope_store import qkv_rope_store
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm
from nanovllm.kernels.silu_and_mul import gelu_and_mul, silu_and_mul

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("cpu_kernels", "skinny_linear", "quantized_linear", "rounded_linear", "states")
)
_HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("vectors", "rows", "quantized_weights"))
_COMPILERS = ("c++", "g++", "clang++")
# Not -ffast-math: infinities and NaN keep their meaning, and additions their order. What is added to a product in one
# instruction is written so (`vectors.h`).
_FLAGS = "-O3 -march=native -ffp-contract=off -fno-math-errno -std=c++17 -shared -fPIC -fopenmp".split()
_BUILD_SECONDS = 300
_MAX_HEAD_DIM, _MAX_GROUP = 256, 16  # as in cpu_kernels.cpp
_MAX_ROWS = 256  # more are multiplied as fast by PyTorch
_DTYPES = (torch.float32, torch.bfloat16)

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "add_rms_norm": ctypes.CFUNCTYPE(None, *[_POINTER] * 5, *[_INT] * 2, _FLOAT),
    "silu_and_mul": ctypes.CFUNCTYPE(None, *[_POINTER] * 2, *[_INT] * 2),
    "gelu_and_mul": ctypes.CFUNCTYPE(None, *[_POINTER] * 2, *[_INT] * 2),
    "qkv_rope_store": ctypes.CFUNCTYPE(None, *[_POINTER] * 8, *[_INT] * 6, _FLOAT),
    "decode_attention": ctypes.CFUNCTYPE(None, *[_POINTER] * 7, *[_INT] * 8, _FLOAT),
    "causal_conv": ctypes.CFUNCTYPE(None, *[_POINTER] * 9, *[_INT] * 6),
    "delta_net": ctypes.CFUNCTYPE(None, *[_POINTER] * 13, *[_INT] * 8, _FLOAT),
    "kimi_delta": ctypes.CFUNCTYPE(None, *[_POINTER] * 15, *[_INT] * 8, _FLOAT),
    "mamba2": ctypes.CFUNCTYPE(None, *[_POINTER] * 13, *[_INT] * 8, _FLOAT),
    "skinny_linear": ctypes.CFUNCTYPE(None, *[_POINTER] * 4, *[_INT] * 4),
    "quantized_linear": ctypes.CFUNCTYPE(None, *[_POINTER] * 7, *[_INT] * 6),
    "rounded_linear": ctypes.CFUNCTYPE(None, *[_POINTER] * 9, *[_INT] * 6, _FLOAT),
}


class CpuKernels(StateKernels):
    """The functions of one built library; tensors are on the CPU."""

    def __init__(self, library: Path) -> None:
        # PyTorch is imported by now, so the library finds PyTorch's OpenMP runtime loaded and shares its threads.
        loaded = ctypes.CDLL(str(library))

        def function(name: str, *dtypes: torch.dtype) -> Callable[..., None]:
            symbol = "_".join((name, *(str(dtype).removeprefix("torch.") for dtype in dtypes)))
            return _SIGNATURES[name].in_dll(loaded, symbol)

        def by_dtype(name: str) -> dict[torch.dtype, Callable[..., None]]:
            return {dtype: function(name, dtype) for dtype in _DTYPES}

        def by_dtypes(name: str) -> dict[tuple[torch.dtype, torch.dtype], Callable[..., None]]:
            """By the dtype of the inputs and that of the cache."""
            coded = {(dtype, codes): function(name, dtype, codes) for dtype in _DTYPES for codes in LARGEST}
            return {(dtype, dtype): function(name, dtype) for dtype in _DTYPES} | coded

        self._add_rms_norm = by_dtype("add_rms_norm")
        self._silu_and_mul = by_dtype("silu_and_mul")
        self._gelu_and_mul = by_dtype("gelu_and_mul")
        self._qkv_rope_store = by_dtypes("qkv_rope_store")
        self._decode_attention = by_dtypes("decode_attention")
        self._causal_conv = by_dtype("causal_conv")
        self._delta_net = by_dtype("delta_net")
        self._kimi_delta = by_dtype("kimi_delta")
        self._mamba2 = by_dtype("mamba2")
        self._quantized_linear = by_dtype("quantized_linear")
        self._rounded_linear = by_dtype("rounded_linear")
        self._num_lanes = ctypes.c_int.in_dll(loaded, "num_lanes").value
        self._skinny_linear = _SIGNATURES["skinny_linear"].in_dll(loaded, "skinny_linear_float32")

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `kernels.rms_norm.rms_norm`."""
        run, dim = self._add_rms_norm.get(x.dtype), x.shape[-1]
        if run is None or dim == 0 or not (x.is_contiguous() and _is_packed(weight, dim, x.dtype)):
            return rms_norm(x, weight, eps)
        out = torch.empty_like(x)
        run(x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), None, x.numel() // dim, dim, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `kernels.rms_norm.add_rms_norm`."""
        run, shape = self._add_rms_norm.get(x.dtype), x.shape
        dim = shape[-1]
        if run is None or dim == 0 or not (
            x.is_contiguous()
            and residual.is_contiguous()
            and residual.dtype == x.dtype
            and residual.shape == shape
            and _is_packed(weight, dim, x.dtype)
        ):  # fmt: skip
            return add_rms_norm(x, residual, weight, eps)
        out, total = torch.empty_like(x), torch.empty_like(x)
        run(
            x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr(),
            x.numel() // dim, dim, eps,
        )  # fmt: skip
        return out, total

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `kernels.silu_and_mul.silu_and_mul`."""
        out = self._gate(self._silu_and_mul, gate_up)
        return silu_and_mul(gate_up) if out is None else out

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        """See `kernels.silu_and_mul.gelu_and_mul`."""
        out = self._gate(self._gelu_and_mul, gate_up)
        return gelu_and_mul(gate_up) if out is None else out

    def _gate(self, by_dtype: dict[torch.dtype, Callable[..., None]], gate_up: Tensor) -> Tensor | None:
        run, shape = by_dtype.get(gate_up.dtype), gate_up.shape
        if run is None or len(shape) != 2 or shape[1] % 2 or not gate_up.is_contiguous():
            return None
        rows, dim = shape[0], shape[1] // 2
        out = gate_up.new_empty(rows, dim)
        run(gate_up.data_ptr(), out.data_ptr(), rows, dim)
        return out

    def qkv_rope_store(self, qkv: Tensor, heads: HeadInputs, cache: LayerCache, shape: AttentionShape) -> Tensor:
        """See `kernels.qkv_rope_store.qkv_rope_store`; slots are below num_blocks * block_size."""
        cos_sin, slot_mapping, q_norm_weight, k_norm_weight, eps = heads
        num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        dtype, num_tokens = qkv.dtype, qkv.shape[0]
        _, num_blocks, cache_heads, block_size, cache_dim = cache.data.shape
        run = self._qkv_rope_store.get((dtype, cache.data.dtype))
        if run is None or not (
            qkv.is_contiguous()
            and qkv.numel() == num_tokens * (num_heads + 2 * num_kv_heads) * head_dim
            and _is_whole(cache)
            and cache_heads == num_kv_heads
            and cache_dim == head_dim <= _MAX_HEAD_DIM
            and head_dim % 2 == 0
            and _is_packed(slot_mapping, num_tokens, torch.int64)
            and (cos_sin is None or _is_packed(cos_sin, num_tokens * head_dim, torch.float32))
            and (q_norm_weight is None) == (k_norm_weight is None)
            and (q_norm_weight is None or _is_packed(q_norm_weight, head_dim, dtype))
            and (k_norm_weight is None or _is_packed(k_norm_weight, head_dim, dtype))
        ):
            return qkv_rope_store(qkv, heads, cache, shape)
        q = qkv.new_empty(num_tokens, num_heads, head_dim)
        run(
            qkv.data_ptr(),
            None if cos_sin is None else cos_sin.data_ptr(),
            cache.data.data_ptr(),
            None if cache.scales is None else cache.scales.data_ptr(),
            slot_mapping.data_ptr(),
            None if q_norm_weight is None else q_norm_weight.data_ptr(),
            None if k_norm_weight is None else k_norm_weight.data_ptr(),
            q.data_ptr(),
            num_tokens, num_heads, num_kv_heads, head_dim, num_blocks, block_size, eps,
        )  # fmt: skip
        return q

    def decode_attention(
        self, q: Tensor, cache: LayerCache, block_table: Tensor, seq_lens: Tensor, shape: AttentionShape,
        sinks: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Attention of one query token per request: q [n, num_heads, head_dim] -> the same shape, contiguous.

        block_table [n, max_blocks], seq_lens [n] int32; a length of 0 gives zeros. Scores and weights stay in float32,
        as in `kernels.paged_attention`. None where the C++ does not apply: a soft-cap, values in the keys, another
        dtype, a cache that is not contiguous, a head_dim that is not a multiple of 16, more than 16 query heads to a
        KV head.
        """
        (n, num_heads, head_dim), dtype = q.shape, q.dtype
        _, num_blocks, num_kv_heads, block_size, cache_dim = cache.data.shape
        run, max_blocks = self._decode_attention.get((dtype, cache.data.dtype)), block_table.shape[1]
        if run is None or not (
            shape.softcap is None
            and shape.value_dim is None
            and _is_whole(cache)
            and cache_dim == head_dim <= _MAX_HEAD_DIM
            and head_dim % 16 == 0
            and num_heads % num_kv_heads == 0
            and num_heads <= _MAX_GROUP * num_kv_heads
            and _is_packed(block_table, n * max_blocks, torch.int32)
            and _is_packed(seq_lens, n, torch.int32)
            and (sinks is None or _is_packed(sinks, num_heads, torch.float32))
        ):
            return None
        q = q.contiguous()
        out = torch.empty_like(q)
        run(
            q.data_ptr(), cache.data.data_ptr(), None if cache.scales is None else cache.scales.data_ptr(),
            block_table.data_ptr(), seq_lens.data_ptr(), None if sinks is None else sinks.data_ptr(), out.data_ptr(),
            n, num_heads, num_kv_heads, head_dim, num_blocks, block_size, max_blocks,
            shape.window or 0, shape.scale,
        )  # fmt: skip
        return out

    def suits(self, dtype: torch.dtype) -> bool:
        """Is `skinny_linear` the fastest product of few rows? With vectors of 16, oneDNN's is."""
        return dtype == torch.float32 and self._num_lanes == 8

    def skinny_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `kernels.skinny_linear.skinny_linear`; here few rows are those of float32 up to _MAX_ROWS."""
        (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
        if not (
            0 < num_rows <= _MAX_ROWS
            and x.dtype == torch.float32
            and x.stride(1) == 1
            and _is_packed(weight, num_outputs * num_inputs, torch.float32)
            and (bias is None or _is_packed(bias, num_outputs, torch.float32))
        ):
            return F.linear(x, weight, bias)
        out = x.new_empty(num_rows, num_outputs)
        pointers = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()
        self._skinny_linear(*pointers, num_rows, x.stride(0), num_outputs, num_inputs)
        return out

    def quantized_linear(
        self,
        x: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        low: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """x W^T + b, or without x W itself, in `dtype`, which x has; W as in `kernels.quantized_linear`.

        None where the C++ does not apply: FP8, another dtype, groups that are no multiple of 32 inputs (16 of int8).
        """
        is_int4, (num_outputs, num_groups) = codes.dtype == torch.uint8, scale.shape
        num_inputs = codes.shape[1] * (2 if is_int4 else 1)
        run, num_rows = self._quantized_linear.get(dtype), 0 if x is None else x.shape[0]
        if run is None or not (
            codes.dtype in (torch.uint8, torch.int8)
            and codes.is_contiguous()
            and num_inputs % (num_groups * (32 if is_int4 else 16)) == 0
            and scale.dtype in (torch.float32, torch.float16, *[torch.uint8] * is_int4)
            and scale.is_contiguous()
            and (zero is None or _is_packed(zero, scale.numel(), torch.int8))
            and (low is None or _is_packed(low, scale.numel(), scale.dtype))
            and (bias is None or _is_packed(bias, num_outputs, dtype))
            and (x is None or x.dtype == dtype)
        ):
            return None
        x = None if x is None else x.contiguous()
        out = torch.empty((num_outputs, num_inputs) if x is None else (num_rows, num_outputs), dtype=dtype)
        pointers = [None if t is None else t.data_ptr() for t in (codes, scale, low, zero, x, bias, out)]
        run(*pointers, num_rows, num_outputs, num_inputs, num_groups, 4 if is_int4 else 8, scale.element_size())
        return out

    def rounded_product(self, codes: Tensor, scale: Tensor, low: Tensor | None) -> RoundedProduct | None:
        """Products with W as in `kernels.quantized_linear`, of inputs that are rounded.

        None where the C++ does not apply: scales that are not float16 and of 32 inputs (or 16 of int8).
        """
        return make_rounded_product(self._rounded_linear, codes, scale, low)


def _is_whole(cache: LayerCache) -> bool:
    scales, data = cache.scales, cache.data
    if data.dtype in LARGEST and (
        scales is None or not _is_packed(scales, data[0].numel() // data.shape[4] * 2, torch.bfloat16)
    ):
        return False
    return data.is_contiguous()


def _is_packed(x: Tensor, numel: int, dtype: torch.dtype) -> bool:
    return x.dtype == dtype and x.numel() == numel and x.is_contiguous()


@functools.cache
def load_cpu_kernels() -> CpuKernels | None:
    """The kernels, built (some seconds) if the cache has none for this source, compiler and CPU.

    None, with one warning, where they cannot be built: the PyTorch operations then do the same, slower.
    """
    install = "install a C++ compiler with OpenMP, such as the package g++"
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return _no_kernels(f"none of {', '.join(_COMPILERS)} is on PATH", install)
    try:
        library = _cache_dir() / f"{_build_key(compiler)}.so"
        if not library.exists():
            print("nanovllm: building CPU kernels (once) ...", file=sys.stderr, flush=True)
            build(compiler, library)
        return CpuKernels(library)
    except subprocess.CalledProcessError as error:
        return _no_kernels(f"{compiler} failed:\n{error.stderr}", install)
    except subprocess.TimeoutExpired as error:
        return _no_kernels(str(error), install)
    except OSError as error:
        return _no_kernels(str(error), f"let {_cache_dir()} be writable (XDG_CACHE_HOME moves it), or {install}")


def _no_kernels(reason: str, remedy: str) -> CpuKernels | None:
    warnings.warn(
        f"the CPU runs PyTorch's slower operations instead of the C++ kernels; {remedy}. Reason: {reason}", stacklevel=3
    )
    return None


def _cache_dir() -> Path:
    """$XDG_CACHE_HOME/nanovllm/native, or ~/.cache/nanovllm/native."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanovllm" / "native"


def _build_key(compiler: str) -> str:
    """What the machine code depends on: a home directory may be shared by machines with different CPUs."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, text=True).stdout
    sources = [source.read_text() for source in (*_SOURCES, *_HEADERS)]
    parts = [*sources, " ".join(_FLAGS), compiler, version, _cpu_model(), str(_openmp_runtime())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu_model() -> str:
    """Name and instruction sets of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = ("model name", "flags", "CPU part", "Features")
    return "\n".join([platform.machine(), platform.processor(), *sorted({s for s in lines if s.startswith(names)})])


def _openmp_runtime() -> Path | None:
    """The OpenMP library that PyTorch has loaded; often its own copy, under a name that no linker would look for."""
    maps = Path("/proc/self/maps")
    files = {Path(line.split(maxsplit=5)[5]) for line in maps.read_text().splitlines() if "omp" in line}
    return min((f for f in files if f.name.startswith(("libgomp", "libiomp", "libomp"))), default=None)


def build(compiler: str, library: Path, *extra_flags: str) -> None:
    """Compile the C++ into `library`, which appears whole or not at all: others may build it at the same time."""
    library.parent.mkdir(parents=True, exist_ok=True)
    runtime = _openmp_runtime()
    # Linked by its path, so that the system's OpenMP library, with a second pool of threads, is not needed.
    link = [str(runtime), "-Wl,--as-needed"] if runtime else []
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *_FLAGS, *extra_flags, *map(str, _SOURCES), *link, "-o", str(built)]
        subprocess.run(command, capture_output=True, check=True, text=True, timeout=_BUILD_SECONDS)
        os.replace(built, library)
