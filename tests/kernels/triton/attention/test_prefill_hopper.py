"""Attention of long prompts on Hopper GPUs against the reference, and which layers and devices it is for."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm.kernels.attention_types import AttentionShape, LayerCache
from nanovllm.kernels.paged_attention import paged_attention_reference
from tests.attention.paged_cases import make_case
from tests.kernels.twins import DEVICE, TOLERANCE, load_twin, relative_error, twin_test

paged, limits = load_twin("attention.paged_attention"), load_twin("common.device_limits")
pytestmark = twin_test

SHAPE = AttentionShape(num_heads=8, num_kv_heads=4, head_dim=128, scale=0.1)


def long_prompts(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 128,
        "block_size": 64,
        "dtype": torch.bfloat16,
        "layout": "heads outside",
    }
    return make_case([1, 5, 700, 130], [100, 5, 900, 1024], **(options | changes))


@pytest.mark.skipif(
    not (torch.cuda.is_available() and limits.has_hopper_gluon(DEVICE)), reason="needs a Hopper GPU and a known Gluon"
)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [
        (8, 4, 128, 64, torch.bfloat16),
        (8, 2, 128, 32, torch.float16),
        (14, 2, 64, 64, torch.bfloat16),
        (4, 4, 64, 8, torch.bfloat16),
        (3, 1, 128, 16, torch.bfloat16),
    ],
)
def test_rows_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
) -> None:
    """Tiles that end with a prompt or in the middle of one; NaN in all cells of nobody."""
    from nanovllm.kernels.triton.attention import prefill_hopper

    monkeypatch.setattr(prefill_hopper, "LONG_PROMPT", 1)
    case = long_prompts(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
    )
    case.poison_unused()
    shape = case.shape(head_dim**-0.5)
    sinks = torch.linspace(-3, 4, num_heads) if block_size == 64 else None
    want = paged_attention_reference(case.q.float(), LayerCache(case.kv_cache.float()), case.meta, shape, sinks)
    case = case.to(DEVICE)
    plans, sinks = paged.StepPlans(), None if sinks is None else sinks.to(DEVICE)
    got = paged.paged_attention_triton(case.q, case.cache, case.meta, shape, plans, sinks)
    assert list(plans.prefill) == [True]
    assert relative_error(got.cpu(), want) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("changes", "is_taken"),
    [
        ({}, True),
        ({"mean_query_len": 100}, False),
        ({"window": 100}, False),
        ({"softcap": 30.0}, False),
        ({"head_dim": 80}, False),
        ({"head_dim": 64}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, True),
        ({"block_size": 24}, False),
        ({"block_size": 16}, True),
        ({"is_scaled": True}, False),
        ({"layout": "tokens outside"}, False),
    ],
)
def test_what_it_is_for(changes: dict[str, Any], is_taken: bool) -> None:
    from nanovllm.kernels.triton.attention.prefill_hopper import is_for_hopper

    of_case = {name: changes[name] for name in ("head_dim", "dtype", "block_size", "layout") if name in changes}
    case = long_prompts(**of_case)
    scales = torch.ones(*case.kv_cache.shape[1:4], 2) if changes.get("is_scaled") else None
    shape = case.shape(0.1, changes.get("window"), changes.get("softcap"))
    cache = LayerCache(case.kv_cache, scales)
    assert is_for_hopper(cache, shape, changes.get("mean_query_len", 4096)) is is_taken


@pytest.mark.parametrize(
    ("capability", "version", "is_known"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.9.1", False), ((8, 0), "3.6.0", False), ((10, 0), "3.6.0", False)],
)
def test_other_devices_and_versions_of_gluon_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], version: str, is_known: bool
) -> None:
    monkeypatch.setattr(limits, "compute_capability", lambda device: capability)
    monkeypatch.setattr(limits, "version", lambda package: version)
    assert limits.has_hopper_gluon.__wrapped__(torch.device("cuda")) is is_known
    assert not limits.has_hopper_gluon.__wrapped__(torch.device("cpu"))


def test_layers_of_a_step_have_a_plan_for_each_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a window between others: each kernel finds its own order of tiles, made once."""
    from nanovllm.kernels.triton.attention import prefill_hopper

    launched: list[tuple[str, Any]] = []
    monkeypatch.setattr(paged, "has_hopper_gluon", lambda device: True)
    monkeypatch.setattr(prefill_hopper, "LONG_PROMPT", 1)
    monkeypatch.setattr(prefill_hopper, "prefill_attention_hopper", lambda *args: launched.append(("hopper", args[4])))
    monkeypatch.setattr(paged, "prefill_attention", lambda *args: launched.append(("any", args[4])))
    monkeypatch.setattr(paged, "plan_prefill", lambda *args: object())
    case, plans = long_prompts(), paged.StepPlans()
    meta = replace(case.meta, num_decodes=0)
    for window in (None, 100, None, 100):
        paged.paged_attention_triton(case.q, case.cache, meta, case.shape(0.1, window), plans)
    assert [name for name, _ in launched] == ["hopper", "any"] * 2
    assert launched[0][1] is launched[2][1] and launched[1][1] is launched[3][1] and len(plans.prefill) == 2
