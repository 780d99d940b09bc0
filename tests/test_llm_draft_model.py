"""A model that drafts for another: the same tokens, whatever it drafts, and as many of it accepted as are right.

The models recite (`save_scripted`): what they say is known in advance, and so is what is accepted.
"""

from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from tests.models.test_latent_families import CASES
from tests.runner.fake_graphs import fake_graphs
from tests.test_llm_outputs import check_nothing_is_left
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, random_prompts, save_random, save_scripted, save_tokenizer

TEXT = "abcdefghijklmnopqrstuvwxyz0123456789"


def make_llm(folder: Path, draft: Path | None = None, num_tokens: int = 4, **options: Any) -> LLM:
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 8}
    if draft is not None:
        fields = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": num_tokens}
        defaults["speculative_config"] = {**fields, "adaptive": False}
    return LLM(str(folder), **{**defaults, **options})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target that recites, one that drafts the same, one that takes a wrong turn behind every m; and random ones."""
    root = tmp_path_factory.mktemp("models")
    folders = {
        "target": save_scripted(root / "target", TEXT, ends=False),
        "same": save_scripted(root / "same", TEXT, ends=False),
        "wrong behind m": save_scripted(root / "wrong", TEXT.replace("n", "!"), ends=False),
        "random": save_random(root / "a", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS),
        "smaller": save_random(root / "b", "Qwen3ForCausalLM", vocab_size=VOCAB_WITH_TOKENIZER, num_hidden_layers=1),
    }
    save_tokenizer(folders["random"])
    return folders


def test_what_is_accepted_is_what_the_draft_model_gets_right(folders: dict[str, Path]) -> None:
    """Of 37 tokens one comes with the prompt; "n" is drawn once, where "!" was drafted."""
    params = SamplingParams(temperature=0, max_tokens=36)
    with make_llm(folders["target"]) as llm:
        (expected,) = llm.generate("?", params, use_tqdm=False)
    assert expected.outputs[0].text == TEXT
    for name, rejected in [("same", 0), ("wrong behind m", 1)]:
        with make_llm(folders["target"], folders[name]) as llm:
            (output,) = llm.generate("?", params, use_tqdm=False)
            counters = llm.get_metrics()
            check_nothing_is_left(llm)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        drafts, accepted = (counters[f"spec_decode_num_{n}"] for n in ("drafts", "accepted_tokens"))
        assert 7 <= drafts <= 7 + 2 * rejected
        plain = 36 - 1 - drafts - accepted  # the last ones, where no draft as long fits
        assert 0 <= plain <= 4


RANDOM = random_prompts([5, 23, 1, 40, 17, 9], vocab_size=256)
PARAMS = [
    SamplingParams(temperature=[0.0, 1.0][i % 2], seed=i, max_tokens=20, ignore_eos=True, logprobs=[None, 1][i == 2])
    for i in range(6)
]
WAYS: list[dict[str, Any]] = [
    {},
    {"overlap_depth": 2, "max_num_batched_tokens": 16},
    {"num_gpu_blocks_override": 14, "max_model_len": 96},
    {"enforce_eager": True, "enable_prefix_caching": False, "max_num_seqs": 3},
]


@pytest.mark.parametrize("captured", [False, True])
def test_the_same_tokens_with_any_draft_model(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    with make_llm(folders["random"]) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(RANDOM, PARAMS, use_tqdm=False)]
    if captured:
        fake_graphs(monkeypatch)
    for draft, ways in {"random": WAYS[:1], "smaller": WAYS[:1] if captured else WAYS[1:]}.items():
        for way in ways:
            with make_llm(folders["random"], folders[draft], **way) as llm:
                for _ in range(2):  # the second finds its prompts in the cache
                    outputs = llm.generate(RANDOM, PARAMS, use_tqdm=False)
                    assert [o.outputs[0].token_ids for o in outputs] == expected
                counters = llm.get_metrics()
                check_nothing_is_left(llm)
            assert counters["spec_decode_num_drafts"] > 20
            if draft == "random":  # the target itself: all of the greedy ones, and some others
                assert counters["spec_decode_num_accepted_tokens"] > 60
            if "num_gpu_blocks_override" in way:
                assert counters["num_preemptions"] > 0


def test_a_draft_model_may_cache_latents_and_the_target_keys_and_values_or_the_other_way_round(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    architecture, fields = CASES["deepseek-v2-lite"]
    sizes = {"vocab_size": VOCAB_WITH_TOKENIZER, "eos_token_id": EOS}
    latent = save_random(tmp_path / "latent", architecture, **fields, **sizes)
    save_tokenizer(latent)
    for target, draft in [(folders["random"], latent), (latent, folders["random"])]:
        with make_llm(target) as llm:
            expected = [o.outputs[0].token_ids for o in llm.generate(RANDOM, PARAMS, use_tqdm=False)]
        with make_llm(target, draft) as llm:
            outputs = llm.generate(RANDOM, PARAMS, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in outputs] == expected
            assert llm.get_metrics()["spec_decode_num_drafts"] > 20


def test_what_cannot_draft_is_said_before_weights_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    other = save_random(tmp_path / "vocabulary", vocab_size=128)
    with pytest.raises(ValueError, match="has 128 tokens and the model 272; take one with the same tokenizer"):
        make_llm(folders["random"], other)
    short = save_random(tmp_path / "short", vocab_size=VOCAB_WITH_TOKENIZER, max_position_embeddings=64)
    with pytest.raises(ValueError, match="has 64 positions, fewer than max_model_len=256; lower that"):
        make_llm(folders["random"], short)
    window = save_random(tmp_path / "window", "MistralForCausalLM", vocab_size=VOCAB_WITH_TOKENIZER, sliding_window=16)
    save_tokenizer(window)
    with pytest.raises(NotImplementedError, match="layers with a sliding window cannot draft"):
        make_llm(folders["random"], window)
    with pytest.raises(ValueError, match="model must name the model that drafts for method 'draft_model'"):
        make_llm(folders["random"], speculative_config={"method": "draft_model", "num_speculative_tokens": 2})
