import pytest
import torch

from nanovllm.kernels.attention_types import AttentionMetadata, LayerCache
from nanovllm.kernels.paged_attention import paged_attention_reference
from tests.attention.paged_cases import make_case
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, TOLERANCE, load_twin, relative_error, twin_test

pytestmark = twin_test
twin = load_twin("batch_invariant.attention")

QUERY_LENS, SEQ_LENS = [1, 1, 3, 43], [40, 3, 40, 70]


def batch(query_lens: list[int], seq_lens: list[int], table: torch.Tensor) -> AttentionMetadata:
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(DEVICE)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    return AttentionMetadata(
        query_start_loc=starts, seq_lens=lens, block_table=table.contiguous(),
        slot_mapping=torch.empty(0, dtype=torch.int64), num_decodes=0, num_reqs=len(lens),
        max_query_len=max(query_lens), query_lens_host=query_lens, seq_lens_host=seq_lens,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "softcap", "block_size", "head_dim"), [(None, None, 8, 16), (11, None, 64, 24), (None, 5.0, 8, 16)]
)
def test_twin_equals_the_reference_and_a_token_is_the_same_in_any_batch(
    dtype: torch.dtype, window: int | None, softcap: float | None, block_size: int, head_dim: int
) -> None:
    """To the bit: a prompt whole, in chunks and one token at a time, beside others and alone."""
    case = make_case(QUERY_LENS, SEQ_LENS, dtype=dtype, block_size=block_size, head_dim=head_dim)
    shape = case.shape(0.3, window, softcap)
    sinks = torch.linspace(-3, 2, 6, device=DEVICE) if window else None
    expected = paged_attention_reference(
        case.q.float(), LayerCache(case.kv_cache.float()), case.meta, shape, None if sinks is None else sinks.cpu()
    )
    q, cache, table = case.q.to(DEVICE), LayerCache(case.kv_cache.to(DEVICE)), case.meta.block_table.to(DEVICE)
    out = twin.batch_invariant_attention_triton(q, cache, batch(QUERY_LENS, SEQ_LENS, table), shape, sinks=sinks)
    assert relative_error(out.cpu(), expected) < TOLERANCE[dtype]

    alone = twin.batch_invariant_attention_triton(q[5:], cache, batch([43], [70], table[3:]), shape, sinks=sinks)
    assert torch.equal(alone, out[5:])
    lens = [9, 1, 1, 32]
    ends = [27 + sum(lens[: i + 1]) for i in range(4)]
    chunks = batch(lens, ends, table[3:].expand(4, -1))
    assert torch.equal(twin.batch_invariant_attention_triton(q[5:], cache, chunks, shape, sinks=sinks), out[5:])
    some, requests = [0, 1, 4, 5, 26, 47], [0, 1, 2, 3, 3, 3]
    each = batch([1] * 6, [40, 3, 40, 28, 49, 70], table[requests])
    assert torch.equal(twin.batch_invariant_attention_triton(q[some], cache, each, shape, sinks=sinks), out[some])
    each.seq_lens[3] = 0
    assert not twin.batch_invariant_attention_triton(q[some], cache, each, shape, sinks=sinks)[3].any(), "padding"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 90])
def test_programs_that_share_a_context_leave_the_bits_of_one_that_has_it_alone(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to six chunks, or more; the last layer's counters are those of the next."""
    monkeypatch.setattr(twin, "CHUNK", 32)
    length = 190 if INTERPRETED else 700
    case = make_case([length], [length], dtype=dtype, block_size=16, head_dim=16)
    shape = case.shape(0.3, window)
    expected = paged_attention_reference(case.q.float(), LayerCache(case.kv_cache.float()), case.meta, shape)
    q, cache, table = case.q.to(DEVICE), LayerCache(case.kv_cache.to(DEVICE)), case.meta.block_table.to(DEVICE)
    whole = twin.batch_invariant_attention_triton(q, cache, batch([length], [length], table), shape)
    assert relative_error(whole.cpu(), expected) < TOLERANCE[dtype]
    for tokens in ([20], [70], [length - 1], [187, 188, 189]):
        plan = twin.StepPlan()
        decodes = batch([1] * len(tokens), [token + 1 for token in tokens], table.expand(len(tokens), -1))
        for _ in range(2):
            got = twin.batch_invariant_attention_triton(q[tokens], cache, decodes, shape, plan)
            assert torch.equal(got, whole[tokens])
        assert (plan.parts is None or plan.parts.num_splits > 1) and (len(tokens) > 1 or plan.parts is not None)
        assert plan.parts is None or not plan.parts.arrived.any()
