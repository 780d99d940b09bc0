"""Steps with rows that ask for more than a graph can do: replayed all the same, and equal to steps without graphs.

On a CPU, with graphs that run what they would replay; `tests/test_llm_sampling_gpu.py` has the real ones.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from nanovllm.kernels.triton.common.launch import has_dependent_launch
from nanovllm.runner.extras import PendingExtras
from nanovllm.runner.graphs.captured_steps import KINDS_OF_DECODES, warm_up_behind, warm_up_kernels
from nanovllm.runner.graphs.layouts import PromptLayout
from nanovllm.runner.graphs.step_parts import split
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.sampling.sampler import Sampler
from nanovllm.sampling.stages.pipeline import Pipeline
from tests.runner.fake_graphs import fake_graphs
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, random_prompts, save_random, save_tokenizer

NUM_OUTPUT = 9


def request(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": NUM_OUTPUT, "ignore_eos": True, **options})


def forbid_repeats(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[token_ids[-3:]] = -torch.inf
    return logits


PLAIN = [request(), request(temperature=0.9, seed=1), request(temperature=1.2, seed=2, top_k=20, top_p=0.9)]
ASKING = {
    "frequency": request(frequency_penalty=1.5, presence_penalty=0.5),
    "repetition": request(temperature=0.8, seed=3, repetition_penalty=1.6, logprobs=1),
    "bias": request(logit_bias={5: 4.0, 9: -2.5, 200: 4.0}),
    "allowed": request(allowed_token_ids=[3, 4, 5, 100, 101], frequency_penalty=2.0),
    "bad words": request(bad_words=["a", "th", "e s"], temperature=1.5, seed=4),
    "min_tokens": request(min_tokens=5, stop_token_ids=list(range(0, VOCAB_WITH_TOKENIZER, 2))),
    "processor": request(logits_processors=[forbid_repeats]),
    "logprobs": request(logprobs=3),
    "sampled logprobs": request(logprobs=0, temperature=1.0, seed=5),
}
REQUESTS = [params for i, asking in enumerate(ASKING.values()) for params in (asking, PLAIN[i % 3])]
PROMPTS = random_prompts([3, 17, 30, 8, 21, 9, 16, 12, 33, 5, 14, 26, 7, 11, 19, 2, 10, 13], VOCAB_WITH_TOKENIZER)
PROMPTS[6] = PROMPTS[2][:24]

WAYS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 13},
    {"num_gpu_blocks_override": 14},
    {"max_num_seqs": 3, "enable_prefix_caching": False},
]


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "compilation": "none", "block_size": 8, "max_num_seqs": 8}
    return LLM(str(folder), **{**defaults, "max_model_len": 96, **options})


def check_equal(outputs: list[RequestOutput], expected: list[RequestOutput], tolerance: float = 1e-4) -> None:
    """Tokens are equal; so are log-probabilities, but for what products of other sizes round otherwise."""
    for got, want in zip(outputs, expected, strict=True):
        for one, other in zip(got.outputs, want.outputs, strict=True):
            assert one.token_ids == other.token_ids
            assert one.finish_reason == other.finish_reason
            assert (one.logprobs is None) == (other.logprobs is None)
            for entry, reference in zip(one.logprobs or [], other.logprobs or [], strict=True):
                assert list(entry) == list(reference)
                for token, logprob in entry.items():
                    assert logprob.rank == reference[token].rank
                    assert logprob.logprob == pytest.approx(reference[token].logprob, abs=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_random(path, "Qwen3ForCausalLM", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    with make_llm(folder) as llm:
        return llm.generate(PROMPTS, REQUESTS, use_tqdm=False)


@pytest.mark.parametrize("overlap_depth", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_mixed_batches_replay_graphs_and_give_what_they_give_without(
    folder: Path,
    expected: list[RequestOutput],
    monkeypatch: pytest.MonkeyPatch,
    way: dict[str, Any],
    overlap_depth: int,
) -> None:
    """Rows that ask beside plain ones, in decode and prompt steps; cold, then in other rows and warm."""
    fake = fake_graphs(monkeypatch)
    with make_llm(folder, overlap_depth=overlap_depth, **way) as llm:
        check_equal(llm.generate(PROMPTS, REQUESTS, use_tqdm=False), expected)
        assert fake.num_decodes > NUM_OUTPUT // 2 and fake.num_prompts > 1
        if "max_num_batched_tokens" not in way:  # there, a step may hold a part of a prompt and sample nothing
            assert fake.num_uncaptured == 0
        check_equal(llm.generate(PROMPTS[::-1], REQUESTS[::-1], use_tqdm=False), expected[::-1])
        assert (llm.get_metrics()["num_preemptions"] > 0) == ("num_gpu_blocks_override" in way)


@pytest.mark.parametrize("overlap_depth", [1, 2])
@pytest.mark.parametrize("is_light", [True, False])
def test_prompts_beside_many_decodes_run_apart(
    folder: Path,
    expected: list[RequestOutput],
    monkeypatch: pytest.MonkeyPatch,
    is_light: bool,
    overlap_depth: int,
) -> None:
    """With more requests than are captured with prompts; where weights are many, they are not read twice."""
    fake_graphs(monkeypatch)
    splits = []
    monkeypatch.setattr(
        "nanovllm.runner.graphs.graph_runner.split", lambda *parts: splits.append(parts) or split(*parts)
    )
    monkeypatch.setattr(PromptLayout, "num_reqs", (4,))
    if not is_light:
        monkeypatch.setattr("nanovllm.runner.graphs.graph_runner.LIGHT_BYTES", 0)
    with make_llm(folder, overlap_depth=overlap_depth, max_num_batched_tokens=35) as llm:
        check_equal(llm.generate(PROMPTS, REQUESTS, use_tqdm=False), expected)
        check_equal(llm.generate(PROMPTS[::-1], REQUESTS[::-1], use_tqdm=False), expected[::-1])
    assert (len(splits) > 3) == is_light


@pytest.mark.parametrize("overlap_depth", [1, 2])
@pytest.mark.parametrize("name", ASKING)
def test_one_row_that_asks_leaves_the_others_as_they_are(
    folder: Path, expected: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, name: str, overlap_depth: int
) -> None:
    """Only the row that asks is edited, once for each token that it draws."""
    fake = fake_graphs(monkeypatch)
    real, sizes = Pipeline.edited, []
    monkeypatch.setattr(Pipeline, "edited", lambda *arguments: sizes.append(len(arguments[2])) or real(*arguments))
    which = [1, 3, 5, REQUESTS.index(ASKING[name])]
    with make_llm(folder, overlap_depth=overlap_depth) as llm:
        outputs = llm.generate([PROMPTS[i] for i in which], [REQUESTS[i] for i in which], use_tqdm=False)
    check_equal(outputs, [expected[i] for i in which])
    assert fake.num_uncaptured == 0
    wanted = {"min_tokens": 5, "logprobs": 0, "sampled logprobs": 0}.get(name, NUM_OUTPUT)
    drawn_unread = overlap_depth - 1  # a step in flight when the request ends
    assert set(sizes) <= {1} and wanted <= len(sizes) <= (wanted and wanted + drawn_unread)


def test_a_plain_step_does_nothing_but_replay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_graphs(monkeypatch)

    def unwanted(*_: Any) -> None:
        raise AssertionError("work for rows that ask, in a step where none does")

    monkeypatch.setattr(PendingExtras, "of_sampled", unwanted)
    for name in ("upload", "redraw_edited"):
        monkeypatch.setattr(f"nanovllm.runner.graphs.graph_runner.{name}", unwanted)
    with make_llm(folder) as llm:
        llm.generate(PROMPTS, [PLAIN[i % 3] for i in range(len(PROMPTS))], use_tqdm=False)
    assert fake.num_decodes and fake.num_prompts and not fake.num_uncaptured


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_a_form_beside_others_keeps_the_graphs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overlap_depth: int
) -> None:
    pytest.importorskip("llguidance")
    structured = StructuredOutputsParams(regex="([a-f]{2,6} ){2}[g-k]{2,4}")
    form = SamplingParams(seed=2, temperature=1.2, max_tokens=30, structured_outputs=structured)
    params = [form, PLAIN[0], form, PLAIN[1], ASKING["frequency"]]
    prompts = PROMPTS[: len(params)]
    with make_llm(folder) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    fake = fake_graphs(monkeypatch)
    with make_llm(folder, overlap_depth=overlap_depth) as llm:
        check_equal(llm.generate(prompts, params, use_tqdm=False), expected)
    assert fake.num_uncaptured == 0 and fake.num_decodes > NUM_OUTPUT


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_only_what_needs_hidden_states_runs_without_a_graph(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overlap_depth: int
) -> None:
    """Prompts that are scored, and requests that capture; the others' log-probabilities come from a graph."""
    scored = request(prompt_logprobs=2, logprobs=2)
    capturing = request(capture={"layers": [0]}, logprobs=1)
    params = [scored, PLAIN[1], capturing, ASKING["repetition"], ASKING["bias"], capturing]
    prompts = PROMPTS[: len(params)]
    with make_llm(folder) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    fake = fake_graphs(monkeypatch)
    with make_llm(folder, overlap_depth=overlap_depth) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert fake.num_uncaptured >= NUM_OUTPUT and fake.num_decodes >= NUM_OUTPUT - 1
        fake.num_uncaptured = 0
        check_equal(llm.generate(prompts[:2], params[:2], use_tqdm=False), expected[:2])
        assert fake.num_uncaptured == 1  # the prompts
    check_equal(outputs, expected)
    for got, want in zip(outputs, expected, strict=True):
        assert (got.prompt_logprobs is None) == (want.prompt_logprobs is None)
        for layer, states in (want.outputs[0].hidden_states or {}).items():
            torch.testing.assert_close(got.outputs[0].hidden_states[layer], states, atol=1e-4, rtol=1e-4)


