"""Outputs between two marks: they add up to the whole, stay what they were, and cost what is new."""

import random
import threading
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.output_processor import Mark, OutputProcessor
from nanovllm.engine.request import End, Request
from nanovllm.engine.scheduler_output import TOKEN_LOGPROB
from nanovllm.sampling_params import SamplingParams
from nanovllm.token_bytes import _BYTE_OF_CHARACTER
from tests.engine.test_ends import LETTERS, make_tokenizer

TOKEN_OF_BYTE = {_BYTE_OF_CHARACTER[character]: i for i, character in enumerate(LETTERS)}
TEXT = "two €uro, ST and STO, 😀 ends with STOP"  # "STOP" is a stop string, and is in mid-text held back
OUTPUT_IDS = [TOKEN_OF_BYTE[byte] for byte in TEXT.encode()]


class Counting(list[Any]):
    """Counts what is read of it."""

    num_read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found


def make_request(num_prompt_tokens: int = 4, **options: Any) -> Request:
    return Request(
        request_id="0",
        prompt=None,
        token_ids=Counting([5] * num_prompt_tokens),
        num_prompt_tokens=num_prompt_tokens,
        params=SamplingParams(max_tokens=5000, **options),
        seed=0,
        stop_token_ids=frozenset(),
        max_total_tokens=9999,
    )


def take(request: Request, token_id: int) -> None:
    request.token_ids.append(token_id)
    request.logprobs.append(np.array([(token_id, -0.5, 1)], TOKEN_LOGPROB).tobytes())


def end(request: Request, reason: str, stop_reason: str | None = None) -> None:
    request.end = End(reason, stop_reason)


@pytest.mark.parametrize("options", [{}, {"stop": "STOP"}, {"stop": "STOP", "include_stop_str_in_output": True}])
@pytest.mark.parametrize("seed", range(5))
def test_any_two_marks_hold_what_lies_between_them_for_ever(options: dict[str, Any], seed: int) -> None:
    """Also where the decoding state was dropped in between, as after an interruption."""
    rng = random.Random(seed)
    processor, request = OutputProcessor(make_tokenizer()), make_request(**options, logprobs=0)
    marks: list[list[Mark]] = []
    texts: list[str] = []
    for token_id in OUTPUT_IDS[:-1]:
        take(request, token_id)
        assert not options or processor.find_stop_string(request) is None
        if rng.random() < 0.2:
            processor.forget(request)
        if rng.random() < 0.5:
            marks.append(processor.mark([request]))
            texts.append(processor.make_output([request], marks[-1]).outputs[0].text)
    take(request, OUTPUT_IDS[-1])
    end(request, *(("stop", processor.find_stop_string(request)) if options else ("length",)))
    marks.append(processor.mark([request]))
    processor.forget(request)
    whole = processor.make_output([request], marks[-1])
    expected = TEXT.removesuffix("STOP") if len(options) == 1 else TEXT
    assert whole.finished and whole.outputs[0].text == expected and whole.outputs[0].token_ids == OUTPUT_IDS
    texts.append(expected)
    for i, mark in enumerate(marks):
        assert processor.make_output([request], mark).outputs[0].text == texts[i]
        assert expected.startswith(texts[i])
        for j in range(i + 1, len(marks)):
            output = processor.make_output([request], marks[j], mark)
            (piece,) = output.outputs
            start, stop = mark[0].num_tokens, marks[j][0].num_tokens
            assert piece.text == texts[j][len(texts[i]) :] and piece.token_ids == OUTPUT_IDS[start:stop]
            assert piece.logprobs is not None and [min(entry) for entry in piece.logprobs] == piece.token_ids
            assert piece.cumulative_logprob == -0.5 * stop
            assert output.finished == (piece.finish_reason is not None) == (j == len(marks) - 1)
            assert output.prompt_token_ids is whole.prompt_token_ids
        assert not processor.make_output([request], mark, mark).outputs, "there is nothing new"


@pytest.mark.parametrize("num_tokens", [100, 1000])
def test_a_stream_reads_each_token_and_each_piece_of_text_a_few_times(num_tokens: int) -> None:
    processor, request = OutputProcessor(make_tokenizer()), make_request(num_prompt_tokens=3000)
    processor.mark([request])
    text = processor._texts[request]
    text._pieces = pieces = Counting()
    seen: list[Mark] = []
    streamed = []
    for i in range(num_tokens):
        request.token_ids.append(TOKEN_OF_BYTE[ord("a") + i % 26])
        marks = processor.mark([request])
        streamed.append(processor.make_output([request], marks, seen).outputs[0].text)
        seen = marks
    assert "".join(streamed) == processor.make_output([request]).outputs[0].text
    assert isinstance(request.token_ids, Counting) and request.token_ids.num_read <= 3000 + 4 * num_tokens
    assert pieces.num_read <= 4 * num_tokens


def test_one_thread_reads_while_another_steps() -> None:
    processor, request = OutputProcessor(make_tokenizer()), make_request(stop="never", logprobs=0)
    told: SimpleQueue[list[Mark]] = SimpleQueue()

    def step() -> None:
        for i in range(3000):
            take(request, OUTPUT_IDS[i % len(OUTPUT_IDS)])
            told.put(processor.mark([request]))
        end(request, "length")
        told.put(processor.mark([request]))

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    seen: list[Mark] = []
    pieces = []
    while not (seen and seen[0].is_ended):
        marks = told.get(timeout=60)
        pieces += processor.make_output([request], marks, seen).outputs
        wholes = processor.make_output([request], marks).outputs
        seen = marks
    thread.join(60)
    (whole,) = processor.make_output([request]).outputs
    assert "".join(piece.text for piece in pieces) == whole.text == wholes[0].text
    assert [token_id for piece in pieces for token_id in piece.token_ids] == whole.token_ids == wholes[0].token_ids
    assert sum(len(piece.logprobs or ()) for piece in pieces) == 3000
