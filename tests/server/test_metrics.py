from collections import defaultdict

import pytest

pytest.importorskip("prometheus_client")
from nanovllm.server.metrics import Metrics


def test_counters_of_speculation_have_vllms_names() -> None:
    engine: dict[str, float] = defaultdict(float, num_blocks=8, num_free_blocks=8)
    assert "spec_decode" not in Metrics("m", {}).render(engine).decode()
    engine |= {"spec_decode_num_drafts": 5, "spec_decode_num_draft_tokens": 15, "spec_decode_num_accepted_tokens": 9}
    engine |= {f"spec_decode_num_accepted_tokens_per_pos_{position}": 4 - position for position in range(3)}
    text = Metrics("m", {}).render(engine).decode()
    for line in (
        'vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 5.0',
        'vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 15.0',
        'vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 9.0',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 2.0',
    ):
        assert line in text
