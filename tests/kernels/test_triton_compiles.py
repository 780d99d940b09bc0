"""Every Triton kernel compiles for the oldest GPU that runs it and for Hopper, without either of them.

The interpreter also runs what the compiler refuses, so its tests do not show this. Here each public function is called
on CPU tensors, and a launch ends where compiling ends: dtypes, constants and alignment are those of a real call.
"""

import ast
import importlib
import pkgutil
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import SharedPrefix
from nanovllm.kernels import triton as twins
from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.cascade import cascade_inputs
from nanovllm.kernels.draft_places import Places
from nanovllm.kernels.lora import AdapterRows
from nanovllm.kernels.moe import Biases, Gate, Shared
from nanovllm.kernels.quantized_linear import NormOfRow, QuantizedWeight, RowRounding
from nanovllm.kernels.quantized_moe import Stack
from nanovllm.kernels.router import Router
from nanovllm.runner.cascade_items import cut
from nanovllm.sampling.draw_columns import DrawColumns
from tests.attention.paged_cases import PagedCase, make_case
from tests.kernels.state_cases import make_states_case
from tests.kernels.test_delta_net import make_inputs
from tests.kernels.test_kimi_delta import make_inputs as make_kimi_inputs
from tests.kernels.test_mamba2 import make_inputs as make_mamba2_inputs
from tests.kernels.test_moe import random_ids
from tests.kernels.test_routing import RULES, rule_inputs
from tests.kernels.twins import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.code_generator import CodeGenerator
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.slow

FOR_HOPPER = (".fence_tile_loads", ".row_of_tile", "._fetch_weights", "sum_norm._fetch", ".fp8_numbers")  # functions
HOPPER_ONLY = ".prefill_hopper."  # a module
SHARED_MEMORY = {80: 166_912, 86: 101_376, 90: 232_448}  # by compute capability: the bytes that a program may ask for
TARGETS = [(80, 86), (90,)]  # side by side where the code is the same
PREFIX = f"{twins.__name__}."
MODULES = {
    name.removeprefix(PREFIX): importlib.import_module(name)
    for _, name, is_folder in pkgutil.walk_packages(twins.__path__, PREFIX)
    if not is_folder
}
ATTENTION = MODULES["attention.paged_attention"]
FUNCTIONS = {
    f"{module.__name__}.{name}": value
    for module in MODULES.values()
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and value.module == module.__name__
}


# --- calls that take every branch of every kernel ---------------------------------------------


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def new_semaphores() -> Tensor:
    return MODULES["linear.skinny_gemm"].new_semaphores(torch.device("cpu"))


def coded(case: PagedCase, kind: str | None) -> PagedCase:
    """With a cache in codes; "bytes": in e4m3, for a GPU that does not know it."""
    case = case.coded("fp8" if kind == "bytes" else kind)
    return replace(case, kv_cache=case.kv_cache.view(torch.uint8)) if kind == "bytes" else case


def attend(
    window: int | None,
    softcap: float | None,
    head_dim: int,
    block_size: int,
    prompt_len: int = 40,
    dtype: torch.dtype = torch.bfloat16,
    kind: str | None = None,
    has_sinks: bool = False,
) -> None:
    """Decodes beside a prompt, in two layers, and tokens one by one."""
    case = make_case(
        [1, 1, prompt_len], [90, 7, prompt_len + 20], num_heads=8, head_dim=head_dim, block_size=block_size,
        dtype=dtype, layout="heads outside",
    )  # fmt: skip
    case = coded(case, kind)
    shape, q, cache, meta = case.shape(0.1, window, softcap), case.q, case.cache, case.meta
    plans, sinks = ATTENTION.StepPlans(), torch.zeros(8) if has_sinks else None
    for _ in range(2):
        ATTENTION.paged_attention_triton(q, cache, meta, shape, plans, sinks)
    MODULES["batch_invariant.attention"].batch_invariant_attention_triton(q, cache, meta, shape, sinks=sinks)


def attend_on_hopper(num_heads: int, head_dim: int, block_size: int) -> None:
    case = make_case(
        [1, 1100, 1030], [90, 1100, 1500], num_heads=num_heads, head_dim=head_dim, block_size=block_size,
        dtype=torch.bfloat16, layout="heads outside",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ATTENTION, "has_hopper_gluon", lambda device: driver.active.get_current_target().arch == 90)
        sinks = torch.zeros(num_heads) if head_dim == 64 else None
        ATTENTION.paged_attention_triton(case.q, case.cache, case.meta, case.shape(0.1), sinks=sinks)


def attend_in_one_order(dtype: torch.dtype) -> None:
    """A token whose context several programs share."""
    case = make_case([1], [600], num_heads=4, num_kv_heads=2, head_dim=128, block_size=64, dtype=dtype)
    twin, plan = MODULES["batch_invariant.attention"], MODULES["batch_invariant.attention"].StepPlan()
    for _ in range(2):
        twin.batch_invariant_attention_triton(case.q, case.cache, case.meta, case.shape(0.1), plan)
    assert plan.parts.num_splits == 3


def decode_many(num_reqs: int, kind: str | None = None) -> None:
    case = make_case([1] * num_reqs, [90] * num_reqs, num_heads=8, head_dim=128, block_size=64, dtype=torch.bfloat16)
    case = coded(case, kind)
    shape, plans = case.shape(0.1), ATTENTION.StepPlans()
    for _ in range(2):
        ATTENTION.paged_attention_triton(case.q, case.cache, case.meta, shape, plans)


def decode_cascade(
    softcap: float | None,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.bfloat16,
    kind: str | None = None,
) -> None:
    """Decodes that share a prefix, in two layers."""
    case = make_case(
        [1] * 20, [90] * 20, num_heads=8, head_dim=head_dim, block_size=block_size, dtype=dtype, layout="heads outside"
    )
    case = coded(case, kind)
    words = torch.from_numpy(cut([SharedPrefix(0, 3, 0, 64)], 20, 2, 4, 8))
    meta, plans = replace(case.meta, cascade=cascade_inputs(words, 20)), ATTENTION.StepPlans()
    for _ in range(2):
        ATTENTION.paged_attention_triton(
            case.q, case.cache, meta, case.shape(0.1, softcap=softcap), plans, torch.zeros(8) if softcap else None
        )


