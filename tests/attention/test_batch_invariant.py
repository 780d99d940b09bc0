from dataclasses import replace

import pytest
import torch

from nanovllm.attention.batch_invariant import BatchInvariantBackend, cpp_or_reference
from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from nanovllm.kernels.paged_attention import paged_attention_reference
from tests.attention.paged_cases import make_case


@pytest.mark.parametrize("is_cpp", [True, False])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("query_lens", "seq_lens"), [([1, 1, 1], [3, 40, 1]), ([9], [9]), ([1, 6, 20], [12, 30, 20])])
def test_it_equals_the_reference_and_a_chunk_equals_its_tokens(
    query_lens: list[int], seq_lens: list[int], window: int | None, is_cpp: bool
) -> None:
    """Close to attention over whole prompts; to the bit, the same for a chunk and for its last token as a decode."""
    case = make_case(query_lens, seq_lens, layout="heads outside")
    backend = BatchInvariantBackend(cpp_or_reference(load_cpu_kernels() if is_cpp else None))
    shape, sinks = case.shape(0.3, window), torch.linspace(-3, 2, 6) if window else None
    out = backend.forward(shape, case.q, case.cache, backend.prepare(case.meta), sinks)
    expected = paged_attention_reference(case.q, case.cache, case.meta, shape, sinks)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    decode = cpp_or_reference(load_cpu_kernels() if is_cpp else None)
    ends = torch.tensor(query_lens).cumsum(0) - 1
    starts = torch.arange(len(ends) + 1)
    last = decode(case.q[ends], case.cache, replace(case.meta, query_start_loc=starts), shape, sinks)
    assert torch.equal(out[ends], last)
