"""What comes back and when: several outputs of one prompt, streams of deltas, output kinds, options of the text."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, RequestOutput, RequestOutputKind, SamplingParams
from nanovllm.detokenizer import DetokenizerStream
from nanovllm.model_files.tokenizer_files import load_tokenizer
from tests.llm_checks import check_nothing_is_left
from tests.tiny_models import EOS, IM_END, VOCAB_WITH_TOKENIZER, edit_json, save_random, save_scripted, save_tokenizer

SCRIPT = "abcdé-ghij😀klmnop.QRS"
SAMPLED = SamplingParams(temperature=1.5, seed=5, max_tokens=12, ignore_eos=True)


def sampled(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.5, "seed": 5, "max_tokens": 12, "ignore_eos": True, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(
        tmp_path_factory.mktemp("random"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS, max_position_embeddings=64
    )
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def llm(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), device="cpu", dtype="float32", block_size=8, overlap_depth=request.param) as llm:
        yield llm


@pytest.fixture(scope="module")
def reciter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = save_scripted(tmp_path_factory.mktemp("script"), SCRIPT, ends=True)
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        yield llm


def texts(output: RequestOutput) -> list[str]:
    return [completion.text for completion in output.outputs]


# -- n --


def test_each_of_n_outputs_is_that_of_its_own_seed(llm: LLM) -> None:
    """The i-th of n draws as a request with seed + i does alone; the results stand in the order of the index."""
    (output,) = llm.generate(["a prompt of more than one block"], sampled(n=5), use_tqdm=False)
    assert output.finished and [completion.index for completion in output.outputs] == list(range(5))
    alone = [llm.generate([output.prompt], sampled(seed=5 + i), use_tqdm=False)[0].outputs[0] for i in range(5)]
    assert [completion.token_ids for completion in output.outputs] == [other.token_ids for other in alone]
    assert texts(output) == [other.text for other in alone]
    assert len(set(texts(output))) == 5
    check_nothing_is_left(llm)


def test_n_without_a_seed_gives_different_outputs(llm: LLM) -> None:
    (output,) = llm.generate(["abc"], sampled(n=4, seed=None), use_tqdm=False)
    assert len(set(texts(output))) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"max_num_seqs": 2},
        {"max_num_seqs": 2, "max_num_batched_tokens": 7},
        {"num_gpu_blocks_override": 9, "block_size": 8},
        {"enable_prefix_caching": False, "num_gpu_blocks_override": 9, "block_size": 8},
    ],
    ids=str,
)
def test_n_outputs_are_the_same_however_the_engine_runs(llm: LLM, folder: Path, options: dict[str, Any]) -> None:
    """Without a prefix cache, with fewer rows than outputs, in chunks, and where they preempt each other."""
    prompts = ["a prompt of more than one block", "another"]
    expected = llm.generate(prompts, sampled(n=4), use_tqdm=False)
    with LLM(str(folder), device="cpu", dtype="float32", **options) as other:
        outputs = other.generate(prompts, sampled(n=4), use_tqdm=False)
        assert [texts(output) for output in outputs] == [texts(output) for output in expected]
        assert ("num_gpu_blocks_override" in options) == (other.get_metrics()["num_preemptions"] > 0)
        check_nothing_is_left(other)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_the_prompt_of_n_outputs_is_computed_once(folder: Path, enable_prefix_caching: bool) -> None:
    with LLM(
        str(folder), device="cpu", dtype="float32", block_size=8, enable_prefix_caching=enable_prefix_caching
    ) as llm:
        llm.generate([list(range(1, 42))], sampled(n=6, max_tokens=1), use_tqdm=False)
        assert llm.get_metrics()["num_tokens_computed"] == 41 + 5 * 1


def test_one_of_n_outputs_scores_the_prompt(folder: Path) -> None:
    with LLM(str(folder), device="cpu", dtype="float32", block_size=8) as llm:
        (output,) = llm.generate([list(range(1, 42))], sampled(n=4, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 41
        assert llm.get_metrics()["num_tokens_computed"] == 41 + 3 * 1


def test_a_request_with_n_outputs_is_aborted_whole(llm: LLM) -> None:
    name = llm.add_request("abc", sampled(n=3, max_tokens=40))
    for _ in range(5):
        llm.step()
    llm.abort_request(name)
    for _ in range(4):  # what was in flight
        assert llm.step() == []
    check_nothing_is_left(llm)


# -- output_kind --


def steps_of(llm: LLM, kind: RequestOutputKind, **options: Any) -> list[RequestOutput]:
    llm.add_request("abc", sampled(output_kind=kind, **options))
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    check_nothing_is_left(llm)
    return outputs


@pytest.mark.parametrize("n", [1, 3])
def test_cumulative_delta_and_final_outputs_say_the_same(llm: LLM, n: int) -> None:
    """Deltas add up to the whole, cumulative outputs grow to it, and FINAL_ONLY is one output with all of it."""
    expected = llm.generate(["abc"], sampled(n=n), use_tqdm=False)[0].outputs
    (final,) = steps_of(llm, RequestOutputKind.FINAL_ONLY, n=n)
    assert final.outputs == expected
    cumulative = steps_of(llm, RequestOutputKind.CUMULATIVE, n=n)
    assert cumulative[-1].outputs == expected and len(cumulative) >= 12
    for before, after in zip(cumulative, cumulative[1:], strict=False):
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert new.text.startswith(old.text) and new.token_ids[: len(old.token_ids)] == old.token_ids
    deltas = steps_of(llm, RequestOutputKind.DELTA, n=n)
    for completion in expected:
        pieces = [piece for output in deltas for piece in output.outputs if piece.index == completion.index]
        assert "".join(piece.text for piece in pieces) == completion.text
        assert [token_id for piece in pieces for token_id in piece.token_ids] == completion.token_ids
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert max(len(piece.token_ids) for piece in pieces) == 1


def test_generate_returns_everything_whatever_the_output_kind(llm: LLM) -> None:
    results = [llm.generate(["abc"], sampled(output_kind=kind), use_tqdm=False)[0] for kind in RequestOutputKind]
    assert results[0].outputs == results[1].outputs == results[2].outputs


def test_deltas_that_wait_for_a_generate_in_between_are_not_lost(llm: LLM) -> None:
    """While generate runs, other requests go on; their next output holds all that is new since the last one."""
    expected = llm.generate(["abc"], sampled(), use_tqdm=False)[0].outputs[0]
    llm.add_request("abc", sampled(output_kind=RequestOutputKind.DELTA))
    pieces = [output for _ in range(4) for output in llm.step()]
    llm.generate(["other"], sampled(max_tokens=5), use_tqdm=False)
    while llm.has_unfinished_requests():
        pieces += llm.step()
    assert "".join(piece.outputs[0].text for piece in pieces) == expected.text
    assert [token_id for piece in pieces for token_id in piece.outputs[0].token_ids] == expected.token_ids
    check_nothing_is_left(llm)


# -- stream --


def test_streamed_deltas_add_up_to_what_generate_returns(llm: LLM) -> None:
    prompts = ["abc", "another one", "x"]
    params = [sampled(), sampled(n=3, max_tokens=5), sampled(temperature=0)]
    expected = llm.generate(prompts, params, use_tqdm=False)
    token_ids: dict[tuple[int, int], list[int]] = defaultdict(list)
    text: dict[tuple[int, int], str] = defaultdict(str)
    stream = llm.stream(prompts, params)
    outputs = list(stream)
    first = min(int(output.request_id) for output in outputs)
    for output in outputs:
        for piece in output.outputs:
            key = int(output.request_id) - first, piece.index
            token_ids[key] += piece.token_ids
            text[key] += piece.text
    for i, output in enumerate(expected):
        for completion in output.outputs:
            assert token_ids[i, completion.index] == completion.token_ids
            assert text[i, completion.index] == completion.text
    assert sum(output.finished for output in outputs) == 3
    check_nothing_is_left(llm)


def leave_by_break(stream: Iterator[RequestOutput]) -> None:
    for count, _ in enumerate(stream):
        if count == 3:
            break


def leave_by_exception(stream: Iterator[RequestOutput]) -> None:
    for count, _ in enumerate(stream):
        if count == 3:
            raise KeyError("of the user's own")


def leave_by_close(stream: Any) -> None:
    next(stream)
    stream.close()


def never_start(stream: Iterator[RequestOutput]) -> None:
    pass


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_exception, leave_by_close, never_start])
def test_a_stream_that_is_left_cancels_and_frees(llm: LLM, leave: Callable[[Any], None]) -> None:
    """Nothing of it stays behind, and what else was running goes on."""
    other = llm.add_request("other", sampled(max_tokens=20))
    with suppress(KeyError):
        leave(llm.stream(["abc", "def", "ghi"], sampled(n=2, max_tokens=40)))
    assert list(llm._session._handles) == [other]
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert {output.request_id for output in outputs} == {other}
    check_nothing_is_left(llm)


def test_streams_take_turns(llm: LLM) -> None:
    """Each sees its own requests only, also with generate and step in between."""
    expected = [output.outputs[0].token_ids for output in llm.generate(["a", "b", "c"], SAMPLED, use_tqdm=False)]
    name = llm.add_request("c", sampled(output_kind=RequestOutputKind.DELTA))
    streams = {"a": llm.stream("a", SAMPLED), "b": llm.stream(["b"], SAMPLED)}
    got: dict[str, list[int]] = defaultdict(list)
    while streams:
        for key in list(streams):
            output = next(streams[key], None)
            if output is None:
                del streams[key]
            else:
                assert output.prompt == key
                got[key] += output.outputs[0].token_ids
        if len(got["a"]) == 3:
            assert llm.generate(["a"], SAMPLED, use_tqdm=False)[0].outputs[0].token_ids == expected[0]
        for output in llm.step():
            assert output.request_id == name
            got["c"] += output.outputs[0].token_ids
    while llm.has_unfinished_requests():
        got["c"] += [token_id for output in llm.step() for token_id in output.outputs[0].token_ids]
    assert [got[key] for key in "abc"] == expected
    check_nothing_is_left(llm)


def test_bad_input_of_a_stream_raises_at_the_call(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        llm.stream(["a", ""], SAMPLED)
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        llm.stream(["a", "b"], [SAMPLED])
    with pytest.raises(TypeError, match="sampling_params"):
        llm.stream(["a"], 5)  # type: ignore[arg-type]
    check_nothing_is_left(llm)


# -- text --


@pytest.mark.parametrize("stop", ["é-g", "j😀", "p.Q"])
def test_a_stop_string_may_stay_in_the_text(reciter: LLM, stop: str) -> None:
    """Also in a stream, whose pieces are then not held back."""
    params = SamplingParams(temperature=0, max_tokens=64, stop=stop, include_stop_str_in_output=True)
    (output,) = reciter.generate("x", params, use_tqdm=False)
    assert output.outputs[0].text == SCRIPT[: SCRIPT.index(stop) + len(stop)]
    assert output.outputs[0].stop_reason == stop
    assert "".join(piece.outputs[0].text for piece in reciter.stream("x", params)) == output.outputs[0].text


def test_the_text_of_a_stop_token_may_stay_in_the_text(reciter: LLM) -> None:
    """A special one still needs skip_special_tokens=False to be seen."""

    def text(**options: Any) -> str:
        params = SamplingParams(temperature=0, max_tokens=64, **options)
        (output,) = reciter.generate("x", params, use_tqdm=False)
        assert "".join(piece.outputs[0].text for piece in reciter.stream("x", params)) == output.outputs[0].text
        return output.outputs[0].text

    assert text(stop_token_ids=[ord("g")]) == "abcdé-"
    assert text(stop_token_ids=[ord("g")], include_stop_str_in_output=True) == "abcdé-g"
    assert text(include_stop_str_in_output=True) == SCRIPT
    assert text(include_stop_str_in_output=True, skip_special_tokens=False) == SCRIPT + "</s>"


def test_special_tokens_may_stand_beside_each_other_without_spaces(tmp_path: Path) -> None:
    """Of a tokenizer whose decoder puts a space between any two tokens."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocab={"one": 0, "two": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<a>", "<b>")])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), revision=None)
    ids = [0, 3, 4, 1, 3]
    for joined, expected in ((False, "one <a> <b> two <a>"), (True, "one <a><b> two <a>")):
        stream = DetokenizerStream(tokenizer, False, not joined)
        assert "".join(stream.step(token_id) for token_id in ids) + stream.flush() == expected


@pytest.mark.parametrize("is_spaced", [True, False])
def test_spaces_between_special_tokens_reach_the_output(tmp_path: Path, is_spaced: bool) -> None:
    """The option is not ignored on its way; a byte-level decoder never writes such spaces, so nothing changes."""
    folder = save_scripted(tmp_path, "ab", ends=True)
    edit_json(folder / "generation_config.json", eos_token_id=[EOS, IM_END])
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        params = SamplingParams(
            temperature=0,
            max_tokens=4,
            ignore_eos=True,
            skip_special_tokens=False,
            spaces_between_special_tokens=is_spaced,
        )
        (output,) = llm.generate("x", params, use_tqdm=False)
        assert output.outputs[0].text == "ab</s>a"
        assert "".join(piece.outputs[0].text for piece in llm.stream("x", params)) == "ab</s>a"