def decode_from_qkv(
    window: int | None,
    softcap: float | None,
    head_dim: int,
    block_size: int,
    has_more: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    kind: str | None = None,
) -> None:
    """Two layers. has_more: norms and rotation."""
    case = make_case([1, 1], [90, 7], num_heads=8, head_dim=head_dim, block_size=block_size, dtype=dtype)
    case = coded(case, kind)
    meta, shape = case.meta, case.shape(0.1, window, softcap)
    qkv = torch.randn(2, (shape.num_heads + 2 * shape.num_kv_heads) * head_dim).to(dtype)
    cos_sin = torch.randn(2, head_dim) if has_more else None
    norm = torch.randn(head_dim).to(dtype) if has_more else None
    heads, plans = HeadInputs(cos_sin, meta.slot_mapping, norm, norm, 1e-6), ATTENTION.StepPlans()
    for _ in range(2):
        sinks = None if has_more else torch.zeros(8)
        ATTENTION.decode_qkv_triton(qkv, heads, case.cache, meta, shape, plans, sinks)


def rotate_and_store(has_norm: bool, has_rotation: bool, kind: str | None = None) -> None:
    norm, cos_sin = bf16(128) if has_norm else None, torch.randn(5, 128) if has_rotation else None
    heads, case = (
        HeadInputs(cos_sin, torch.arange(5), norm, norm, 1e-6),
        make_case([1], [5], head_dim=128, block_size=64, dtype=torch.bfloat16),
    )
    cache = coded(case, kind).cache
    shape = AttentionShape(8, 2, 128, scale=0.1)
    MODULES["attention.qkv_rope_store"].qkv_rope_store_triton(bf16(5, 12 * 128), heads, cache, shape)


def multiply(num_rows: int, inputs: int, has_bias: bool = False, gated: bool = False, gelu: bool = False) -> None:
    twin = MODULES["linear.skinny_linear"]
    x, weight, bias = bf16(num_rows, inputs), bf16(1024, inputs), bf16(1024) if has_bias else None
    config = twin.choose(x, weight, gated)
    if config is not None:  # else this GPU leaves it to cuBLAS
        twin.skinny_linear_triton(x, weight, bias, config, gated, gelu)


def multiply_in_chunks(num_rows: int, gated: bool) -> None:
    """Chunks held and chunks asked for on the way; and a norm of what has no residual."""
    twin = MODULES["linear.skinny_linear"]
    x, weight, semaphores = (
        bf16(num_rows, 1024),
        bf16(1024, 1024),
        new_semaphores(),
    )
    config = twin.GemmConfig(64, num_warps=8, slices=1, chunk=128, ahead=1, x_ahead=1, splits=2)
    twin.skinny_linear_triton(x, weight, None, config, gated, semaphores=semaphores)
    twin.rms_norm_linear_triton(x[:7], None, bf16(1024), 1e-6, weight, None, twin.choose(x[:7], weight, normed=True))


def normalize_and_multiply(num_rows: int, inputs: int, has_bias: bool, gated: bool, gelu: bool) -> None:
    twin = MODULES["linear.skinny_linear"]
    x, residual, norm = bf16(num_rows, inputs), bf16(num_rows, inputs), bf16(inputs)
    weight, bias = bf16(1024, inputs), bf16(1024) if has_bias else None
    config = twin.choose(x, weight, gated, normed=True)
    twin.rms_norm_linear_triton(x, residual, norm, 1e-6, weight, bias, config, gated, gelu)


