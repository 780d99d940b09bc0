"""A KV cache in 8 bits: the same tokens however the engine runs, and near the plain cache's log-probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.cache_specs import group_layers
from nanovllm.runner.kv_cache import KVCacheSpec
from tests.test_llm_equality import NUM_OUTPUT, PROMPTS, make_llm, tokens
from tests.tiny_models import save_random

GREEDY = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT)
KINDS = ["fp8", "int8"]
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"num_key_value_heads": 1},
    "Gemma3ForCausalLM": {"sliding_window": 12, "num_hidden_layers": 4},  # layers that share blocks
    "DeepseekV2ForCausalLM": {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "q_lora_rank": None},  # two scales of a row
    "Gemma4ForCausalLM": {  # heads of two sizes and numbers; layers 4 and 5 read 2 and 3
        **{"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
        **{"num_kv_shared_layers": 2, "num_key_value_heads": 4, "num_global_key_value_heads": 1},
        **{"attention_k_eq_v": True, "sliding_window": 20, "final_logit_softcapping": None},
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_how_the_engine_runs(folder: Path, kind: str) -> None:
    """Alone; and in batches, in chunks, with overlap, after preemptions, and from blocks that are in the cache."""
    with make_llm(folder, kv_cache_dtype=kind, enable_prefix_caching=False, max_num_seqs=1) as llm:
        alone = [tokens(llm, [prompt], GREEDY)[0] for prompt in PROMPTS]
        assert f"kv_cache_dtype={kind!r}" in repr(llm)
    limits = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "max_model_len": 64, "overlap_depth": 2}
    with make_llm(folder, kv_cache_dtype=kind, num_gpu_blocks_override=14, **limits) as llm:
        assert tokens(llm, PROMPTS, GREEDY) == alone
        assert tokens(llm, PROMPTS, GREEDY) == alone
        metrics = llm.get_metrics()
        assert metrics["num_preemptions"] > 0 and metrics["num_prompt_tokens_cached"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_hit_is_a_miss_to_the_bit(folder: Path, kind: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, logprobs=2)

    def logprobs(llm: LLM, prompts: list[list[int]]) -> list[Any]:
        return [output.outputs[0].logprobs for output in llm.generate(prompts, params, use_tqdm=False)]

    with make_llm(folder, kv_cache_dtype=kind, deterministic=True) as llm:
        missed = logprobs(llm, PROMPTS[6:7])
        assert logprobs(llm, PROMPTS[4:9])[2:3] == missed
        assert llm.get_metrics()["num_prompt_tokens_cached"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_near_those_of_a_plain_cache(qwen: Path, kind: str) -> None:
    params, prompt, values = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), PROMPTS[6], []
    for dtype in ("auto", kind):
        with make_llm(qwen, kv_cache_dtype=dtype) as llm:
            (output,) = llm.generate([prompt], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        values.append([next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry])
    differences = [abs(a - b) for a, b in zip(*values, strict=True)]
    assert 0 < max(differences) < (0.6 if kind == "fp8" else 0.1)  # random weights: large logits


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "DeepseekV2ForCausalLM"])
def test_more_tokens_fit(architecture: str, tmp_path: Path) -> None:
    """Two scales of a token and head, for a key and a value, or for a row that is both."""
    folder, numbers = save_random(tmp_path, architecture, **FAMILIES[architecture]), []
    for dtype in ("auto", "fp8"):
        with make_llm(folder, dtype="bfloat16", kv_cache_dtype=dtype, kv_cache_memory_bytes=1 << 20) as llm:
            numbers.append(llm.num_kv_cache_tokens)
            config = llm.model_config
    size = config.num_cache_planes * config.head_dim
    assert numbers[1] / numbers[0] == pytest.approx(2 * size / (size + 4), rel=0.02)
    assert config.kv_bytes_per_token("fp8") == config.num_layers * config.num_kv_heads * (size + 4)


def test_a_block_of_layers_that_differ_takes_what_is_allocated_for_it() -> None:
    heads = ((4, 32), (1, 64), (4, 32), (1, 64), (2, 64))
    groups = group_layers([20, None, 20, None, 20], 100, [count * dim for count, dim in heads])
    sizes: dict[str, Any] = {"num_kv_heads": 4, "head_dim": 32, "block_size": 8, "layer_heads": heads}
    spec = KVCacheSpec(groups=groups, dtype=torch.int8, **sizes)
    caches = spec.allocate(5, torch.device("cpu"))
    tensors = [tensor for cache in caches for tensor in cache if tensor is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == 5 * spec.bytes_per_block
    assert all(
        cache.scales is not None and cache.scales.shape[:2] == (5, heads[i][0]) for i, cache in enumerate(caches)
    )
