"""Bytes, operations and the floor, against numbers worked out by hand."""

from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.roofline.ceilings import measure_ceilings
from nanovllm.roofline.model_size import model_size
from nanovllm.roofline.roofline import Ceilings, ModelSize, Work, count_bytes, count_flops, report
from tests.tiny_models import save_random

SIZE = ModelSize(
    num_weights=1000,
    num_head_weights=100,
    weight_bytes=2200,
    kv_bytes_per_token=16,
    num_layers=3,
    num_heads=4,
    head_dim=8,
)
WORK = Work(
    num_steps=5, num_tokens_computed=30, num_tokens_sampled=7, num_context_tokens_read=200, num_query_key_pairs=400
)


def test_bytes_are_weights_of_every_step_and_keys_and_values() -> None:
    assert count_bytes(WORK, SIZE) == 5 * 1100 * 2 + (200 + 30) * 16


def test_operations_are_products_and_attention() -> None:
    assert count_flops(WORK, SIZE) == 2 * (30 * 1000 + 7 * 100) + 4 * 400 * 4 * 8 * 3


@pytest.mark.parametrize(("bandwidth", "peak"), [(1e3, 1e9), (1e9, 1e3)])
def test_the_floor_is_the_longer_of_reading_and_computing(bandwidth: float, peak: float) -> None:
    ceilings = Ceilings(bytes_per_second=bandwidth, flops_per_second=peak)
    found = report(WORK, SIZE, ceilings, seconds=1000.0)
    assert found["floor_seconds"] == max(count_bytes(WORK, SIZE) / bandwidth, count_flops(WORK, SIZE) / peak)
    assert found["share_of_floor"] == max(found["share_of_bandwidth"], found["share_of_flops"])
    assert found["bytes_per_second"] == count_bytes(WORK, SIZE) / 1000


@pytest.mark.parametrize("tied", [True, False])
def test_size_and_work_of_a_real_model(tmp_path: Path, tied: bool) -> None:
    folder = save_random(tmp_path, tie_word_embeddings=tied)
    with LLM(str(folder), device="cpu", skip_tokenizer_init=True, num_gpu_blocks_override=64) as llm:
        size = model_size(llm.model_config, None, "auto")
        before = llm.get_metrics()
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        llm.generate([[1, 2, 3, 4], [5]], params, use_tqdm=False)
        work = Work.between(before, llm.get_metrics())
    qkv, out, mlp = 32 * (4 + 2 * 2) * 8, 32 * 32, 3 * 32 * 48
    assert size.num_weights == 2 * (qkv + out + mlp)
    assert size.num_head_weights == 128 * 32
    assert size.weight_bytes == 4 * (size.num_weights + size.num_head_weights)
    assert (size.num_layers, size.num_heads, size.head_dim) == (2, 4, 8)
    assert size.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert work == Work(
        num_steps=3,
        num_tokens_computed=5 + 2 + 2,
        num_tokens_sampled=6,
        num_context_tokens_read=(4 + 1) + (5 + 2) + (6 + 3),
        num_query_key_pairs=(1 + 2 + 3 + 4 + 1) + (5 + 2) + (6 + 3),
    )


def test_ceilings_are_of_a_computers_size() -> None:
    ceilings = measure_ceilings("cpu", "float32")
    assert 1e8 < ceilings.bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second < 1e15


def test_of_experts_those_of_one_token_count(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 5, "num_experts_per_tok": 2, "num_hidden_layers": 3}
    folder = save_random(tmp_path, "MixtralForCausalLM", **sizes)
    with LLM(str(folder), device="cpu", skip_tokenizer_init=True) as llm:
        size = model_size(llm.model_config, None, "auto")
    attention, router, expert = 32 * (32 + 16 + 16 + 32), 5 * 32, 3 * 48 * 32
    assert size.num_weights == 3 * (attention + router + 2 * expert)


@pytest.mark.gpu
def test_ceilings_of_a_gpu() -> None:
    ceilings = measure_ceilings("cuda", "bfloat16")
    assert 1e11 < ceilings.bytes_per_second < 2e13
    assert 1e13 < ceilings.flops_per_second < 1e16