def multiply_codes(
    num_rows: int,
    kind: str,
    group_size: int | None,
    more: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    inputs: int = 1024,
) -> None:
    """more: with a bias, and zeros or lows."""
    twin = MODULES["linear.quantized_linear"]
    if kind == "fp8" and not twin.has_fp8(torch.device("cpu")):
        return
    x = torch.randn(num_rows, inputs).to(dtype)
    codes_dtype = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    codes = torch.zeros(256, inputs // 2 if kind == "int4" else inputs, dtype=codes_dtype)
    groups = 1 if group_size is None else inputs // group_size
    scale, zero = torch.rand(256, groups), torch.zeros(256, groups, dtype=torch.int8)
    weights = [QuantizedWeight(codes, scale, zero if more else None, inputs // groups)]
    if more:
        weights.append(weights[0]._replace(scale=scale.half(), zero=None, low=scale.half()))
    bias, semaphores = bf16(256) if more else None, new_semaphores()
    for weight in weights:
        config = twin.choose(x, weight)
        twin.quantized_linear_triton(x, weight, bias, config, semaphores)
        if num_rows > 1:
            twin.quantized_linear_triton(x, weight, None, config._replace(splits=1))
        twin.dequantize_triton(weight, dtype)


def multiply_a_row(kind: str, inputs: int, has_residual: bool, rounding: RowRounding | None, gate: str | None) -> None:
    """With what stands around it; two chunks of inputs, and one program, which has several tiles of outputs."""
    twin = MODULES["linear.quantized_linear"]
    if "fp8" in (kind, None if rounding is None else rounding.kind) and not twin.has_fp8(torch.device("cpu")):
        return
    codes_dtype = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    codes = torch.zeros(60, inputs // 2 if kind == "int4" else inputs, dtype=codes_dtype)
    weight = QuantizedWeight(codes, torch.rand(60, 1), None, inputs)
    config = twin.GemvConfig(8, lanes=32, num_warps=1, ahead=1, programs=1)
    norm = NormOfRow(bf16(1, inputs) if has_residual else None, bf16(inputs), 1e-6)
    twin.launch_gemv(bf16(1, inputs), norm, weight, None, bf16(1, 30 if gate else 60), config, rounding, gate)


def round_inputs(kind: str, group_size: int | None, scale: Tensor | None) -> None:
    twin = MODULES["linear.quantized_linear"]
    if kind != "fp8" or twin.has_fp8(torch.device("cpu")):
        twin.round_rows_triton(bf16(5, 1000), kind, group_size, scale)
        twin.quantize_rows_triton(bf16(5, 1000), kind)


def mix_experts(num_tokens: int, num_experts: int, inputs: int, more: tuple[Any, ...] = ()) -> None:
    twin = MODULES["moe"]
    expert_ids = random_ids(num_tokens, 2, num_experts)
    twin.align_triton(expert_ids, num_experts, 16)
    gate_up, down = bf16(num_experts, 2 * inputs, inputs), bf16(num_experts, inputs, inputs)  # more than relu2 has
    twin.fused_experts_triton(bf16(num_tokens, inputs), gate_up, down, torch.rand(num_tokens, 2), expert_ids, *more)


def mix_experts_of_a_token(shared_size: int, gate: Gate, has_biases: bool) -> None:
    size = 640  # three chunks for each of six choices: more than are held
    gate_up, down = bf16(8, size * gate.num_parts, 2304), bf16(8, 2304, size)
    biases = Biases(bf16(8, size * gate.num_parts), bf16(8, 2304)) if has_biases else None
    shared = Shared(bf16(2 * shared_size, 2304), bf16(2304, shared_size)) if shared_size else None
    MODULES["expert_vectors"].vector_experts_triton(
        bf16(1, 2304), gate_up, down, torch.rand(1, 6), random_ids(1, 6, 8), biases, gate, shared
    )


def route_after_norm(name: str, dtype: torch.dtype) -> None:
    logits, correction, routing = rule_inputs(name, 1)
    weight, x = torch.zeros(logits.shape[1], 2048, dtype=dtype), bf16(1, 2048)
    router = Router(weight, None if correction is not None else weight[:, 0].contiguous(), correction, routing)
    MODULES["router"].rms_norm_route_triton(x, x, x[0], 1e-6, router, new_semaphores())


def adapt(num_rows: int, sizes: tuple[int, ...], activation: str | None = None, **options: Any) -> None:
    dtype = options.pop("dtype", torch.bfloat16)
    twin, rank, inputs = MODULES["lora"], options.pop("rank", 16), options.pop("inputs", 4096)
    slots = torch.zeros(num_rows, dtype=torch.int32)
    rows = AdapterRows(slots, 4, None, slots)
    if num_rows > 8:
        semaphores = torch.zeros(4096, dtype=torch.int32)
        rows = rows._replace(rows=torch.zeros(num_rows, 16, dtype=torch.int32), semaphores=semaphores)
    a = torch.zeros(4, len(sizes) * rank, inputs, dtype=dtype)
    x = torch.zeros(num_rows, inputs, dtype=dtype)
    shrunk = twin.shrink_triton(x, a, rows)
    if num_rows == 1 and (config := MODULES["linear.skinny_linear"].choose(x, weight := bf16(sum(sizes), inputs))):
        twin.linear_and_shrink_triton(x, weight, None, a, rows, config)
    b, bias = torch.zeros(4, sum(sizes), rank, dtype=dtype), torch.zeros(4, sum(sizes), dtype=dtype)
    twin.expand_triton(torch.zeros(num_rows, sum(sizes), dtype=dtype), shrunk, b, bias, sizes, rows, activation)


def mix_quantized_experts(
    num_tokens: int, kind: str, groups: int, has_zeros: bool, dtype: torch.dtype = torch.bfloat16, inputs: int = 256
) -> None:
    twin = MODULES["quantized_moe"]
    if kind == "fp8" and not twin.has_fp8(torch.device("cpu")):
        return

    def stack(rows: int, inputs: int) -> Stack:
        codes_dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kind, torch.uint8)
        codes = torch.zeros(8 * rows, inputs // 2 if codes_dtype == torch.uint8 else inputs, dtype=codes_dtype)
        if kind == "e2m1":
            return Stack(QuantizedWeight(codes, torch.zeros(8 * rows, inputs // 32, dtype=torch.uint8), None, 32), 8)
        zero = torch.zeros(8 * rows, groups, dtype=torch.int8) if has_zeros else None
        return Stack(QuantizedWeight(codes, torch.rand(8 * rows, groups), zero, inputs // groups), 8)

    x, ids, more = torch.randn(num_tokens, inputs).to(dtype), random_ids(num_tokens, 2, 8), ()
    up, down = stack(1024, inputs), stack(inputs, 512)
    if kind == "e2m1":
        more = Biases(*(torch.zeros(8, size, dtype=dtype) for size in (1024, inputs))), Gate("clamped", 1.7, 7.0)
        MODULES["linear.quantized_linear"].dequantize_triton(up.weight, dtype)
    twin.quantized_experts_triton(x, up, down, torch.rand(num_tokens, 2), ids, None, *more)


def route_tokens(name: str) -> None:
    logits, bias, routing = rule_inputs(name, 3)
    MODULES["routing"].route_triton(logits.bfloat16(), bias, routing)


def attend_latents(
    block_size: int, num_heads: int = 16, rank: int = 512, dtype: torch.dtype = torch.bfloat16, kind: str | None = None
) -> None:
    """Decodes beside a prompt, in two layers, and tokens one by one."""
    module = MODULES["attention.latent_attention"]
    case = make_case(
        [1, 1, 40], [90, 7, 60], num_heads=num_heads, num_kv_heads=1, head_dim=rank + 64, block_size=block_size,
        dtype=dtype,
    )  # fmt: skip
    case = coded(case, kind) if kind else case
    cache = LayerCache(case.kv_cache[:1], case.scales)
    shape, plans = case.shape(0.1)._replace(value_dim=rank), module.LatentPlans()
    for _ in range(2):
        module.latent_attention_triton(case.q, cache, case.meta, shape, plans)
    module.latent_attention_triton(case.q, cache, case.meta, shape, module.LatentPlans(), is_exact=True)


def attend_few_latents(num_heads: int, rank: int, is_neox: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    few, decode = MODULES["attention.latent_few"], MODULES["attention.latent_decode"]
    case = make_case([1], [90], num_heads=num_heads, num_kv_heads=1, head_dim=rank + 64, block_size=64, dtype=dtype)
    shape, cache = case.shape(0.1)._replace(value_dim=rank), LayerCache(case.kv_cache[:1])
    q, kv, matrix = (bf16(*size).to(dtype) for size in ((1, num_heads, 192), (1, rank + 64), (num_heads, 256, rank)))
    slots = torch.zeros(1, dtype=torch.int32)
    heads = HeadInputs(None if is_neox else torch.randn(1, 64), slots, k_norm_weight=kv[0, :rank], eps=1e-6)
    queries = few.query_few(q[..., :128], q[..., 128:], kv, heads, matrix, cache, is_neox)
    plan = decode.plan_latent_decode(case.meta, queries[..., :rank], cache)
    for is_settled in (False, True):
        few.attend_few(queries, matrix, cache, case.meta, shape, plan, 128, is_settled)


def store_latents(is_neox: bool, has_rotation: bool, cell_dtype: torch.dtype = torch.bfloat16) -> None:
    scales = None if cell_dtype == torch.bfloat16 else bf16(3, 1, 64, 2)
    cache, slots = LayerCache(bf16(1, 3, 1, 64, 576).to(cell_dtype), scales), torch.arange(5, dtype=torch.int32)
    heads = HeadInputs(torch.randn(5, 64) if has_rotation else None, slots, k_norm_weight=bf16(512), eps=1e-6)
    q, queries, kv = bf16(5, 16, 192)[..., 128:], bf16(5, 16, 576), bf16(5, 3648)[:, 3072:]
    MODULES["attention.latent_store"].latent_store_triton(queries[..., 512:], q, kv, heads, cache, is_neox)


def attend_to_whole_prompts(key_dim: int, value_dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
    module, meta = MODULES["attention.latent_whole"], make_case([5, 300], [5, 300]).meta
    q, kv, rope = (bf16(305, 16, size).to(dtype) for size in (key_dim + 64, key_dim + value_dim, 64))
    parts = q[..., :key_dim], q[..., key_dim:], kv, rope[:, 0]
    module.attend_whole(*parts, 0.1, meta, module.plan_whole(meta, parts[0]))


def multiply_by_head(num_rows: int, dtype: torch.dtype) -> None:
    MODULES["linear.head_linear"].head_linear_triton(
        bf16(num_rows, 16, 128).to(dtype), bf16(16, 128, 512).to(dtype), None
    )


def run_kimi_delta() -> None:
    case = make_states_case([1, 40], [50, 0])
    MODULES["kimi_delta"].kimi_delta_triton(*make_kimi_inputs(case, 8, 128, torch.bfloat16), case.step, False)


def add_up_and_norm(size: int, num_rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(num_rows, 4096).to(dtype), torch.randn(4096).to(dtype)
    memories, calls = torch.zeros(size, dtype=torch.int64), torch.zeros(128, dtype=torch.int32)
    MODULES["sum_norm"].sum_norm_triton(x, x, weight, 1e-6, bf16(96, 4096), memories, calls, 0, size, 64, num_rows < 9)


def multiply_in_one_order(num_rows: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x, weight, bias = bf16(num_rows, inputs).to(dtype), bf16(96, inputs).to(dtype), bf16(96).to(dtype)
    MODULES["batch_invariant.linear"].batch_invariant_linear_triton(x, weight, bias)


def sample(is_deterministic: bool) -> None:
    rows, state = torch.arange(3, dtype=torch.int32), DrawColumns(3, 151_936, "cpu")
    MODULES["sample"].sample_triton(bf16(3, 151_936), rows, rows, state.upload(), state.last_token, is_deterministic)


def edit_logits(dtype: torch.dtype) -> None:
    members, rows = torch.arange(3), torch.arange(3, dtype=torch.int32)
    words, counts = torch.zeros(3, 151_936 // 32, dtype=torch.int32), torch.zeros(3, 151_936, dtype=torch.int32)
    columns = DrawColumns(3, 151_936, "cpu").upload()
    MODULES["edit_logits"].edit_logits_triton(bf16(3, 151_936).to(dtype), members, rows, columns, counts, words, rows)


def draft_places() -> None:
    """The kernels of a step that verifies drafts, and of one that makes them as well."""
    places, rows = Places(*torch.arange(12, dtype=torch.int32).view(4, 3)), torch.arange(3, dtype=torch.int32)
    MODULES["draft_places"].prepare_places_triton(places, rows, torch.zeros(9, 8, dtype=torch.int32), 64, 8)
    MODULES["draft_places"].accept_drafts_triton(places, rows, rows, rows)
    given, drawn, drafts = (torch.zeros(shape, dtype=torch.int32) for shape in ((3, 5), (9, 5), (4, 3)))
    unseen = MODULES["draft_places"].find_unseen_triton(rows, rows, given, drawn, rows, 4)
    MODULES["draft_places"].draft_places_triton(unseen, drafts, rows)
    MODULES["draft_places"].draft_places_triton(unseen, drafts, None)
    MODULES["draft_places"].note_drawn_triton(torch.zeros(2, 15, dtype=torch.int32), rows, drawn, rows)


def prepare_inputs(new_blocks: Tensor | None) -> None:
    rows, starts = torch.arange(3, dtype=torch.int32), torch.tensor([0, 1, 2, 9], dtype=torch.int32)
    token_ids, tables = torch.zeros(9, dtype=torch.int32), torch.zeros(3, 8, dtype=torch.int32)
    MODULES["prepare_inputs"].prepare_inputs_triton(rows, starts, token_ids, rows, rows, tables, 64, 8, new_blocks)


def add_up(size: int, num_rows: int, dtype: torch.dtype) -> None:
    """By words up to 16 KB, and in bulk."""
    memories, calls = torch.zeros(size, dtype=torch.int64), torch.zeros(128, dtype=torch.int32)
    MODULES["all_reduce"].all_reduce_triton(
        torch.randn(num_rows, 4096).to(dtype), memories, calls, 0, size, 2**14, 2**21
    )


def convolve(lens: list[int], is_gated: bool, has_bias: bool) -> None:
    case = make_states_case(lens, [3] * len(lens))
    x, weight, bias = bf16(case.num_tokens, 3 * 256), bf16(3, 256), bf16(256) if has_bias else None
    MODULES["causal_conv"].causal_conv_triton(x, weight, bias, case.states(2, 256), case.step, is_gated=is_gated)


def run_delta_net(lens: list[int], is_exact: bool, dtype: torch.dtype = torch.bfloat16) -> None:
    case = make_states_case(lens, [3] * len(lens))
    inputs = make_inputs(case, (2, 4, 128, 128), dtype)
    MODULES["delta_net"].delta_net_triton(*inputs, case.step, is_exact)


def run_mamba2(lens: list[int], is_exact: bool, dtype: torch.dtype = torch.bfloat16, **options: bool) -> None:
    case = make_states_case(lens, [3] * len(lens))
    inputs = make_mamba2_inputs(case, (2, 4, 128, 64), dtype, **options)
    MODULES["mamba2"].mamba2_triton(*inputs, case.step, is_exact)


CALLS: dict[str, Callable[[], Any]] = {
    "all_reduce by words": lambda: add_up(2, 1, torch.bfloat16),
    "all_reduce in bulk, 4 ranks": lambda: add_up(4, 100, torch.bfloat16),
    "all_reduce in bulk, float32": lambda: add_up(2, 100, torch.float32),
    "sum_norm of a few rows": lambda: add_up_and_norm(2, 3, torch.bfloat16),
    "sum_norm of more, 4 ranks": lambda: add_up_and_norm(4, 9, torch.bfloat16),
    "sum_norm, float32": lambda: add_up_and_norm(2, 9, torch.float32),
    "all_gather": lambda: MODULES["all_gather"].all_gather_triton(
        bf16(3, 96),
        torch.zeros(8192, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(128, dtype=torch.int32),
        1,
        2,
        184,
        2048,
        1,
    ),
    "attention": lambda: attend(None, None, 128, 64),
    "attention, window, sinks": lambda: attend(100, None, 64, 64, has_sinks=True),
    "attention, softcap, odd sizes": lambda: attend(None, 50.0, 80, 24),
    "attention, window, softcap, wide heads": lambda: attend(100, 50.0, 256, 64),
    "attention, very wide heads": lambda: attend(None, None, 512, 64),
    "attention of a long prompt": lambda: attend(None, None, 128, 64, 1100),
    "attention of a long prompt, window": lambda: attend(100, None, 128, 64, 1100),
    "attention of long prompts on Hopper": lambda: attend_on_hopper(8, 128, 64),
    "attention of long prompts on Hopper, small heads and blocks, sinks": lambda: attend_on_hopper(14, 64, 16),
    "attention, float32": lambda: attend(None, None, 128, 64, dtype=torch.float32),
    "attention of many decodes": lambda: decode_many(20),
    "attention of shared prefixes": lambda: decode_cascade(None, 128, 64),
    "attention of shared prefixes, softcap, odd sizes, sinks": lambda: decode_cascade(50.0, 80, 16),
    "attention of shared prefixes, wide heads": lambda: decode_cascade(None, 256, 64),
    "attention of shared prefixes, float32": lambda: decode_cascade(None, 128, 64, torch.float32),
    "attention from the QKV product": lambda: decode_from_qkv(None, None, 128, 64),
    "attention from the QKV product, window, softcap, wide heads": lambda: decode_from_qkv(100, 50.0, 256, 64),
    "attention from the QKV product, very wide heads": lambda: decode_from_qkv(None, None, 512, 64),
    "moe, no gate": lambda: mix_experts(5, 8, 256, (None, Gate("relu2"))),
    "moe, gelu": lambda: mix_experts(5, 8, 256, (None, Gate("gelu_tanh"))),
    "attention from the QKV product, odd sizes, sinks": lambda: decode_from_qkv(None, None, 80, 24, has_more=False),
    "attention from the QKV product, float32": lambda: decode_from_qkv(None, None, 128, 64, dtype=torch.float32),
    **{
        f"{name}, {kind}": partial(function, *arguments, kind=kind)
        for kind in ("fp8", "bytes", "int8")
        for name, function, arguments in [
            ("attention", attend, (None, None, 128, 64, 1100 if kind == "fp8" else 40)),
            ("attention of many decodes", decode_many, (20,)),
            ("attention of shared prefixes", decode_cascade, (None, 128, 64)),
            ("attention from the QKV product", decode_from_qkv, (None, None, 128, 64)),
            ("qkv_rope_store", rotate_and_store, (True, True)),
        ]
    },
    "attention, fp8, window, softcap, wide heads": lambda: attend(100, 50.0, 256, 24, kind="fp8"),
    "attention, fp8, float32": lambda: attend(None, None, 128, 64, dtype=torch.float32, kind="fp8"),
    "attention of shared prefixes, fp8, float32": lambda: decode_cascade(None, 128, 64, torch.float32, "fp8"),
    "attention from the QKV product, fp8, float32": lambda: decode_from_qkv(
        None, None, 128, 64, dtype=torch.float32, kind="fp8"
    ),
    "latent attention": lambda: attend_latents(64),
    "latent attention, small blocks, few heads": lambda: attend_latents(16, num_heads=4),
    "latent attention, many heads": lambda: attend_latents(64, num_heads=128),
    "latent attention, a rank of 40": lambda: attend_latents(64, rank=40),
    **{f"latent attention, {kind}": partial(attend_latents, 64, kind=kind) for kind in ("fp8", "bytes", "int8")},
    "latent attention, float32": lambda: attend_latents(64, dtype=torch.float32),
    "latent attention, a few decodes": lambda: attend_few_latents(16, 512, False),
    "latent attention, a few decodes, a rank of 40": lambda: attend_few_latents(40, 40, True),
    "latent attention of whole prompts": lambda: attend_to_whole_prompts(128, 128),
    "latent attention of whole prompts, wide heads": lambda: attend_to_whole_prompts(192, 256),
    "latent attention of whole prompts, float32": lambda: attend_to_whole_prompts(128, 128, torch.float32),
    "latent_store": lambda: store_latents(is_neox=False, has_rotation=True),
    "latent_store, fp8": lambda: store_latents(False, True, torch.float8_e4m3fn),
    "latent_store, int8": lambda: store_latents(False, True, torch.int8),
    "latent_store, halves": lambda: store_latents(is_neox=True, has_rotation=False),
    "head_linear": lambda: multiply_by_head(3, torch.bfloat16),
    "head_linear of many rows": lambda: multiply_by_head(70, torch.bfloat16),
    "head_linear, float32": lambda: multiply_by_head(3, torch.float32),
    "qkv_rope_store": lambda: rotate_and_store(has_norm=False, has_rotation=False),
    "qkv_rope_store, norm, rotation": lambda: rotate_and_store(has_norm=True, has_rotation=True),
    "rms_norm of heads": lambda: MODULES["rms_norm"].rms_norm_triton(bf16(5, 8, 128), bf16(128), 1e-6),
    "add_rms_norm": lambda: MODULES["rms_norm"].add_rms_norm_triton(bf16(5, 4096), bf16(5, 4096), bf16(4096), 1e-6),
    "silu_and_mul": lambda: MODULES["silu_and_mul"].silu_and_mul_triton(bf16(5, 6144)),
    "gelu_and_mul": lambda: MODULES["silu_and_mul"].silu_and_mul_triton(bf16(5, 6144), gelu=True),
    "skinny_linear of a row": lambda: multiply(1, 1024),
    "gated_linear of a row": lambda: multiply(1, 4096, gated=True),
    "gated_linear of 2 rows": lambda: multiply(2, 4096, gated=True),
    "skinny_linear of 7 rows": lambda: multiply(7, 3072, has_bias=True),
    "skinny_linear of a long row": lambda: multiply(1, 12288),
    "gated_linear of 7 rows": lambda: multiply(7, 2048, gated=True),
    "skinny_linear of 16 rows, split": lambda: multiply(16, 4096),
    "skinny_linear of 64 rows, split": lambda: multiply(64, 2048, has_bias=True),
    "skinny_linear of 64 rows, held": lambda: multiply(64, 1024, has_bias=True),
    "gated_linear of 33 rows, held": lambda: multiply(33, 1024, has_bias=True, gated=True),
    "gated_linear of 16 rows, split": lambda: multiply(16, 1536, gated=True),
    "gated_linear of 33 rows, split": lambda: multiply(33, 2048, gated=True, gelu=True),
    "skinny_linear of 64 rows, in chunks": lambda: multiply_in_chunks(64, gated=False),
    "gated_linear of 32 rows, in chunks": lambda: multiply_in_chunks(32, gated=True),
    "rms_norm_linear of 7 rows": lambda: normalize_and_multiply(7, 1024, False, False, False),
    "rms_norm_gated_linear of a row": lambda: normalize_and_multiply(1, 304, True, True, True),
    "rms_norm_gated_linear of 3 rows": lambda: normalize_and_multiply(3, 304, True, True, True),
    "rms_norm_gated_linear of 7 rows": lambda: normalize_and_multiply(7, 1008, True, True, True),
    "batch-invariant attention of a token": lambda: attend_in_one_order(torch.bfloat16),
    "batch-invariant attention of a token, float32": lambda: attend_in_one_order(torch.float32),
    "batch_invariant_linear": lambda: multiply_in_one_order(5, 200),
    "batch_invariant_linear of a few rows": lambda: multiply_in_one_order(64, 1040),
    "batch_invariant_linear of some rows": lambda: multiply_in_one_order(65, 256),
    "batch_invariant_linear of many rows": lambda: multiply_in_one_order(1025, 256),
    "batch_invariant_linear, spans shared": lambda: multiply_in_one_order(65, 1536),
    "batch_invariant_linear, spans in turn": lambda: multiply_in_one_order(600, 1536),
    "batch_invariant_linear in float32": lambda: multiply_in_one_order(5, 200, torch.float32),
    "int4, groups, zeros": lambda: multiply_codes(3, "int4", 128, more=True),
    "int4, small groups, 64 rows": lambda: multiply_codes(64, "int4", 32),
    "int4, groups, float16": lambda: multiply_codes(3, "int4", 128, dtype=torch.float16),
    "int8, a scale an output": lambda: multiply_codes(3, "int8", None),
    "int8, float16": lambda: multiply_codes(3, "int8", None, dtype=torch.float16),
    "int8, groups, zeros": lambda: multiply_codes(40, "int8", 64, more=True),
    "fp8, a scale an output": lambda: multiply_codes(3, "fp8", None),
    "fp8, groups": lambda: multiply_codes(64, "fp8", 128),
    "int4 of a row, groups, zeros": lambda: multiply_codes(1, "int4", 128, more=True),
    "int4 of a row, float16": lambda: multiply_codes(1, "int4", 128, dtype=torch.float16),
    "int4 of a row, a chunk that is not full": lambda: multiply_codes(1, "int4", 128, more=True, inputs=1280),
    "int8 of a row": lambda: multiply_codes(1, "int8", None),
    "fp8 of a row": lambda: multiply_codes(1, "fp8", None),
    "int4 of a row, norm and gate": lambda: multiply_a_row("int4", 2048, False, None, "silu"),
    "int8 of a row, norm, rounded by a given scale": lambda: multiply_a_row(
        "int8", 1024, False, RowRounding("int8", None, torch.rand(1)), None
    ),
    "int8 of a row, norm, rounded by groups": lambda: multiply_a_row(
        "int8", 1024, True, RowRounding("int8", 128), "gelu_tanh"
    ),
    "int8 of a row, norm, rounded": lambda: multiply_a_row("int8", 1024, True, RowRounding("int8"), None),
    "fp8 of a row, norm, rounded, gate": lambda: multiply_a_row("fp8", 1024, True, RowRounding("fp8"), "silu"),
    "inputs in fp8": lambda: round_inputs("fp8", None, None),
    "inputs in fp8, groups": lambda: round_inputs("fp8", 128, None),
    "inputs in int8": lambda: round_inputs("int8", None, None),
    "inputs in int8, static": lambda: round_inputs("int8", None, torch.ones(1)),
    **{f"routing, {name}": (lambda name=name: route_tokens(name)) for name in RULES},
    "adapters of a row": lambda: adapt(1, (4096, 1024, 1024)),
    "adapters of a row, gated": lambda: adapt(1, (12288, 12288), "silu"),
    "adapters of a long row": lambda: adapt(1, (4096,), inputs=12288, rank=48),
    "adapters of 40 rows": lambda: adapt(40, (200, 40, 40), inputs=4000, rank=48),
    "adapters of 600 rows, gated, float32": lambda: adapt(600, (96, 96), "gelu_tanh", rank=32, dtype=torch.float32),
    "moe, a token": lambda: mix_experts_of_a_token(512, Gate(), False),
    "moe, a token, biases, clamped gate": lambda: mix_experts_of_a_token(0, Gate("clamped", 1.7, 7.0), True),
    "moe, a token, no gate": lambda: mix_experts_of_a_token(0, Gate("relu2"), True),
    **{
        f"router, {name}, {dtype}": partial(route_after_norm, name, dtype)
        for name, dtype in zip(RULES, (torch.bfloat16, torch.float32), strict=False)
    },
    "moe, blocks of 16": lambda: mix_experts(5, 8, 200),
    "moe, blocks of 64": lambda: mix_experts(80, 2, 256),
    "moe, blocks of 128": lambda: mix_experts(200, 2, 256),
    "short_conv of decodes": lambda: convolve([1, 1, 1], is_gated=True, has_bias=False),
    "short_conv": lambda: convolve([1, 40], is_gated=True, has_bias=True),
    "conv_silu": lambda: convolve([1, 40], is_gated=False, has_bias=False),
    "mamba2 of decodes": lambda: run_mamba2([1, 1], is_exact=False),
    "mamba2 of decodes, norm apart": lambda: run_mamba2([1, 1], is_exact=False, has_norm=False, has_bias=False),
    "mamba2 of prompts": lambda: run_mamba2([1, 70], is_exact=False),
    "mamba2 of prompts, float32": lambda: run_mamba2([1, 70], is_exact=False, dtype=torch.float32),
    "mamba2, exact, float32": lambda: run_mamba2([1, 70], is_exact=True, dtype=torch.float32),
    "kimi_delta": run_kimi_delta,
    "delta_net of decodes": lambda: run_delta_net([1, 1], is_exact=False),
    "delta_net of prompts": lambda: run_delta_net([1, 70], is_exact=False),
    "delta_net of prompts, float32": lambda: run_delta_net([1, 70], is_exact=False, dtype=torch.float32),
    "delta_net of prompts, exact": lambda: run_delta_net([1, 70], is_exact=True),
    "moe in int4, a token": lambda: mix_quantized_experts(1, "int4", 2, True),
    "moe in int4, blocks of 64": lambda: mix_quantized_experts(200, "int4", 2, True),
    "moe in int4, float16": lambda: mix_quantized_experts(5, "int4", 1, False, torch.float16),
    "moe in e2m1": lambda: mix_quantized_experts(5, "e2m1", 8, False),
    "moe in e2m1, a token": lambda: mix_quantized_experts(1, "e2m1", 8, False, inputs=1280),  # whole steps, and a part
    "moe in e2m1, blocks of 64": lambda: mix_quantized_experts(200, "e2m1", 8, False),
    "moe in e2m1, float16": lambda: mix_quantized_experts(5, "e2m1", 8, False, torch.float16),
    "moe, biases, clamped gate": lambda: mix_experts(
        5, 8, 256, (Biases(bf16(8, 512), bf16(8, 256)), Gate("clamped", 1.7, 7.0))
    ),
    "moe in int8": lambda: mix_quantized_experts(5, "int8", 1, True),
    "moe in fp8": lambda: mix_quantized_experts(5, "fp8", 2, False),
    "sample": lambda: sample(is_deterministic=False),
    "sample, deterministic": lambda: sample(is_deterministic=True),
    "top_logprobs": lambda: MODULES["top_logprobs"].top_logprobs_triton(
        bf16(3, 151_936), torch.zeros(3, dtype=torch.int32), torch.arange(3), 5
    ),
    "edit_logits": lambda: edit_logits(torch.bfloat16),
    "edit_logits, float32": lambda: edit_logits(torch.float32),
    "gather_rows": lambda: MODULES["gather_rows"].gather_rows_triton(bf16(9, 1024), torch.arange(3, dtype=torch.int32)),
    "draft_places": draft_places,
    "copy_states": lambda: MODULES["copy_states"].copy_states_triton(
        torch.zeros(2, 4, 9000), torch.arange(2, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    ),
    "prepare_inputs": lambda: prepare_inputs(None),
    "prepare_inputs, new blocks": lambda: prepare_inputs(torch.arange(3, dtype=torch.int32)),
}

FAST_ATTENTION = [
    call for call in CALLS if call.startswith("attention") and not call.endswith(("float32", "wide heads"))
]


# --- launches that end where compiling ends ------------------------------------------------------


class NoDevice:
    """What the compiler asks of Triton's driver. Kernels are kept by device, and each of these is one of its own."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> "NoDevice":
        return self

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass(repr=False)
class Compiled:
    """What all calls gave for the targets of one kind.

    launches: compute capability, names of kernel and call, and the compiled kernel. places: where in each function the
    compiler has been, as line and column from the decorator on.
    """

    is_hopper: bool
    errors: list[Exception] = field(default_factory=list)
    launches: list[tuple[int, str, str, Any]] = field(default_factory=list)
    places: dict[str, set[tuple[int, int]]] = field(default_factory=lambda: {name: set() for name in FUNCTIONS})


def statements_for_hopper(function: ast.stmt) -> Iterator[ast.AST]:
    """What a kernel does only where it may start early, load tiles whole, convert FP8 or multiply by warp groups."""
    for node in ast.walk(function):
        if isinstance(node, ast.If) and any(
            word in ast.unparse(node.test) for word in ("PDL", "cache_desc", "IS_FP8", "WARP_GROUPS")
        ):
            for statement in node.body:
                yield from ast.walk(statement)


def full_name(function: Any) -> str:
    return f"{function.module}.{function.fn.__name__}"


@pytest.fixture(scope="module", params=TARGETS, ids=lambda targets: " and ".join(f"sm_{number}" for number in targets))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    compiled = Compiled(is_hopper=90 in request.param)
    run, visit, compile_kernel = JITFunction.run, CodeGenerator.visit, triton.compiler.compile
    kernels: dict[Any, Any] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.launches.append((capability, full_name(self), call, binary))

    def compile_once(source: Any, target: Any, options: dict[str, Any], **more: Any) -> Any:
        """For sm_86, what is asked of it as of sm_80 is the same code."""
        key = source.hash(), repr(sorted((name, value) for name, value in options.items() if name != "arch"))
        if key not in kernels:
            kernels[key] = compile_kernel(source, target=target, options=options, **more)
        return kernels[key]

    def visit_and_note(self: Any, node: Any) -> Any:
        if hasattr(node, "lineno") and full_name(self.jit_fn) in FUNCTIONS:
            compiled.places[full_name(self.jit_fn)].add((node.lineno, node.col_offset))
        return visit(self, node)

    for capability in request.param:
        with pytest.MonkeyPatch.context() as patch, knobs.cache.scope():
            knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))  # a kernel from an older cache has no places
            patch.setattr(driver, "_active", NoDevice(capability))
            patch.setattr(JITFunction, "run", compile_only)
            patch.setattr(CodeGenerator, "visit", visit_and_note)
            patch.setattr(triton.compiler, "compile", compile_once)
            answers = {
                "has_dependent_launch": capability >= 90,
                "has_tile_loads": capability >= 90,
                "has_fp8": capability >= 89,
                "has_warp_groups": capability >= 90,
                "has_large_shared_memory": SHARED_MEMORY[capability] > 160 * 1024,
                "has_largest_shared_memory": SHARED_MEMORY[capability] > 224 * 1024,
            }
            for module, (question, answer) in product(MODULES.values(), answers.items()):
                if hasattr(module, question):
                    patch.setattr(module, question, lambda device, answer=answer: answer)
            for call, function in CALLS.items():
                try:
                    function()
                except Exception as error:
                    error.add_note(f"in the call of {call!r} for sm_{capability}")
                    compiled.errors.append(error)
    return compiled


def test_every_launch_compiles(compiled: Compiled) -> None:
    if compiled.errors:
        raise ExceptionGroup("some calls do not compile", compiled.errors)


def test_every_kernel_is_launched(compiled: Compiled) -> None:
    """What is launched is named _kernel, and nothing that is so named is left out; other functions belong to those."""
    launched = {name for _, name, _, binary in compiled.launches if binary.asm["cubin"]}
    known = {name for name in FUNCTIONS if name.endswith("_kernel")}
    assert launched == {name for name in known if HOPPER_ONLY not in name or compiled.is_hopper}


def test_every_line_is_compiled(compiled: Compiled) -> None:
    """Branches that no call takes are not known to compile. Where this fails, a call is missing in CALLS."""
    missed = []
    for name, function in FUNCTIONS.items():
        body = function.parse().body[0]
        is_for_hopper = name.endswith(FOR_HOPPER) or HOPPER_ONLY in name
        for_hopper = ast.walk(body) if is_for_hopper else statements_for_hopper(body)
        spared = {id(node) for node in for_hopper} if not compiled.is_hopper else set()
        for node in ast.walk(body):
            branches = [node] if isinstance(node, ast.stmt) else []
            branches += [node.body, node.orelse] if isinstance(node, ast.IfExp) else []
            missed += [
                f"{name}: {ast.unparse(branch)}"
                for branch in branches
                if id(branch) not in spared and (branch.lineno, branch.col_offset) not in compiled.places[name]
            ]
    assert not missed


def test_shared_memory_suffices(compiled: Compiled) -> None:
    sizes = {tuple(place): binary.metadata.shared for *place, binary in compiled.launches}
    assert {place: size for place, size in sizes.items() if size > SHARED_MEMORY[place[0]]} == {}


def test_states_are_multiplied_without_warpgroups(compiled: Compiled) -> None:
    """See CHUNK in `delta_net.py`."""
    chunks = [(kernel, binary) for _, kernel, _, binary in compiled.launches if kernel.endswith("_chunks_kernel")]
    assert len({kernel for kernel, _ in chunks}) == 6
    assert [kernel for kernel, binary in chunks if "wgmma" in binary.asm["ptx"]] == []


def test_registers_suffice_for_attention(compiled: Compiled, tmp_path: Path) -> None:
    """What does not fit into them is kept on the stack, at many times the cost. float32 and wide heads do so."""
    stacks, file = {}, tmp_path / "kernel.cubin"
    for capability, kernel, call, binary in compiled.launches:
        if ".triton.attention." in kernel and call in FAST_ATTENTION and capability >= 90:
            file.write_bytes(binary.asm["cubin"])
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
            usage = re.search(
                r"STACK:(\d+)", subprocess.run(command, check=True, capture_output=True, text=True).stdout
            )
            assert usage is not None
            stacks[kernel, call] = int(usage[1])
    # Two numbers that one of Hopper's consumers needs before its loop and behind it are worth no other shape.
    assert {place: size for place, size in stacks.items() if size > 8 * (HOPPER_ONLY in place[0])} == {}


def test_softmax_runs_beside_a_product_on_hopper(compiled: Compiled, tmp_path: Path) -> None:
    """Of two waits for the tensor cores, for scores and for the output before them, the second stands behind the
    exponents of a tile of 64 x 128 scores, 64 for each of 128 threads, where the assembler would not put it."""
    kernels = [binary for _, name, _, binary in compiled.launches if HOPPER_ONLY in name]
    assert bool(kernels) == compiled.is_hopper
    for binary in kernels:
        (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(tmp_path / "kernel.cubin")]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        loops = re.findall(r"DEPBAR\.LE gsb0, 0x1.*?DEPBAR\.LE gsb0, 0x0", code, re.DOTALL)
        assert [loop.count("MUFU.EX2") >= 64 for loop in loops] == [True, True]  # of both consumers
