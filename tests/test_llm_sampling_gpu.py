"""What a request asks of the sampler, on a GPU: tokens and numbers of the CPU, and every bit if asked. Run: -m gpu"""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.runner.graphs.cuda_graphs import StepGraphs
from nanovllm.runner.model_runner import ModelRunner
from tests import test_features_pairwise as pairs
from tests.runner import test_model_runner as mixed
from tests.test_llm_deterministic import PARAMS, PROMPTS
from tests.test_llm_sampling import REQUESTS
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, random_prompts, save_random, save_tokenizer

pytestmark = pytest.mark.gpu

WAYS: list[dict[str, Any]] = [
    {},
    {"overlap_depth": 1, "max_num_batched_tokens": 16},
    {"enforce_eager": True},
    {"num_gpu_blocks_override": 9, "block_size": 8},
]


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 8}
    return LLM(str(folder), **{**defaults, "num_gpu_blocks_override": 100, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_random(path, "Qwen3ForCausalLM", vocab_size=VOCAB_WITH_TOKENIZER, head_dim=64)
    save_tokenizer(path)
    return path


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_stage_gives_the_tokens_of_the_cpu(folder: Path, way: dict[str, Any]) -> None:
    """Penalties, bias, allowed tokens, min_tokens and Python processors beside plain rows in their graph."""
    prompts = random_prompts([3, 17, 30, 8, 21, 9, 16, 12, 33], vocab_size=VOCAB_WITH_TOKENIZER)
    with make_llm(folder, device="cpu", compilation="none") as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, REQUESTS, use_tqdm=False)]
    with make_llm(folder, **way) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, REQUESTS, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_logprobs_are_those_of_the_cpu(folder: Path, way: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, prompt_logprobs=2)
    with make_llm(folder, device="cpu", compilation="none") as llm:
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
    with make_llm(folder, **way) as llm:
        for _ in range(2):
            for got, want in zip(llm.generate(PROMPTS, params, use_tqdm=False), expected, strict=True):
                assert got.outputs[0].token_ids == want.outputs[0].token_ids
                assert got.outputs[0].cumulative_logprob == pytest.approx(want.outputs[0].cumulative_logprob, abs=1e-3)
                assert got.prompt_logprobs is not None and want.prompt_logprobs is not None
                for token, one, other in zip(
                    got.prompt_token_ids[1:], got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True
                ):
                    assert one is not None and other is not None
                    assert one[token].logprob == pytest.approx(other[token].logprob, abs=1e-3)


@pytest.mark.parametrize(
    "way", [{}, {"overlap_depth": 1}, {"max_num_batched_tokens": 13}, {"max_num_seqs": 3}], ids=str
)
def test_rows_that_ask_keep_their_graphs(folder: Path, way: dict[str, Any]) -> None:
    """In batches of several sizes, edits and log-probabilities are those of steps without graphs."""
    options = {"skip_tokenizer_init": False, **way}
    groups = [slice(0, 18), slice(0, 1), slice(8, 11), slice(10, 16), slice(1, 9)]

    def run(**more: Any) -> list[list[RequestOutput]]:
        with make_llm(folder, **options, **more) as llm:
            return [llm.generate(mixed.PROMPTS[g], mixed.REQUESTS[g], use_tqdm=False) for g in groups]

    expected = run(enforce_eager=True)
    with (
        mock.patch.object(StepGraphs, "run", autospec=True, side_effect=StepGraphs.run) as replay,
        mock.patch.object(ModelRunner, "forward", autospec=True, side_effect=ModelRunner.forward) as uncaptured,
    ):
        got = run()
    for outputs, wanted in zip(got, expected, strict=True):
        mixed.check_equal(outputs, wanted, tolerance=1e-3)
    assert replay.call_count > 40
    if "max_num_batched_tokens" not in way:  # there, a step may hold a part of a prompt and sample nothing
        assert uncaptured.call_count == 0


def numbers(outputs: list[RequestOutput]) -> list[Any]:
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs) for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bit_is_the_same_whatever_else_runs(folder: Path, dtype: str) -> None:
    """With deterministic=True: batch, row, order, chunks, preemption, prefix hit, graphs, overlap."""
    options = {"dtype": dtype, "deterministic": True}
    with make_llm(folder, **options, enable_prefix_caching=False) as llm:
        alone = [
            numbers(llm.generate([prompt], params, use_tqdm=False))[0]
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]
    for way in WAYS:
        with make_llm(folder, **options, **way) as llm:
            assert numbers(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone
            assert numbers(llm.generate(PROMPTS[::-1], PARAMS[::-1], use_tqdm=False)) == alone[::-1]
            assert numbers(llm.generate([PROMPTS[4]] * 20, PARAMS[4], use_tqdm=False)) == [alone[4]] * 20


def test_every_bit_is_the_same_in_long_contexts_and_wide_layers(tmp_path: Path) -> None:
    """Inputs of a product in four spans, contexts in three chunks, which programs share, and up to 70 decodes."""
    sizes = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 2048, "max_position_embeddings": 1024}
    folder = save_random(tmp_path, "Qwen3ForCausalLM", **sizes)
    prompts = random_prompts([700, 300, 5, 40, 257])
    prompts[3] = prompts[0][:640] + prompts[3]
    params = PARAMS[: len(prompts)]
    options = {"dtype": "bfloat16", "deterministic": True, "max_model_len": 1024, "max_num_seqs": 80}
    with make_llm(folder, **options, enable_prefix_caching=False) as llm:
        alone = [
            numbers(llm.generate([prompt], own, use_tqdm=False))[0] for prompt, own in zip(prompts, params, strict=True)
        ]
    for way in ({}, {"max_num_batched_tokens": 200}):
        with make_llm(folder, **options, **way) as llm:
            for _ in range(2):  # the second time, what is computed already is found
                assert numbers(llm.generate(prompts, params, use_tqdm=False)) == alone
            assert numbers(llm.generate([prompts[2]] * 70, params[2], use_tqdm=False)) == [alone[2]] * 70


EDITS = ("penalties", "logit_bias", "bad_words", "min_tokens", "allowed_token_ids", "processors", "grammar")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LLM]]:
    """One with graphs and one without."""
    sizes = {"vocab_size": VOCAB_WITH_TOKENIZER, "eos_token_id": EOS, "head_dim": 64}
    folder = save_random(tmp_path_factory.mktemp("pairs"), "Qwen3ForCausalLM", **sizes)
    save_tokenizer(folder)
    with ExitStack() as stack:
        ways = [{}, {"enforce_eager": True}]
        yield [stack.enter_context(make_llm(folder, skip_tokenizer_init=False, **way)) for way in ways]


@pytest.mark.parametrize("names", list(combinations(EDITS, 2)), ids=" and ".join)
def test_two_edits_on_two_rows_and_on_one_behind_a_graph(engines: list[LLM], names: tuple[str, str]) -> None:
    """What each asks for alone, in an engine without graphs."""
    if "grammar" in names:
        pytest.importorskip("llguidance")
    graphs, eager = engines
    asked = [names, names[:1], (), names[1:], names]
    params = [pairs.make_params(asks, index) for index, asks in enumerate(asked)]
    prompts = [*pairs.PROMPTS, *pairs.PLAIN, pairs.PROMPTS[0]]
    alone = [eager.generate(*request, use_tqdm=False)[0] for request in zip(prompts, params, strict=True)]
    together = graphs.generate(prompts, params, use_tqdm=False)
    assert list(map(pairs.tokens, together)) == list(map(pairs.tokens, alone))
