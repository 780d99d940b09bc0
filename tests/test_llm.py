"""LLM as a user meets it: forms of input, text, stops, streaming, limits, errors, interruptions, close."""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from tests.llm_checks import check_nothing_is_left
from tests.tiny_models import (
    BOS,
    EOS,
    IM_END,
    IM_START,
    VOCAB_WITH_TOKENIZER,
    edit_json,
    inner_model,
    save_random,
    save_scripted,
    save_tokenizer,
)

SCRIPT = "abcdé-ghij😀klmnop.QRS"  # no byte twice; é has two bytes, 😀 four
SCRIPT_IDS = list(SCRIPT.encode())
GREEDY = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=64)


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"device": "cpu", "dtype": "float32", **options})


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 64, **options})


def complete(llm: LLM, prompt: Any, params: SamplingParams) -> CompletionOutput:
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return output.outputs[0]


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(
        tmp_path_factory.mktemp("random"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS, max_position_embeddings=64
    )
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def script_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scripted(tmp_path_factory.mktemp("script"), SCRIPT, ends=True)


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scripted(tmp_path_factory.mktemp("endless"), SCRIPT, ends=False)


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def llm(request: pytest.FixtureRequest, random_folder: Path) -> Iterator[LLM]:
    """A random model with a tokenizer; 64 positions, blocks of 8."""
    with make_llm(random_folder, block_size=8, max_num_seqs=8, overlap_depth=request.param) as llm:
        yield llm


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def reciter(request: pytest.FixtureRequest, script_folder: Path) -> Iterator[LLM]:
    """Answers every prompt with SCRIPT and EOS."""
    with make_llm(script_folder, overlap_depth=request.param) as llm:
        yield llm


@pytest.fixture(scope="module", params=[1, 2], ids=["depth1", "depth2"])
def endless(request: pytest.FixtureRequest, endless_folder: Path) -> Iterator[LLM]:
    """Answers every prompt with SCRIPT, again and again."""
    with make_llm(endless_folder, overlap_depth=request.param) as llm:
        yield llm


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a model folder, to be edited."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


# -- forms of input --


def test_each_form_of_prompt(llm: LLM) -> None:
    ids = [BOS, *b"hello"]
    expected = complete(llm, ids, GREEDY).token_ids
    forms: list[tuple[Any, str | None]] = [
        ("hello", "hello"),
        (ids, None),
        (tuple(ids), None),
        (np.array(ids), None),
        (torch.tensor(ids), None),
        ({"prompt": "hello"}, "hello"),
        ({"prompt_token_ids": ids}, None),
        ({"prompt_token_ids": ids, "prompt": "as shown"}, "as shown"),
    ]
    for form, text in forms:
        for prompts in (form, [form], (form,)):
            (output,) = llm.generate(prompts, GREEDY, use_tqdm=False)
            assert isinstance(output, RequestOutput) and output.finished
            assert output.prompt == text
            assert output.prompt_token_ids == ids and all(type(token_id) is int for token_id in output.prompt_token_ids)
            assert output.outputs[0].token_ids == expected
            assert len(output.outputs) == 1 and output.outputs[0].index == 0
    outputs = llm.generate([form for form, _ in forms], GREEDY, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [expected] * len(forms)
    check_nothing_is_left(llm)


def test_several_prompts_in_one_array(llm: LLM) -> None:
    """Rows of an array are prompts, not tokens."""
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = [complete(llm, row, GREEDY).token_ids for row in rows]
    for prompts in (
        np.array(rows),
        torch.tensor(rows),
        [np.array(row) for row in rows],
        [torch.tensor(r) for r in rows],
    ):
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
        assert [output.outputs[0].token_ids for output in outputs] == expected


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """Also when the last prompt is the first one done, and with parameters of its own for each."""
    prompts = [[i + 1] * (i + 1) for i in range(12)]
    params = [greedy(max_tokens=13 - i, ignore_eos=True) for i in range(12)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [13 - i for i in range(12)]
    assert len({output.request_id for output in outputs}) == 12
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_the_progress_bar_can_be_switched_off(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


# -- errors before anything is queued --

BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "empty"),
    ([], "empty"),
    ({"prompt": ""}, "empty"),
    ({"prompt_token_ids": []}, "empty"),
    ([1, VOCAB_WITH_TOKENIZER], str(VOCAB_WITH_TOKENIZER)),
    ([1, -1], "-1"),
    ([1, 2**70], "vocabulary"),
    ([1, 1.0], "1.0"),
    ([1, True], "True"),
    ([1, None], "None"),
    ([1, "a"], "'a'"),
    ({"prompt_tokens": [1]}, "prompt_tokens"),
    ({}, "prompt_token_ids"),
    (None, "NoneType"),
    (5, "int"),
    (b"bytes", "bytes"),
    ([[1, 2]], "integer"),
    ([1] * 64, "max_model_len"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_PROMPTS, ids=str)
def test_a_bad_prompt_is_named_and_nothing_stays_behind(llm: LLM, bad: Any, message: str) -> None:
    """In any place of the list; the next call returns its own results only."""
    for prompts in (["a", bad], [bad, "a"], ["a", "b", bad]):
        with pytest.raises((ValueError, TypeError), match=re.escape(f"prompts[{prompts.index(bad)}]")) as error:
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert message in str(error.value)
        check_nothing_is_left(llm)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        llm.add_request(bad, GREEDY)
    check_nothing_is_left(llm)
    (output,) = llm.generate(["b"], GREEDY, use_tqdm=False)
    assert output.prompt == "b"


def test_an_empty_prompt_among_others_as_reported(random_folder: Path) -> None:
    """Also, no seed is used up, so that sampled results do not depend on earlier mistakes."""
    with make_llm(random_folder) as llm, make_llm(random_folder) as untouched:
        with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
            llm.generate(["a", ""])
        (output,) = llm.generate(["b"], use_tqdm=False)
        assert output.prompt == "b"
        assert output.outputs == untouched.generate(["b"], use_tqdm=False)[0].outputs


@pytest.mark.parametrize("num_params", [0, 1, 3])
def test_parameters_of_another_number_than_prompts_are_refused(llm: LLM, num_params: int) -> None:
    with pytest.raises(ValueError, match=rf"{num_params} sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY] * num_params, use_tqdm=False)
    check_nothing_is_left(llm)


@pytest.mark.parametrize("params", [{"temperature": 0}, [GREEDY, None], [GREEDY, {}], ["x", GREEDY], 5])
def test_parameters_of_another_type_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(TypeError, match="sampling_params"):
        llm.generate(["a", "b"], params, use_tqdm=False)
    check_nothing_is_left(llm)


@pytest.mark.parametrize("stop_token_id", [-1, VOCAB_WITH_TOKENIZER])
def test_a_stop_token_outside_the_vocabulary_is_refused(llm: LLM, stop_token_id: int) -> None:
    with pytest.raises(ValueError, match=rf"prompts\[1\].*{stop_token_id}"):
        llm.generate(["a", "b"], [GREEDY, greedy(stop_token_ids=[stop_token_id])], use_tqdm=False)
    check_nothing_is_left(llm)


def test_misspelt_options_reach_the_user(random_folder: Path) -> None:
    with pytest.raises(TypeError, match=r"'max_model_length'.*'max_model_len'"):
        make_llm(random_folder, max_model_length=8)
    with pytest.raises(TypeError, match="remote code"):
        make_llm(random_folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="device"):
        make_llm(random_folder, device="tpu")


def test_text_that_the_model_has_no_rows_for_is_refused(tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the model."""
    folder = save_random(tmp_path, vocab_size=257)
    save_tokenizer(folder)
    with make_llm(folder) as llm:
        with pytest.raises(ValueError, match=rf"prompts\[1\].*{IM_START}.*vocabulary"):
            llm.generate(["a", "b<|im_start|>"], GREEDY, use_tqdm=False)
        assert complete(llm, "a", GREEDY).token_ids


def test_without_a_tokenizer(random_folder: Path, llm: LLM) -> None:
    with make_llm(random_folder, skip_tokenizer_init=True) as bare:
        for call in (
            lambda: bare.generate(["text"], GREEDY),
            lambda: bare.generate([[1]], greedy(stop="a")),
            lambda: bare.chat([{"role": "user", "content": "a"}], GREEDY),
            bare.get_tokenizer,
        ):
            with pytest.raises(ValueError, match="tokenizer"):
                call()
        output = complete(bare, [1, 2], GREEDY)
        assert output.text == "" and output.token_ids == complete(llm, [1, 2], GREEDY).token_ids
        check_nothing_is_left(bare)


# -- lengths --


def test_prompts_at_the_edge_of_max_model_len(llm: LLM) -> None:
    """With room for one token, none, and less than none."""
    output = complete(llm, [7] * 63, LONG)
    assert (len(output.token_ids), output.finish_reason) == (1, "length")
    for length in (64, 65):
        with pytest.raises(ValueError, match=rf"prompts\[0\] has {length} tokens.*max_model_len is 64"):
            llm.generate([[7] * length], GREEDY, use_tqdm=False)
    check_nothing_is_left(llm)


@pytest.mark.parametrize("max_tokens", [None, 30, 31, 1000])
def test_an_output_that_meets_the_limit_ends_with_length(llm: LLM, max_tokens: int | None) -> None:
    """max_tokens=None runs up to the model's length, too many are cut there."""
    output = complete(llm, [7] * 34, greedy(max_tokens=max_tokens, ignore_eos=True))
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (30, "length", None)


def test_max_tokens_counts_exactly(llm: LLM) -> None:
    for max_tokens in (1, 2, 9):
        output = complete(llm, "abc", greedy(max_tokens=max_tokens, ignore_eos=True))
        assert (len(output.token_ids), output.finish_reason) == (max_tokens, "length")


def test_a_prompt_that_never_fits_is_refused_and_the_next_runs(random_folder: Path) -> None:
    """With the tokens it needs and those there are; the requests before and behind it run."""
    with make_llm(random_folder, block_size=8, num_gpu_blocks_override=3) as llm:
        llm.add_request([1] * 20, greedy(max_tokens=3, ignore_eos=True), "before")
        for length in (24, 40):
            with pytest.raises(ValueError, match=rf"needs room for {length + 1} tokens .* 24\b"):
                llm.add_request([1] * length, GREEDY, "never")
        llm.add_request([2] * 23, greedy(max_tokens=5, ignore_eos=True), "behind")
        finished = {}
        while llm.has_unfinished_requests():
            finished.update({output.request_id: output.outputs[0] for output in llm.step() if output.finished})
        assert {name: (len(o.token_ids), o.finish_reason) for name, o in finished.items()} == {
            "before": (3, "length"),
            "behind": (1, "length"),  # the cache has no room for a second one
        }
        check_nothing_is_left(llm)


def test_a_cache_without_a_single_block_is_refused(random_folder: Path) -> None:
    with pytest.raises(ValueError, match="KV cache needs"):
        make_llm(random_folder, kv_cache_memory_bytes=100)


# -- greedy beside sampled --


def test_greedy_is_greedy_beside_sampled_requests(llm: LLM) -> None:
    """In every row of the batch, for temperature 0 and for one too small to divide by."""
    expected = [complete(llm, [i, i + 1], GREEDY).token_ids for i in range(8)]
    for greedy_rows in ([0, 3, 7], [1, 2, 4, 5, 6]):
        params = [SamplingParams(temperature=1.5, top_k=20, seed=i, max_tokens=8) for i in range(8)]
        for i in greedy_rows:
            params[i] = SamplingParams(temperature=0 if i % 2 else 1e-7, max_tokens=8, top_p=0.5, top_k=3)
        outputs = llm.generate([[i, i + 1] for i in range(8)], params, use_tqdm=False)
        assert [outputs[i].outputs[0].token_ids for i in greedy_rows] == [expected[i] for i in greedy_rows]


# -- text, EOS, stops --


def test_the_text_ends_at_eos_and_leaves_it_out(reciter: LLM) -> None:
    output = complete(reciter, "X", LONG)
    assert output.text == SCRIPT
    assert output.token_ids == [*SCRIPT_IDS, EOS]
    assert (output.finish_reason, output.stop_reason, output.finished()) == ("stop", None, True)


def test_special_tokens_are_in_the_text_only_if_asked_for(reciter: LLM) -> None:
    num_tokens = len(SCRIPT_IDS) + 4
    for skip, expected in ((True, SCRIPT + "abc"), (False, SCRIPT + "</s>abc")):
        output = complete(reciter, "X", greedy(ignore_eos=True, max_tokens=num_tokens, skip_special_tokens=skip))
        assert (output.text, output.finish_reason) == (expected, "length")
        assert output.token_ids == [*SCRIPT_IDS, EOS, *b"abc"]


def test_without_detokenization_the_text_is_empty(reciter: LLM) -> None:
    output = complete(reciter, "X", greedy(detokenize=False))
    assert output.text == "" and output.token_ids == [*SCRIPT_IDS, EOS]


def test_an_output_that_ends_inside_a_character(reciter: LLM) -> None:
    output = complete(reciter, "X", greedy(max_tokens=5))
    assert output.token_ids == list("abcdé".encode()[:5]) and output.text == "abcd\ufffd"


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_each_of_several_eos_ids_stops(script_folder: Path, copy_of: Callable[[Path], Path], place: str) -> None:
    """A list in either file; the tokenizer's own EOS stops as well."""
    folder = copy_of(script_folder)
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    ids = {"a": SCRIPT_IDS[3], "b": SCRIPT_IDS[9]}
    for first, second in (("a", "b"), ("b", "a")):
        edit_json(folder / place, eos_token_id=[ids[first], ids[second]])
        with make_llm(folder) as llm:
            output = complete(llm, "X", LONG)
            assert (output.text, output.finish_reason, output.stop_reason) == ("abc", "stop", None)
            later = complete(llm, SCRIPT[:7], LONG)  # continues after the first id
            assert (later.text, later.token_ids[-1]) == ("h", ids["b"])
            own = complete(llm, SCRIPT[:12], LONG)
            assert (own.text, own.token_ids[-1]) == (SCRIPT[12:], EOS)
            assert complete(llm, "X", greedy(ignore_eos=True, max_tokens=6)).text == "abcdé"


def test_a_single_eos_id_that_is_not_the_tokenizers(script_folder: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(script_folder)
    edit_json(folder / "generation_config.json", eos_token_id=SCRIPT_IDS[2])
    with make_llm(folder) as llm:
        assert complete(llm, "X", LONG).text == "ab"
    with make_llm(folder, skip_tokenizer_init=True) as llm:
        assert complete(llm, [88], LONG).token_ids == SCRIPT_IDS[:3]


STOPS: list[tuple[Any, str, str]] = [
    ("d", "abc", "d"),
    ("ghi", "abcdé-", "ghi"),
    (["zzz", "ij😀"], "abcdé-gh", "ij😀"),
    ("é", "abcd", "é"),
    ("😀", "abcdé-ghij", "😀"),
    (["j", "hij"], "abcdé-g", "hij"),
    (["hij", "j"], "abcdé-g", "hij"),
    (["klm", "cd"], "ab", "cd"),
    ("abc", "", "abc"),
    ("S", SCRIPT[:-1], "S"),
]


@pytest.mark.parametrize(("stop", "text", "reason"), STOPS, ids=str)
def test_stop_strings_cut_the_text_before_them(reciter: LLM, stop: Any, text: str, reason: str) -> None:
    """Within a token, across tokens, within characters of several tokens; of two the one that begins first."""
    output = complete(reciter, "X", greedy(stop=stop))
    assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", reason)
    assert bytes(output.token_ids).decode() == text + reason
    check_nothing_is_left(reciter)


def test_a_stop_string_in_the_last_allowed_token_counts(reciter: LLM) -> None:
    output = complete(reciter, "X", greedy(stop="cd", max_tokens=4))
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", "cd")
    output = complete(reciter, "X", greedy(stop="de", max_tokens=4))
    assert (output.text, output.finish_reason, output.stop_reason) == ("abcd", "length", None)


def test_a_stop_string_in_the_prompt_does_not_count(reciter: LLM) -> None:
    assert complete(reciter, "ab", greedy(stop="bc")).text == SCRIPT[2:]


def test_stop_strings_wait_for_min_tokens(endless: LLM) -> None:
    for min_tokens in (0, 1, 2):
        assert complete(endless, "X", greedy(stop="c", min_tokens=min_tokens)).text == "ab"
    for min_tokens in (4, 20):
        output = complete(endless, "X", greedy(stop="c", min_tokens=min_tokens))
        assert (output.text, output.stop_reason) == (SCRIPT + "ab", "c")


def test_stop_token_ids_end_the_output_and_are_named(reciter: LLM) -> None:
    output = complete(reciter, "X", greedy(stop_token_ids=[SCRIPT_IDS[8], SCRIPT_IDS[12], 3]))
    assert (output.text, output.finish_reason, output.stop_reason) == ("abcdé-g", "stop", SCRIPT_IDS[8])
    assert output.token_ids == SCRIPT_IDS[:9]
    also_ignoring_eos = complete(reciter, "X", greedy(stop_token_ids=[EOS], ignore_eos=True))
    assert (also_ignoring_eos.text, also_ignoring_eos.stop_reason) == (SCRIPT, EOS)


def test_eos_and_stop_tokens_wait_for_min_tokens(reciter: LLM) -> None:
    length = len(SCRIPT_IDS)
    output = complete(reciter, "X", greedy(min_tokens=length + 3))
    assert output.token_ids[:length] == SCRIPT_IDS and len(output.token_ids) > length + 3
    assert EOS not in output.token_ids[: length + 3]
    output = complete(reciter, "X", greedy(min_tokens=length))
    assert output.token_ids == [*SCRIPT_IDS, EOS]
    output = complete(reciter, "X", greedy(min_tokens=5, stop_token_ids=[SCRIPT_IDS[3]], max_tokens=12))
    assert SCRIPT_IDS[3] not in output.token_ids[:5] and len(output.token_ids) >= 5


# -- chat --

HELLO = [{"role": "user", "content": "Hello"}]
HELLO_IDS = [BOS, IM_START, *b"user\nHello", IM_END, *b"\n", IM_START, *b"assistant\n"]


def test_a_templated_prompt_gets_one_bos(llm: LLM) -> None:
    """From `chat`, and from a template's text given to `generate`."""
    (output,) = llm.chat(HELLO, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == HELLO_IDS
    text = llm.get_tokenizer().apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<s>")
    (from_text,) = llm.generate(text, GREEDY, use_tqdm=False)
    assert from_text.prompt_token_ids == HELLO_IDS
    assert from_text.outputs == output.outputs
    (plain,) = llm.generate("Hello", GREEDY, use_tqdm=False)
    assert plain.prompt_token_ids == [BOS, *b"Hello"]


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    other = [{"role": "system", "content": "Be brief."}, *HELLO]
    alone = [llm.chat(messages, GREEDY, use_tqdm=False)[0].outputs for messages in (HELLO, other)]
    together = llm.chat([HELLO, other], [GREEDY, GREEDY], use_tqdm=False)
    assert [output.outputs for output in together] == alone
    (open_ended,) = llm.chat(HELLO, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert open_ended.prompt_token_ids == HELLO_IDS[: HELLO_IDS.index(IM_END) + 2]
    template = {"chat_template": "{{ messages[0]['content'] }}!"}
    (own,) = llm.chat(HELLO, GREEDY, use_tqdm=False, chat_template_kwargs=template)
    assert own.prompt_token_ids == list(b"Hello!")


def test_chat_refuses_what_is_no_conversation(llm: LLM) -> None:
    for messages in ([], [[]], [HELLO, []]):
        with pytest.raises(ValueError, match="messages"):
            llm.chat(messages, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
        check_nothing_is_left(llm)


def test_chat_without_a_template_says_what_to_do(random_folder: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(random_folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with make_llm(folder) as llm, pytest.raises(ValueError, match="chat template"):
        llm.chat(HELLO, GREEDY, use_tqdm=False)


# -- one step at a time --


def stream(llm: LLM) -> dict[str, list[RequestOutput]]:
    """All outputs of `step`, by request, until there is nothing left to do."""
    seen: dict[str, list[RequestOutput]] = {}
    for _ in range(10_000):
        if not llm.has_unfinished_requests():
            return seen
        for output in llm.step():
            seen.setdefault(output.request_id, []).append(output)
    raise AssertionError("step() never comes to an end")


@pytest.mark.parametrize("stop", [None, "ij😀", ["klmx", "p.Q"], "é"], ids=str)
def test_streamed_text_only_grows_and_ends_as_the_final_text(reciter: LLM, stop: Any) -> None:
    """No piece of a stop string, and no half character, is ever shown and taken back."""
    params = greedy(stop=stop)
    expected = complete(reciter, "X", params)
    request_id = reciter.add_request("X", params)
    outputs = stream(reciter)[request_id]
    texts = [output.outputs[0].text for output in outputs]
    for before, after in zip(texts, texts[1:], strict=False):
        assert after.startswith(before)
    assert "\ufffd" not in "".join(texts)
    assert outputs[-1].outputs[0] == expected
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, len(expected.token_ids) + 1))
    check_nothing_is_left(reciter)


def test_streams_of_random_bytes_equal_the_final_texts(llm: LLM) -> None:
    """Most of what a random model says is no UTF-8: text only grows, and the end agrees with decoding all at once."""
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=30, ignore_eos=seed % 2 == 0) for seed in range(8)]
    final = {
        str(seed): output.outputs[0] for seed, output in enumerate(llm.generate(["text"] * 8, params, use_tqdm=False))
    }
    for seed in range(8):
        llm.add_request("text", params[seed], f"seed-{seed}")
    seen = stream(llm)
    for seed in range(8):
        outputs = seen[f"seed-{seed}"]
        texts = [output.outputs[0].text for output in outputs]
        assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
        assert outputs[-1].outputs[0] == final[str(seed)]
        assert texts[-1] == llm.get_tokenizer().decode(
            [token_id for token_id in final[str(seed)].token_ids if token_id < 256]
        )


def test_requests_join_while_others_run(llm: LLM) -> None:
    expected = {str(i): complete(llm, [i + 1] * 5, GREEDY).token_ids for i in range(6)}
    seen: dict[str, list[int]] = {}
    for i in range(6):
        llm.add_request([i + 1] * 5, GREEDY, f"join-{i}")
        for output in llm.step():
            seen[output.request_id.removeprefix("join-")] = output.outputs[0].token_ids
    for name, outputs in stream(llm).items():
        seen[name.removeprefix("join-")] = outputs[-1].outputs[0].token_ids
    assert seen == expected


def test_generate_keeps_what_it_sees_of_other_requests(llm: LLM) -> None:
    expected = complete(llm, [9, 9], GREEDY)
    request_id = llm.add_request([9, 9], GREEDY)
    (own,) = llm.generate([[3, 3]], greedy(max_tokens=30, ignore_eos=True), use_tqdm=False)
    assert own.request_id != request_id and llm.has_unfinished_requests()
    assert stream(llm)[request_id][-1].outputs[0] == expected
    check_nothing_is_left(llm)


def test_a_request_id_that_is_in_use_is_refused(llm: LLM) -> None:
    llm.add_request([1], GREEDY, "mine")
    with pytest.raises(ValueError, match="'mine'"):
        llm.add_request([2], GREEDY, "mine")
    outputs = stream(llm)
    assert list(outputs) == ["mine"] and outputs["mine"][-1].prompt_token_ids == [1]
    assert llm.add_request([2], GREEDY, "mine") == "mine"  # free again
    stream(llm)


def test_ids_that_a_user_chose_never_meet_those_of_generate(random_folder: Path) -> None:
    """Numbers are a natural choice of users as well."""
    with make_llm(random_folder) as llm:
        expected = complete(llm, [5, 5], LONG).token_ids
        names = [str(number) for number in range(30, 50)]
        for name in names:
            llm.add_request([5, 5], LONG, name)
        outputs = llm.generate([[i] for i in range(12)], GREEDY, use_tqdm=False)
        assert [output.prompt_token_ids for output in outputs] == [[i] for i in range(12)]
        automatic = llm.add_request([6], GREEDY)
        assert automatic not in names
        seen = stream(llm)
        assert all(seen[name][-1].outputs[0].token_ids == expected for name in names)
        check_nothing_is_left(llm)


@pytest.mark.parametrize("num_steps", range(5))
def test_an_aborted_request_is_gone_at_once(llm: LLM, num_steps: int) -> None:
    expected = complete(llm, [4, 4, 4], GREEDY)
    names = [llm.add_request([4, 4, 4], GREEDY, name) for name in ("keep", "drop", "drop-too")]
    for _ in range(num_steps):
        llm.step()
    llm.abort_request("drop")
    llm.abort_request(["drop-too", "drop", "never-was"])
    seen = stream(llm)
    assert set(seen) <= {"keep"} and names[0] == "keep"
    assert seen["keep"][-1].outputs[0] == expected
    check_nothing_is_left(llm)


def test_aborting_all_leaves_nothing_to_do(llm: LLM) -> None:
    names = [llm.add_request([i + 1], greedy(stop="zz")) for i in range(12)]  # more than rows
    llm.step()
    llm.step()
    llm.abort_request(names)
    check_nothing_is_left(llm)


def test_step_without_work_returns_nothing(llm: LLM) -> None:
    assert llm.step() == [] and not llm.has_unfinished_requests()


# -- about the engine --


def test_default_parameters_come_from_the_generation_config(
    script_folder: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(script_folder)
    edit_json(
        folder / "generation_config.json",
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.1,
        repetition_penalty=1.2,
        max_new_tokens=3,
    )
    with make_llm(folder) as llm:
        params = llm.get_default_sampling_params()
        assert params == SamplingParams(
            temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.2, max_tokens=3
        )
        (output,) = llm.generate("X", use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 3
    edit_json(folder / "generation_config.json", do_sample=False)
    with make_llm(folder) as llm:
        params = llm.get_default_sampling_params()
        assert params.is_greedy and params.max_tokens == 3
    (folder / "generation_config.json").write_text("{}")
    with make_llm(folder) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_metrics_count_steps_tokens_and_time(random_folder: Path) -> None:
    """The host's share of the time is reported, and no more than what passed."""
    with make_llm(random_folder, block_size=8, enable_prefix_caching=True) as llm:
        metrics = llm.get_metrics()
        starts = [metrics.pop(name) for name in list(metrics) if name.startswith("start_")]
        assert set(metrics.values()) == {0, metrics["num_blocks"]}
        assert len(starts) == 5 and min(starts) >= 0 and sum(starts) > 0
        start = time.perf_counter()
        for _ in range(2):
            llm.generate([[1] * 20], greedy(max_tokens=5, ignore_eos=True), use_tqdm=False)
        elapsed = time.perf_counter() - start
        metrics = llm.get_metrics()
    assert metrics["num_steps"] == 10
    assert metrics["num_tokens_computed"] == 20 + 4 + (20 - 16) + 4
    assert metrics["num_tokens_sampled"] == 10
    assert metrics["num_prompt_tokens_cached"] == 16
    assert metrics["num_context_tokens_read"] == 2 * (20 + 21 + 22 + 23 + 24)
    assert metrics["num_query_key_pairs"] == sum(range(1, 25)) + sum(range(17, 25))
    assert metrics["num_preemptions"] == 0
    assert 0 < metrics["host_seconds"] + metrics["wait_seconds"] <= elapsed
    assert metrics["host_seconds"] > 0 and metrics["wait_seconds"] >= 0


def test_cached_tokens_are_counted_and_can_be_forgotten(random_folder: Path) -> None:
    with make_llm(random_folder, block_size=8) as llm:
        prompt = list(range(40))

        def num_cached() -> int:
            return llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens

        assert (num_cached(), num_cached()) == (0, 32)
        llm.reset_prefix_cache()
        assert (num_cached(), num_cached()) == (0, 32)
    with make_llm(random_folder, block_size=8, enable_prefix_caching=False) as llm:
        assert (num_cached(), num_cached()) == (0, 0)


# -- interruptions and failures --


class Interruption:
    """Raises `error` inside the model's n-th forward pass from now."""

    def __init__(self, llm: LLM, error: BaseException, after: int) -> None:
        self.left = after
        self.error = error
        self.handle = inner_model(llm).norm.register_forward_hook(self)  # layers have run: some keys are written

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            self.handle.remove()
            raise self.error


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_an_interrupted_generate_leaves_nothing_behind(random_folder: Path, after: int, overlap_depth: int) -> None:
    """Control-C in a notebook: the engine goes on, with right tokens, and what others queued is still there."""
    prompts = [list(range(i, i + 20)) for i in range(4)]
    options = {"overlap_depth": overlap_depth, "block_size": 8, "max_num_batched_tokens": 48, "max_num_seqs": 8}
    with make_llm(random_folder, **options) as fresh:
        expected = [complete(fresh, prompt, GREEDY) for prompt in prompts]
    with make_llm(random_folder, **options) as llm:
        other = llm.add_request(prompts[3], GREEDY)
        Interruption(llm, KeyboardInterrupt(), after)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts[:3], GREEDY, use_tqdm=False)
        outputs = llm.generate(prompts[:3], GREEDY, use_tqdm=False)
        assert [output.outputs[0] for output in outputs] == expected[:3]
        assert stream(llm)[other][-1].outputs[0] == expected[3]
        check_nothing_is_left(llm)


def test_an_interruption_between_steps_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = complete(llm, "a", GREEDY)
    real_step = llm._session.step
    calls = iter(range(100))

    def interrupted() -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real_step()

    monkeypatch.setattr(llm._session, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    check_nothing_is_left(llm)
    assert complete(llm, "a", GREEDY) == expected


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_a_failing_step_closes_the_engine(random_folder: Path, overlap_depth: int) -> None:
    """Device state is unknown then: refuse instead of answering wrongly."""
    llm = make_llm(random_folder, overlap_depth=overlap_depth)
    Interruption(llm, RuntimeError("out of memory"), 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    for call in (lambda: llm.generate(["a"]), lambda: llm.add_request("a"), llm.step):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert not llm.has_unfinished_requests()
    llm.close()


def test_close_may_be_called_twice(random_folder: Path) -> None:
    """By hand, by `with`, with requests still running."""
    with make_llm(random_folder) as llm:
        llm.add_request("a", GREEDY)
        llm.step()
        llm.close()
    llm.close()
    assert not llm.has_unfinished_requests()
    llm.abort_request("0")
    for call in (lambda: llm.generate(["a"]), lambda: llm.chat(HELLO), lambda: llm.add_request("a"), llm.step):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_with_statement_closes_after_an_error(random_folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), make_llm(random_folder) as llm:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a")


def test_engines_in_threads_do_not_meet(random_folder: Path, endless_folder: Path) -> None:
    """Two at once in one process, stepping at the same time."""
    with make_llm(random_folder) as one, make_llm(endless_folder) as two:
        expected = [complete(llm, "X", LONG) for llm in (one, two)]
        results: dict[int, list[CompletionOutput]] = {0: [], 1: []}

        def work(index: int, llm: LLM) -> None:
            for _ in range(5):
                results[index].append(complete(llm, "X", LONG))

        threads = [threading.Thread(target=work, args=item) for item in enumerate((one, two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in (0, 1):
            assert results[index] == [expected[index]] * 5
