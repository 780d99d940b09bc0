"""What ends a request where several things would: every pair of them at one token, and what its text is then."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from nanovllm.engine.cache_manager import CacheManager
from nanovllm.engine.ends import End, find_end
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduler_output import ModelRunnerOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS = 256  # its text is "</s>"


class Form:
    """A form that is complete, or cannot go on, with the third output token."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails
        self._num_tokens = 0
        self.error: str | None = None

    def advance(self, token_id: int) -> bool:
        self._num_tokens += 1
        if self._num_tokens == 3 and self._fails:
            self.error = "a limit"
        return self._num_tokens == 3 and not self._fails

    def restart(self, token_ids: Any) -> None:
        raise NotImplementedError

    def bitmasks(self, constraints: Any) -> np.ndarray:
        return np.full((len(constraints), 9), -1, dtype=np.int32)


def make_tokenizer() -> Tokenizer:
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(lambda: None, backend, eos_token_id=EOS, bos_token_id=None)


def letter(character: str) -> int:
    return LETTERS.index(character)


# What may end the request at its third output token, in the order of the rule: the request's fields, and its end.
THINGS: dict[str, tuple[dict[str, Any], End]] = {
    "EOS": ({"eos": True}, End("stop")),
    "stop id": ({"stop_token_ids": True}, End("stop", letter("c"))),
    "stop string": ({"stop": "bc"}, End("stop", "bc")),
    "form fails": ({"form": Form(True)}, End("error", error="a limit")),
    "form ends": ({"form": Form(False)}, End("stop")),
    "max_tokens": ({"max_tokens": 3}, End("length")),
    "max_model_len": ({"max_model_len": 4}, End("length")),
}


def run(things: dict[str, Any], **options: Any) -> tuple[Request, OutputProcessor]:
    """A request says "abc", or "ab" and EOS, with the engine's own scheduler."""
    last = letter("c") if not things.get("eos") or things.get("stop_token_ids") else EOS
    eos = frozenset([last]) if things.get("eos") else frozenset[int]()
    own = frozenset([letter("c")]) if things.get("stop_token_ids") else frozenset[int]()
    max_tokens = things.get("max_tokens", 8)
    params = SamplingParams(
        max_tokens=max_tokens,
        stop=[things["stop"]] if "stop" in things else None,
        stop_token_ids=sorted(own),
        **options,
    )
    form = things.get("form")
    request = Request(
        request_id="0",
        prompt=None,
        token_ids=[letter("x")],
        num_prompt_tokens=1,
        params=params,
        seed=0,
        stop_token_ids=eos | own,
        stop_reasons=things.get("reasons", dict.fromkeys(eos)),
        max_total_tokens=min(1 + max_tokens, things.get("max_model_len", 99)),
        constraint=None if form is None else Form(form._fails),
        needs_host_tokens=form is not None,
    )
    scheduler = Scheduler(CacheManager(9, 4, enable_prefix_caching=True), max_num_seqs=2, max_num_batched_tokens=16)
    processor = OutputProcessor(make_tokenizer())
    scheduler.add_request(request)
    for token_id in [letter("a"), letter("b"), last, letter("d")]:
        if scheduler.schedule() is None:
            break
        scheduler.update(ModelRunnerOutput(token_ids=[[token_id]]), processor.find_stop_string)
    assert scheduler.cache.pool.num_free_blocks == 9 or not request.is_finished
    return request, processor


def text_of(request: Request, processor: OutputProcessor) -> str:
    return processor.make_output([request]).outputs[0].text


@pytest.mark.parametrize("first,second", [*combinations(THINGS, 2), *((one, one) for one in THINGS)])
@pytest.mark.parametrize("includes", [False, True])
def test_every_pair_at_one_token(first: str, second: str, includes: bool) -> None:
    """Two forms at once do not exist; EOS and a stop string meet only where EOS is a token that has a text."""
    things = THINGS[first][0] | THINGS[second][0]
    if {first, second} == {"form fails", "form ends"}:
        return
    if {first, second} == {"EOS", "stop string"}:
        things["stop_token_ids"] = True  # makes "c" the EOS
    request, processor = run(things, include_stop_str_in_output=includes)
    end = THINGS[first][1]
    if includes and "stop string" in (first, second):
        end = THINGS["stop string"][1]
    assert request.end == end
    assert len(request.output_token_ids) == 3
    is_cut = first in ("EOS", "stop id") and not includes
    said = "ab" if is_cut or request.token_ids[-1] == EOS else "abc"
    assert text_of(request, processor) == ("a" if end == End("stop", "bc") and not includes else said)


def test_a_stop_string_may_lie_in_the_text_of_a_token_that_ends_the_request() -> None:
    """Where that text counts."""
    request, processor = run({"eos": True, "stop": "</s>"}, include_stop_str_in_output=True, skip_special_tokens=False)
    assert request.end == ("stop", "</s>", None)
    assert text_of(request, processor) == "ab</s>"


@pytest.mark.parametrize("includes", [False, True])
def test_a_stop_string_that_is_a_special_token(includes: bool) -> None:
    """It has no text in the output, and ends it where the token comes."""
    request, processor = run({"eos": True, "stop": "</s>"}, include_stop_str_in_output=includes)
    assert request.end == ("stop", None, None), "an EOS says no more than that"
    assert text_of(request, processor) == "ab"
    request, processor = run(
        {"eos": True, "stop": "</s>", "reasons": {EOS: "</s>"}}, include_stop_str_in_output=includes
    )
    assert request.end == ("stop", "</s>", None)
    assert text_of(request, processor) == "ab"


@pytest.mark.parametrize(
    ("things", "options", "reason"),
    [({"stop": "ab"}, {"min_tokens": 2}, None), ({"stop": "bc"}, {"min_tokens": 3}, None), ({"stop": "bc"}, {}, "bc")],
)
def test_stop_strings_wait_for_min_tokens(things: dict[str, Any], options: dict[str, int], reason: str | None) -> None:
    """A string that was whole before counts no more, as in vLLM."""
    request, _ = run({**things, "max_model_len": 5}, **options)
    assert request.end == ("stop" if reason else "length", reason, None)


def test_find_end_asks_for_strings_only_where_there_are_some() -> None:
    request, _ = run({})
    request.params = SamplingParams(max_tokens=8)

    def fail(_: Request) -> str | None:
        raise AssertionError("nobody asked for a stop string")

    assert find_end(request, fail) is None
