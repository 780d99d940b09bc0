"""The C++ kernels: equal to the references within one rounding, on ragged shapes; everything else goes to PyTorch."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.cache_codes import CODES
from nanovllm.kernels.cpu import cpu_kernels
from nanovllm.kernels.cpu.cpu_kernels import CpuKernels, build, load_cpu_kernels
from nanovllm.kernels.paged_attention import paged_attention_reference
from nanovllm.kernels.qkv_rope_store import qkv_rope_store_reference
from nanovllm.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from nanovllm.kernels.silu_and_mul import gelu_and_mul_reference, silu_and_mul_reference
from tests.attention.paged_cases import make_case
from tests.kernels.cpu.copying_compiler import write_compiler
from tests.kernels.cpu.quantized_cases import check_products, check_rounded_products

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]
SEEDS = st.integers(0, 99)


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    found = load_cpu_kernels()
    assert found is not None
    return found


def check(got: torch.Tensor, want: torch.Tensor, scale: float = 1.0) -> None:
    """Equal but for one rounding, which a product may double, of values about `scale`; float32: order of additions."""
    eps = torch.finfo(want.dtype).eps * (64 if want.dtype == torch.float32 else 2)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=eps, atol=eps * scale / 8)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    num_inputs=st.sampled_from([1, 7, 16, 33, 100, 576]),
    num_outputs=st.sampled_from([1, 5, 48, 61, 200]),
    stride=st.sampled_from([0, 3]),
    has_bias=st.booleans(),
    seed=SEEDS,
)
def test_skinny_linear(
    kernels: CpuKernels, rows: int, num_inputs: int, num_outputs: int, stride: int, has_bias: bool, seed: int
) -> None:
    """Also of rows that are apart, and of more than it takes. A row's bits are those of other rows beside it."""
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, num_inputs + stride)[:, :num_inputs], torch.randn(num_outputs, num_inputs)
    bias = torch.randn(num_outputs) if has_bias else None
    got = kernels.skinny_linear(x, weight, bias)
    check(
        got, F.linear(x.double(), weight.double(), None if bias is None else bias.double()).float(), 8 * num_inputs**0.5
    )
    if 2 < rows <= 32:
        assert torch.equal(kernels.skinny_linear(x[1:].flip(0), weight, bias).flip(0), got[1:])


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    dim=st.sampled_from([1, 7, 16, 30, 40, 576, 1000]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-4, 1.0, 50.0]),
    seed=SEEDS,
)
def test_norms(kernels: CpuKernels, rows: int, dim: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, residual = random(rows, dim, dtype=dtype, scale=scale), random(rows, dim, dtype=dtype, scale=scale)
    weight = random(dim, dtype=dtype)
    before = x.clone(), residual.clone()
    check(kernels.rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), 1e-4)
    out, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
    want, want_total = add_rms_norm_reference(x, residual, weight, 1e-5)
    assert torch.equal(total, want_total)
    check(out, want, 1e-4)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 70),
    dim=st.sampled_from([1, 9, 16, 100, 1536]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 8.0, 60.0]),
    seed=SEEDS,
)
def test_silu_and_mul(kernels: CpuKernels, rows: int, dim: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    gate_up = random(rows, 2 * dim, dtype=dtype, scale=scale)
    check(kernels.silu_and_mul(gate_up), silu_and_mul_reference(gate_up), 1e-4)
    # PyTorch adds 1 to a tanh near -1, which cancels; the C++ does not.
    check(kernels.gelu_and_mul(gate_up), gelu_and_mul_reference(gate_up), 10 * scale)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    heads=st.sampled_from([(1, 1), (9, 3), (8, 1), (14, 2)]),
    head_dim=st.sampled_from([2, 8, 16, 48, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([3, 8, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    rope=st.booleans(),
    norm=st.booleans(),
    seed=SEEDS,
)
def test_qkv_rope_store(
    kernels: CpuKernels,
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    rope: bool,
    norm: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_blocks = -(-tokens // block_size) + 2
    qkv = random(tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = torch.rand(tokens, head_dim // 2) * 100
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1) if rope else None
    q_weight, k_weight = (random(head_dim, dtype=dtype), random(head_dim, dtype=dtype)) if norm else (None, None)
    slots = torch.randperm(num_blocks * block_size)[:tokens]
    slots[::5] = -1
    cache = random(2, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)
    want_cache = cache.clone()
    inputs = HeadInputs(cos_sin, slots, q_weight, k_weight, 1e-6)
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, scale=1.0)
    want = qkv_rope_store_reference(qkv, inputs, LayerCache(want_cache), shape)
    check(kernels.qkv_rope_store(qkv, inputs, LayerCache(cache), shape), want, 4.0)
    check(cache, want_cache, 4.0)
    if not (rope or norm):
        assert torch.equal(cache, want_cache)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CODES)
def test_codes_are_those_of_the_reference(kernels: CpuKernels, kind: str, dtype: torch.dtype) -> None:
    """To the bit, where nothing before them rounds: sizes from 1e-30 to 1e30, zeros, the largest of a row anywhere."""
    qkv = random(60, 10 * 48, dtype=dtype) * torch.logspace(-30, 30, 60)[:, None].to(dtype)
    qkv[7] = 0
    slots = torch.randperm(64)[:60]
    slots[3] = -1
    caches = [
        LayerCache(torch.zeros(2, 8, 2, 8, 48).to(CODES[kind]), torch.zeros(8, 2, 8, 2, dtype=torch.bfloat16))
        for _ in range(2)
    ]
    shape, heads = AttentionShape(6, 2, 48, scale=1.0), HeadInputs(None, slots)
    kernels.qkv_rope_store(qkv, heads, caches[0], shape)
    qkv_rope_store_reference(qkv, heads, caches[1], shape)
    assert torch.equal(*(cache.scales for cache in caches))
    assert torch.equal(*(cache.data.view(torch.int8) for cache in caches))


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(1, 300), min_size=1, max_size=9),
    group=st.integers(1, 8),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 64, 80, 96, 128]),
    block_size=st.sampled_from([5, 8, 16, 32, 64]),
    window=st.sampled_from([None, 1, 7, 64, 100]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([None, *CODES]),
    seed=SEEDS,
)
def test_decode_attention(
    kernels: CpuKernels,
    lens: list[int],
    group: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    kind: str | None,
    seed: int,
) -> None:
    case = make_case([1] * len(lens), lens, num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, dtype=dtype,
                     head_dim=head_dim, block_size=block_size, layout="heads outside", seed=seed)  # fmt: skip
    case = case.coded(kind)
    scale = head_dim**-0.5
    got = kernels.decode_attention(
        case.q, case.cache, case.meta.block_table, case.meta.seq_lens, case.shape(scale, window)
    )
    assert got is not None
    check(got, paged_attention_reference(case.q, case.cache, case.meta, case.shape(scale, window)))


@needs_compiler
def test_decode_attention_is_stable_for_extreme_scores(kernels: CpuKernels) -> None:
    """Scores that grow along the context rescale every earlier key; huge ones must not overflow."""
    case = make_case([1] * 2, [300, 70], layout="heads outside", head_dim=64)
    for factor in (30.0, 1e4):
        got = kernels.decode_attention(
            case.q * factor, case.cache, case.meta.block_table, case.meta.seq_lens, case.shape(1.0)
        )
        assert got is not None
        want = paged_attention_reference(case.q * factor, case.cache, case.meta, case.shape(1.0, None))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)  # rounding of the scores themselves


@needs_compiler
def test_padding_gives_zeros_and_unwritten_slots_are_not_read(kernels: CpuKernels) -> None:
    """A request of length 0 gives zeros; what lies behind a request's last token, even NaN, has no effect."""
    case = make_case([1, 1], [20, 9], layout="heads outside", head_dim=32, block_size=16)
    lens = torch.tensor([20, 0], dtype=torch.int32)
    clean = kernels.decode_attention(case.q, case.cache, case.meta.block_table, lens, case.shape(0.2, None))
    case.kv_cache[:, case.meta.block_table[0, 1], :, 4:] = float("nan")
    dirty = kernels.decode_attention(case.q, case.cache, case.meta.block_table, lens, case.shape(0.2, None))
    assert clean is not None and dirty is not None
    assert torch.equal(clean, dirty) and not clean[1].any() and clean[0].all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_threads_or_batch(kernels: CpuKernels, dtype: torch.dtype) -> None:
    case = make_case([1] * 12, [250] * 12, layout="heads outside", head_dim=64, dtype=dtype)
    x, weight = random(64, 576, dtype=dtype), random(576, dtype=dtype)

    def attend(rows: slice) -> torch.Tensor:
        out = kernels.decode_attention(
            case.q[rows], case.cache, case.meta.block_table[rows], case.meta.seq_lens[rows], case.shape(0.2)
        )
        assert out is not None
        return out

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = attend(slice(0, 12)), kernels.rms_norm(x, weight, 1e-5)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(single[0], attend(slice(0, 12))) and torch.equal(single[0][3:5], attend(slice(3, 5)))
    assert torch.equal(single[1], kernels.rms_norm(x, weight, 1e-5))
    assert torch.equal(single[1][7:8], kernels.rms_norm(x[7:8], weight, 1e-5))


@needs_compiler
def test_other_inputs_go_to_pytorch(kernels: CpuKernels) -> None:
    """float16, strides and mixed dtypes give what the PyTorch operation gives."""
    half, weight = random(3, 32, dtype=torch.float16), random(32, dtype=torch.float16)
    check(kernels.rms_norm(half, weight, 1e-5), rms_norm_reference(half, weight, 1e-5), 1e-3)
    check(kernels.add_rms_norm(half, half, weight, 1e-5)[0], add_rms_norm_reference(half, half, weight, 1e-5)[0], 1e-3)
    assert torch.equal(kernels.silu_and_mul(half), silu_and_mul_reference(half))
    assert torch.equal(kernels.gelu_and_mul(half), gelu_and_mul_reference(half))
    strided = random(4, 3, 48, dtype=torch.bfloat16)[..., :32]
    check(
        kernels.rms_norm(strided, weight.bfloat16(), 1e-5), rms_norm_reference(strided, weight.bfloat16(), 1e-5), 1e-3
    )
    for layout, dtype, slot_dtype in (
        ("tokens outside", torch.float32, torch.int64),
        ("heads outside", torch.float16, torch.int64),
        ("heads outside", torch.float32, torch.int32),
    ):
        case = make_case([1, 1], [9, 20], layout=layout, dtype=dtype)
        qkv = random(2, 10 * 16, dtype=dtype)
        cache, slots = case.kv_cache.clone(), case.meta.slot_mapping.to(slot_dtype)
        shape, heads = case.shape(0.2), HeadInputs(None, slots)
        q = kernels.qkv_rope_store(qkv, heads, LayerCache(cache), shape)
        assert torch.equal(q, qkv_rope_store_reference(qkv, heads, case.cache, shape))
        assert torch.equal(cache, case.kv_cache)
        args = (LayerCache(cache), case.meta.block_table, case.meta.seq_lens)
        assert kernels.decode_attention(q.contiguous(), *args, shape._replace(softcap=5.0)) is None
        refused = kernels.decode_attention(q.contiguous(), *args, shape) is None
        assert refused == (layout != "heads outside" or dtype == torch.float16)


@needs_compiler
@pytest.mark.parametrize("wrong", ["weight", "residual", "slots", "cos_sin"])
def test_sizes_that_do_not_fit_never_reach_a_pointer(kernels: CpuKernels, wrong: str) -> None:
    x = torch.randn(4, 32)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        if wrong == "weight":
            kernels.rms_norm(x, torch.ones(16), 1e-5)
        elif wrong == "residual":
            kernels.add_rms_norm(x, torch.randn(3, 32), torch.ones(32), 1e-5)
        else:
            slots = torch.arange(3 if wrong == "slots" else 4)
            cos_sin = torch.ones(3, 8) if wrong == "cos_sin" else None
            cache, shape = LayerCache(torch.zeros(2, 2, 1, 8, 8)), AttentionShape(2, 1, 8, scale=1.0)
            kernels.qkv_rope_store(x, HeadInputs(cos_sin, slots), cache, shape)


# --- building ------------------------------------------------------------


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty user cache, and `load_cpu_kernels` as in a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_cpu_kernels.cache_clear()
    yield tmp_path / "nanovllm" / "native"
    load_cpu_kernels.cache_clear()


def test_without_a_compiler_there_is_one_warning(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("PATH", str(fresh_cache))
    assert load_cpu_kernels() is None and load_cpu_kernels() is None
    assert len(recwarn) == 1 and "install a C++ compiler" in str(recwarn[0].message)


@pytest.mark.parametrize("script", ["echo 'no OpenMP here' >&2; exit 1", "exit 0"])
def test_a_failing_compiler_gives_a_warning_with_its_message(
    fresh_cache: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may fail, or exit with 0 and leave no library."""
    fresh_cache.mkdir(parents=True)
    compiler = fresh_cache / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(fresh_cache))
    with pytest.warns(UserWarning, match="no OpenMP here" if "OpenMP" in script else "No such file"):
        assert load_cpu_kernels() is None
    assert list(fresh_cache.iterdir()) == [compiler]


@needs_compiler
def test_a_cache_that_cannot_be_written_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.warns(UserWarning, match="let .* be writable"):
        assert load_cpu_kernels() is None


@needs_compiler
@pytest.mark.slow
def test_processes_may_build_at_once_and_later_ones_do_not(kernels: CpuKernels, tmp_path: Path) -> None:
    """One whole library results; the line on stderr appears only when a build really happens.

    The compiler writes half of what is built already, waits for one that does the same, and writes the rest.
    """
    code = "from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels; assert load_cpu_kernels()"
    assert COMPILER is not None
    begun = tmp_path / "begun"
    begun.mkdir()
    is_alone = f'[ $(ls "{begun}" | wc -l) -lt 2 ]'
    wait = f'touch "{begun}/$$"; n=0; while {is_alone} && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done'
    tools = write_compiler(tmp_path / "tools", COMPILER, wait)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PATH": path}

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)

    for process in [start(), start()]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and "building CPU kernels" in errors, errors
    last = start()
    assert last.communicate(timeout=300)[1] == "" and last.returncode == 0
    assert len(list((tmp_path / "nanovllm" / "native").iterdir())) == 1
    assert len(list(begun.iterdir())) == 2


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(cpu_kernels.platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(march: str, tmp_path: Path) -> None:
    """The vectors of 4 and 8 floats that older CPUs use. The narrowest are compiled in half the time."""
    if march == "x86-64-v3" and "avx2" not in cpu_kernels._cpu_model():
        pytest.skip("this CPU has no AVX2")
    assert COMPILER is not None
    build(COMPILER, tmp_path / "narrow.so", f"-march={march}", "-O1" if march == "x86-64" else "-O3")
    narrow = CpuKernels(tmp_path / "narrow.so")
    for dtype in DTYPES:
        x, weight = random(5, 75, dtype=dtype), random(75, dtype=dtype)
        check(narrow.rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), 1e-4)
        gate_up = random(5, 75 * 2, dtype=dtype, scale=8.0)
        check(narrow.silu_and_mul(gate_up), silu_and_mul_reference(gate_up), 1e-4)
        case = make_case([1] * 4, [100, 1, 7, 33], num_heads=10, num_kv_heads=2, head_dim=80, dtype=dtype,
                         layout="heads outside")  # fmt: skip
        got = narrow.decode_attention(
            case.q, case.cache, case.meta.block_table, case.meta.seq_lens, case.shape(0.1, 50)
        )
        assert got is not None
        check(got, paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.1, 50)))
        check_products(narrow, dtype)
        check_rounded_products(narrow, dtype)
