"""What a request asks of the sampler, through the whole engine, against Hugging Face's logits and slow NumPy stages.

Each way of running has steps that overlap, chunks, a prefix cache, or a cache so small that requests are preempted; a
batch mixes all features, so each of them meets the others.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, BeamSearchParams, Logprob, RequestError, SamplingParams
from nanovllm.sampling.stages.penalties import Penalties
from tests.llm_checks import check_nothing_is_left
from tests.sampling.reference import edited
from tests.tiny_models import (
    VOCAB_WITH_TOKENIZER,
    hugging_face_logits,
    load_hugging_face,
    random_prompts,
    save_random,
    save_tokenizer,
)

PROMPTS = random_prompts([3, 17, 30, 8, 21, 9, 16, 12, 33], vocab_size=VOCAB_WITH_TOKENIZER)
PROMPTS[6] = PROMPTS[2][:24]
NUM_OUTPUT = 12


def forbid_repeats(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[token_ids[-3:]] = -torch.inf
    return logits


def shift(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.roll(len(token_ids))


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": NUM_OUTPUT, "ignore_eos": True, **options})


REQUESTS = [
    greedy(),
    greedy(repetition_penalty=1.8),
    greedy(presence_penalty=2.0, frequency_penalty=1.0),
    greedy(logit_bias={5: 3.0, 9: -2.5, 200: 4.0}),
    greedy(allowed_token_ids=[3, 4, 5, 100, 101, 102], frequency_penalty=2.0),
    greedy(min_tokens=6, stop_token_ids=list(range(0, VOCAB_WITH_TOKENIZER, 2))),
    greedy(logits_processors=[forbid_repeats]),
    greedy(logits_processors=[shift, forbid_repeats], repetition_penalty=1.3, logit_bias={7: 2.0}),
    greedy(repetition_penalty=0.8, presence_penalty=-1.0, min_tokens=3, stop_token_ids=[1, 3, 5]),
]

WAYS: list[dict[str, Any]] = [
    {},
    {"overlap_depth": 2},
    {"overlap_depth": 2, "max_num_batched_tokens": 11},
    {"overlap_depth": 2, "num_gpu_blocks_override": 9},
    {"overlap_depth": 3, "num_gpu_blocks_override": 9, "enable_prefix_caching": False, "max_num_batched_tokens": 13},
    {"compilation": "none", "max_num_seqs": 3},
]


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 8, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_random(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", vocab_size=VOCAB_WITH_TOKENIZER)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    return load_hugging_face(folder)


def expected_tokens(
    hf: Any, prompt: list[int], params: SamplingParams, bad_words: tuple[tuple[int, ...], ...] = ()
) -> list[int]:
    output: list[int] = []
    while len(output) < NUM_OUTPUT:
        logits = hugging_face_logits(hf, prompt + output)[-1].numpy()
        stop_ids = tuple(params.stop_token_ids or ())
        output.append(int(edited(logits, prompt, output, params, stop_ids=stop_ids, bad_words=bad_words).argmax()))
        if output[-1] in stop_ids:
            break
    return output


@pytest.fixture(scope="module")
def expected(hf: Any) -> list[list[int]]:
    return [expected_tokens(hf, prompt, params) for prompt, params in zip(PROMPTS, REQUESTS, strict=True)]


def tokens(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_stage_in_every_way_of_running(folder: Path, expected: list[list[int]], way: dict[str, Any]) -> None:
    """Cold, then in another order with a warm prefix cache, then with rows that others have used."""
    with make_llm(folder, **way) as llm:
        assert tokens(llm, PROMPTS, REQUESTS) == expected
        assert tokens(llm, PROMPTS[::-1], REQUESTS[::-1]) == expected[::-1]
        assert (llm.get_metrics()["num_preemptions"] > 0) == ("num_gpu_blocks_override" in way)
        for prompt, params, wanted in list(zip(PROMPTS, REQUESTS, expected, strict=True))[1:8:3]:
            assert tokens(llm, [prompt], params) == [wanted]


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_seeded_requests_with_penalties_do_not_depend_on_the_batch(folder: Path, overlap_depth: int) -> None:
    """Sampled, with penalties and bias, alone and beside others, preempted and not."""
    params = [
        SamplingParams(seed=i, max_tokens=NUM_OUTPUT, repetition_penalty=1.2 + i / 10, top_p=0.9, logit_bias={i: 2.0})
        for i in range(len(PROMPTS))
    ]
    with make_llm(folder, max_num_seqs=1) as llm:
        alone = [tokens(llm, [prompt], param)[0] for prompt, param in zip(PROMPTS, params, strict=True)]
    for blocks in (None, 9):
        with make_llm(folder, overlap_depth=overlap_depth, num_gpu_blocks_override=blocks) as llm:
            assert tokens(llm, PROMPTS, params) == alone
            mixed = [param for pair in zip(params, REQUESTS, strict=True) for param in pair]
            assert tokens(llm, [prompt for prompt in PROMPTS for _ in range(2)], mixed)[::2] == alone


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_bad_words_never_appear(folder: Path, hf: Any, overlap_depth: int) -> None:
    """Words of one byte and of several, which greedy decoding would say; other requests still overlap."""
    prompt = PROMPTS[1]
    with make_llm(folder, overlap_depth=overlap_depth) as llm:
        tokenizer = llm.get_tokenizer()
        (free,) = tokens(llm, [prompt], greedy())
        words, sequences = [], []
        for first, length in ((0, 3), (5, 2), (8, 1)):
            word = "".join(map(chr, free[first : first + length]))
            if word.strip() == word and all(token < 128 for token in free[first : first + length]):
                words.append(word)
        words += ["Q", "zz"]
        for word in words:
            sequences += [tuple(tokenizer.encode(word, add_special_tokens=False))]
        params = greedy(bad_words=words)
        wanted = expected_tokens(hf, prompt, params, tuple(sequences))
        outputs = tokens(llm, [prompt, PROMPTS[0], prompt], [params, greedy(), params])
        assert outputs[0] == outputs[2] == wanted
        assert outputs[1] == expected_tokens(hf, PROMPTS[0], greedy())
        for sequence in sequences:
            found = [outputs[0][i : i + len(sequence)] for i in range(NUM_OUTPUT)]
            assert list(sequence) not in found


def test_bad_words_count_with_and_without_a_space_before(folder: Path) -> None:
    """As a word begins a text, and as it goes on after a space where the space is part of its first token."""
    words = {"ab": [1, 2], " ab": [7, 2], "cd": [3, 4], " cd": [9, 3, 4], "e": [5], " e": [5]}
    from nanovllm.engine.input_processor import InputProcessor

    processor = InputProcessor(
        encode=lambda text, add_special_tokens=True: words[text],
        special_tokens={},
        vocab_size=8,
        num_layers=2,
        max_model_len=10,
        num_cache_tokens=10,
        eos_token_ids=[],
        seed=0,
    )
    (request,) = processor.process([1], SamplingParams(bad_words=["ab", " cd", "e"]), "prompt", 0)
    assert request.bad_words == ((1, 2), (7, 2), (3, 4), (5,))
    assert request.needs_host_tokens and request.needs_history
    (request,) = processor.process([1], SamplingParams(bad_words=["e"]), "prompt", 0)
    assert request.bad_words == ((5,),) and not request.needs_host_tokens


def test_processors_of_the_engine_run_for_every_request_and_first(folder: Path, hf: Any) -> None:
    """They see prompt and output, and compose with the request's own."""
    seen: list[list[int]] = []

    def note(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert logits.shape == (VOCAB_WITH_TOKENIZER,) and logits.dtype == torch.float32
        seen.append(token_ids)
        return logits

    with make_llm(folder, logits_processors=[shift, note], overlap_depth=2) as llm:
        outputs = tokens(llm, PROMPTS[:2], [greedy(), greedy(logits_processors=[forbid_repeats])])
    for prompt, output, own in zip(PROMPTS, outputs, ([], [forbid_repeats]), strict=False):
        assert output == expected_tokens(hf, prompt, greedy(logits_processors=[shift, *own]))
        for length in range(NUM_OUTPUT):
            assert prompt + output[:length] in seen


def fail_later(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(token_ids) < len(PROMPTS[1]) + 2:
        return logits
    raise KeyError("made up")


def too_short(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits[1:]


FAULTS: dict[str, tuple[Any, int]] = {  # what fails, and after how many tokens
    r"processor fail_later failed: KeyError: 'made up' \(.*test_llm_sampling.py, line \d+\)": (fail_later, 2),
    r"processor too_short failed: ValueError: .* shape \(272,\), got \(271,\)$": (too_short, 0),
    r"processor .*<lambda> failed: TypeError: .* tensor, got NoneType$": (lambda token_ids, logits: None, 0),
    r"processor .* failed: TypeError: .* floating-point numbers, got torch.int64$": (
        lambda token_ids, logits: logits.long(),
        0,
    ),
    r"processor .* failed: TypeError: .* positional argument": (lambda token_ids: token_ids, 0),
}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_processor_that_fails_ends_its_own_request(folder: Path, hf: Any, way: dict[str, Any]) -> None:
    """With its reason and what it had; the others go on, each failure's neighbours included."""
    faults = [greedy(logits_processors=[forbid_repeats, function], logprobs=1) for function, _ in FAULTS.values()]
    with make_llm(folder, **way) as llm:
        outputs = llm.generate([*PROMPTS, *[PROMPTS[1]] * len(faults)], [*REQUESTS, *faults], use_tqdm=False)
        for output, prompt, params in zip(outputs, PROMPTS, REQUESTS, strict=False):
            assert output.outputs[0].error is None
            assert output.outputs[0].token_ids == expected_tokens(hf, prompt, params)
        wanted = expected_tokens(hf, PROMPTS[1], greedy(logits_processors=[forbid_repeats]))
        for output, (reason, (_, num_tokens)) in zip(outputs[len(PROMPTS) :], FAULTS.items(), strict=True):
            (completion,) = output.outputs
            assert output.finished and completion.finish_reason == "error"
            assert completion.error is not None and re.search(reason, completion.error)
            assert completion.token_ids == wanted[:num_tokens]
            assert completion.logprobs is not None and len(completion.logprobs) == num_tokens
        check_nothing_is_left(llm)
        with pytest.raises(RequestError, match=next(iter(FAULTS))):
            llm.generate(PROMPTS[1], faults[0], use_tqdm=False)
        deltas = []
        with pytest.raises(RequestError, match=next(iter(FAULTS))):
            deltas.extend(llm.stream(PROMPTS[1], faults[0]))
        assert llm.generate(PROMPTS[1], greedy(), use_tqdm=False)[0].outputs[0].finish_reason == "length"


def test_a_processor_of_the_engine_that_fails_ends_the_requests_it_fails_for(folder: Path) -> None:
    def fail_for_long_prompts(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert len(token_ids) < 17, "long"
        return logits

    with make_llm(folder, logits_processors=[fail_for_long_prompts]) as llm:
        outputs = llm.generate(PROMPTS[:4], greedy(max_tokens=2), use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "error", "length"]
        with pytest.raises(RequestError, match="AssertionError: long"):
            llm.beam_search(PROMPTS[1], BeamSearchParams(beam_width=2, max_tokens=2))
    with pytest.raises(TypeError, match="functions"):
        make_llm(folder, logits_processors=[dict])


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {VOCAB_WITH_TOKENIZER: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"allowed_token_ids": [1, VOCAB_WITH_TOKENIZER]},
    ],
)
def test_tokens_outside_the_vocabulary_name_item_and_field(folder: Path, options: dict[str, Any]) -> None:
    """Before anything is queued."""
    with make_llm(folder) as llm:
        with pytest.raises(ValueError, match=rf"prompts\[1\]: {next(iter(options))}.*{VOCAB_WITH_TOKENIZER}"):
            llm.generate(PROMPTS[:2], [greedy(), greedy(**options)], use_tqdm=False)
        assert not llm.has_unfinished_requests()


def test_bad_words_without_a_tokenizer_are_refused(folder: Path) -> None:
    with make_llm(folder, skip_tokenizer_init=True) as llm, pytest.raises(ValueError, match="bad_words"):
        llm.generate([PROMPTS[0]], greedy(bad_words=["a"]), use_tqdm=False)


def test_counts_are_made_only_for_penalties(folder: Path) -> None:
    """A stage that nobody asks for costs no memory."""
    with make_llm(folder) as llm:
        sampler = llm._engine.executor._runner.sampler  # type: ignore[attr-defined]
        tokens(llm, PROMPTS, greedy())
        assert sampler.pipeline is None
        tokens(llm, PROMPTS, greedy(logit_bias={1: 1.0}))
        (penalties,) = (stage for stage in sampler.pipeline.stages if isinstance(stage, Penalties))
        assert penalties.counts is None and not sampler.pipeline.histories.of(0)
        tokens(llm, PROMPTS, greedy(frequency_penalty=0.1))
        assert penalties.counts.shape == (8, VOCAB_WITH_TOKENIZER)
        assert np.all(penalties.counts.numpy() >= 0)


# -- log-probabilities --


def hugging_face_logprobs(hf: Any, token_ids: list[int]) -> torch.Tensor:
    return hugging_face_logits(hf, token_ids).log_softmax(-1)


def check_entry(entry: dict[int, Logprob], expected: torch.Tensor, token: int, num_top: int) -> None:
    """The token itself and the num_top most likely ones, with their ranks; ties and near ties may swap."""
    values = expected.sort(descending=True).values
    assert next(iter(entry)) == token
    assert len(entry) in (max(num_top, 1), num_top + 1)
    for token_id, logprob in entry.items():
        assert logprob.logprob == pytest.approx(expected[token_id].item(), abs=2e-4)
        assert values[logprob.rank - 1].item() == pytest.approx(logprob.logprob, abs=4e-4)
    others = [logprob for token_id, logprob in entry.items() if token_id != token or len(entry) == num_top]
    assert sorted(logprob.rank for logprob in others) == list(range(1, num_top + 1))


LOGPROB_REQUESTS = [
    greedy(logprobs=3),
    SamplingParams(seed=1, max_tokens=NUM_OUTPUT, logprobs=0, temperature=1.5),
    SamplingParams(seed=2, max_tokens=NUM_OUTPUT, logprobs=5, prompt_logprobs=2, top_k=7),
    greedy(prompt_logprobs=0),
    greedy(logprobs=4, repetition_penalty=1.5, logit_bias={3: 5.0}, allowed_token_ids=list(range(50))),
    greedy(),
    greedy(logprobs=-1, prompt_logprobs=-1, max_tokens=3),
    greedy(logprobs=1, prompt_logprobs=6, logits_processors=[shift]),
    greedy(logprobs=2, prompt_logprobs=3, min_tokens=5, stop_token_ids=list(range(0, 272, 2))),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_logprobs_are_hugging_faces_in_every_way_of_running(folder: Path, hf: Any, way: dict[str, Any]) -> None:
    """Cold, then with a warm prefix cache; raw over the whole vocabulary, whatever else a request asks for."""
    with make_llm(folder, **way) as llm:
        cold = llm.generate(PROMPTS, LOGPROB_REQUESTS, use_tqdm=False)
        warm = llm.generate(PROMPTS[::-1], LOGPROB_REQUESTS[::-1], use_tqdm=False)[::-1]
        assert (llm.get_metrics()["num_preemptions"] > 0) == ("num_gpu_blocks_override" in way)
    for outputs in (cold, warm):
        for prompt, params, output in zip(PROMPTS, LOGPROB_REQUESTS, outputs, strict=True):
            (completion,) = output.outputs
            expected = hugging_face_logprobs(hf, prompt + completion.token_ids)
            if params.logprobs is None:
                assert completion.logprobs is None and completion.cumulative_logprob is None
            else:
                top = 272 if params.logprobs == -1 else params.logprobs
                assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
                for i, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
                    check_entry(entry, expected[len(prompt) + i - 1], token, top)
                total = sum(entry[completion.token_ids[i]].logprob for i, entry in enumerate(completion.logprobs))
                assert completion.cumulative_logprob == pytest.approx(total)
            if params.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                top = 272 if params.prompt_logprobs == -1 else params.prompt_logprobs
                assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
                assert output.prompt_logprobs[0] is None
                for i, found in enumerate(output.prompt_logprobs[1:]):
                    assert found is not None
                    check_entry(found, expected[i], prompt[i + 1], top)
    for one, other in zip(cold, warm, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_prompt_logprobs_are_computed_once_and_share_what_they_may(folder: Path) -> None:
    """A request that asks for them takes no cached block, one beside it that does not ask does."""
    with make_llm(folder) as llm:
        params = [greedy(), greedy(prompt_logprobs=1)]
        llm.generate(PROMPTS[8], params[0], use_tqdm=False)
        outputs = llm.generate([PROMPTS[8]] * 2, params, use_tqdm=False)
        assert [output.num_cached_tokens for output in outputs] == [32, 0]
        assert outputs[1].prompt_logprobs is not None


def test_logprobs_while_a_request_grows_and_after_an_abort(folder: Path) -> None:
    """Each output so far has as many entries as tokens; what an aborted request asked for disturbs nobody."""
    with make_llm(folder, overlap_depth=2, max_num_batched_tokens=10) as llm:
        llm.add_request(PROMPTS[8], greedy(logprobs=2, prompt_logprobs=2), "long")
        llm.add_request(PROMPTS[0], greedy(logprobs=2, prompt_logprobs=2), "kept")
        finals, seen = {}, 0
        for step in range(60):
            for output in llm.step():
                (completion,) = output.outputs
                assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
                assert output.prompt_logprobs is not None
                seen += 1
                finals[output.request_id] = output
            if step == 2:
                llm.abort_request("long")
                llm.add_request(PROMPTS[8], greedy(logprobs=2, prompt_logprobs=2), "again")
        assert not llm.has_unfinished_requests() and seen > 20
        alone = [llm.generate(PROMPTS[i], greedy(logprobs=2, prompt_logprobs=2), use_tqdm=False)[0] for i in (0, 8)]
    for name, expected in zip(("kept", "again"), alone, strict=True):
        assert finals[name].outputs[0].token_ids == expected.outputs[0].token_ids
        assert len(finals[name].prompt_logprobs) == len(expected.prompt_logprobs or ())


def test_decoded_tokens_are_the_text_of_each_token(folder: Path) -> None:
    with make_llm(folder) as llm:
        (output,) = llm.generate([[66, 67]], greedy(logprobs=1, prompt_logprobs=0), use_tqdm=False)
        assert output.prompt_logprobs == [None, {67: output.prompt_logprobs[1][67]}]
        assert output.prompt_logprobs[1][67].decoded_token == "C"
        assert all(isinstance(top.decoded_token, str) for entry in output.outputs[0].logprobs for top in entry.values())
        (output,) = llm.generate([[66, 67]], greedy(logprobs=1, detokenize=False), use_tqdm=False)
        assert all(top.decoded_token is None for entry in output.outputs[0].logprobs for top in entry.values())
