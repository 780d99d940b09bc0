"""What tests of the whole engine check again and again."""

from nanovllm import LLM


def check_nothing_is_left(llm: LLM) -> None:
    """No request, no block, no half-decoded text."""
    assert not llm.has_unfinished_requests()
    metrics = llm.get_metrics()
    assert metrics["num_free_blocks"] == metrics["num_blocks"]
    assert llm.step() == []
    assert not llm._output_processor._texts and not llm._output_processor._logprobs