def test_each_engine_launches_as_it_was_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture at the start, replays and steps without a graph, of two engines in turns. Capability is made up."""
    answers: set[bool] = set()
    run_model = ModelRunner.run_model

    def noted(*arguments: Any) -> Any:
        answers.add(has_dependent_launch(torch.device("cuda")))
        return run_model(*arguments)

    monkeypatch.setattr("nanovllm.kernels.triton.common.launch.compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(ModelRunner, "run_model", noted)
    fake = fake_graphs(monkeypatch)
    with make_llm(folder) as on:
        assert answers == {True}
        answers.clear()
        with make_llm(folder, dependent_launch=False) as off:
            assert answers == {False}
            for llm, answer in ((on, True), (off, False), (on, True)):
                answers.clear()
                for params in (request(), request(prompt_logprobs=1)):  # of a prompt's scores a graph leaves nothing
                    llm.generate(PROMPTS[:2], params, use_tqdm=False)
                assert answers == {answer}
    assert fake.num_decodes and fake.num_prompts and fake.num_uncaptured


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_what_is_compiled_ahead_is_every_kind_of_step_and_for_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    """It runs here, as compiling is what a GPU does with it; but for kernels that only a GPU has."""
    pytest.importorskip("triton")
    from nanovllm.sampling.stages import edits_on_gpu

    fake_graphs(monkeypatch)
    asked: list[str] = []
    edit = lambda logits, members, *_: (asked.append("edit"), logits[members].float())[1]  # noqa: E731
    monkeypatch.setattr(edits_on_gpu, "edit_logits_triton", edit)
    monkeypatch.setattr(edits_on_gpu, "top_logprobs_triton", lambda *_, k: asked.append("logprobs"))
    runners: list[tuple[ModelRunner, Any]] = []
    init, sample = ModelRunner.__init__, Sampler.sample_captured
    sampled: list[torch.dtype] = []

    def noted_init(runner: ModelRunner, *arguments: Any) -> None:
        init(runner, *arguments)
        runners.append((runner, arguments[0]))

    def noted_sample(sampler: Sampler, logits: torch.Tensor, *arguments: Any) -> torch.Tensor:
        sampled.append(logits.dtype)
        return sample(sampler, logits, *arguments)

    monkeypatch.setattr(ModelRunner, "__init__", noted_init)
    monkeypatch.setattr(Sampler, "sample_captured", noted_sample)
    monkeypatch.setattr("nanovllm.runner.graphs.captured_steps.compile_kernels", lambda step, *_, **__: step())
    with make_llm(folder, dtype="bfloat16", enforce_eager=enforce_eager) as llm:
        ((runner, config),) = runners
        state, caches = runner.state, [cache.data for cache in runner.kv_caches]
        tensors = [state.num_computed, runner.sampler.columns.last_token, state.block_tables, *caches]
        told = [tensor.clone() for tensor in tensors]
        sampled.clear()
        warm_up_kernels(runner, config, captures_prompts=True)
        # A long prompt, two short ones, decodes; what edits leave of them; many prompts.
        assert sampled == [torch.bfloat16] * 4 + [torch.float32] * 2 + [torch.bfloat16]
        assert asked == ["edit"] * 4 + ["logprobs"]
        sampled.clear()
        warm_up_behind(runner, config, captures_prompts=True)
        kinds = [size for size in KINDS_OF_DECODES if size <= config.max_num_seqs]
        assert sampled == [torch.bfloat16] * (len(kinds) + 3)
        assert all(map(torch.equal, tensors, told))
        assert len(llm.generate(PROMPTS[:2], PLAIN[0], use_tqdm=False)) == 2
