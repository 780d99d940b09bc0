"""Models with sliding windows: blocks behind a window are given back, and the tokens are Hugging Face's all the same.

Contexts are several times as long as the windows, blocks are small, and the cache is too small for what layers without
windows would keep.
"""

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cache_specs import group_layers
from tests.llm_checks import check_nothing_is_left
from tests.runner.fake_graphs import fake_graphs
from tests.tiny_models import hugging_face_greedy, load_hugging_face, random_prompts, save_random

LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 12},  # every layer
    "Gemma2ForCausalLM": {"sliding_window": 12, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma3ForCausalLM": {"sliding_window": 12, "head_dim": 8, "num_hidden_layers": 6, "layer_types": LAYERS * 2},
    "Qwen2ForCausalLM": {
        "sliding_window": 12,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    },
}
PROMPTS = random_prompts([100, 30, 61, 8])
PROMPTS[3] = [*PROMPTS[0][:80], *PROMPTS[3]]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    folder = save_random(tmp_path_factory.mktemp("model"), request.param, **FAMILIES[request.param])
    reference = load_hugging_face(folder)
    return folder, [hugging_face_greedy(reference, prompt, GREEDY.max_tokens or 0) for prompt in PROMPTS]


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "block_size": 8}
    return LLM(str(folder), **{**defaults, **options})


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 3},
        {"overlap_depth": 1, "compilation": "none"},
        {"overlap_depth": 3, "max_num_seqs": 2},
        {"enable_prefix_caching": False},
        {"deterministic": True},
    ],
    ids=str,
)
def test_tokens_are_those_of_hugging_face(model: tuple[Path, list[list[int]]], options: dict[str, Any]) -> None:
    folder, expected = model
    if options.get("deterministic") and "gemma2" in (folder / "config.json").read_text():
        pytest.skip("deterministic=True refuses soft-caps")
    with make_llm(folder, **options) as llm:
        assert tokens(llm, PROMPTS) == expected
        cached = llm.get_metrics()["num_prompt_tokens_cached"]
        assert tokens(llm, PROMPTS) == expected, "what the cache holds of the first time is right"
        if options.get("enable_prefix_caching", True):
            assert llm.get_metrics()["num_prompt_tokens_cached"] > cached + 150
        check_nothing_is_left(llm)


def test_a_cache_that_holds_one_long_request_is_enough(model: tuple[Path, list[list[int]]]) -> None:
    """It is smaller than what the layers of one request would keep without windows."""
    folder, expected = model
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "max_model_len": 128}
    with make_llm(folder, **options, num_gpu_blocks_override=1) as llm:
        groups = group_layers(llm.model_config.windows, 128)
    for_all_layers = -(-groups.num_blocks(128, 16, 8) // len(groups.specs))
    assert for_all_layers * 8 < 0.8 * 128
    with make_llm(folder, **options, num_gpu_blocks_override=for_all_layers) as llm:
        assert tokens(llm, PROMPTS) == expected
        assert llm.get_metrics()["num_blocks"] == for_all_layers * len(groups.specs)
        check_nothing_is_left(llm)


def test_a_context_longer_than_the_cache_runs_where_every_layer_has_a_window(tmp_path: Path) -> None:
    folder = save_random(tmp_path, "MistralForCausalLM", sliding_window=12)
    with make_llm(folder, num_gpu_blocks_override=8, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        assert llm.num_kv_cache_tokens == 256 * 8 // 7
        (output,) = tokens(llm, [PROMPTS[0]])
    assert output == hugging_face_greedy(load_hugging_face(folder), PROMPTS[0], 24)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 3}], ids=str)
def test_captured_steps_read_each_group_of_layers_through_its_own_table(
    model: tuple[Path, list[list[int]]], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = model
    fake = fake_graphs(monkeypatch)
    with make_llm(folder, **options) as llm:
        assert tokens(llm, PROMPTS) == expected
    assert fake.num_decodes > 20 and fake.num_prompts > 0
