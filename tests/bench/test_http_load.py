"""What a server sends is read with the time of each piece, however the network cuts it."""

import json
from typing import Any

import pytest

from nanovllm_bench.http_load import Exchange, Target, arrival_offsets, read_http, read_reply
from nanovllm_bench.serving import _read_limits

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


STREAM = [
    event(choices=[{"delta": {"role": "assistant", "content": ""}}]),
    event(choices=[{"delta": {"content": "a"}}]) + event(choices=[{"delta": {"content": "b"}}]),
    event(choices=[{"delta": {}, "finish_reason": "length"}]),
    event(choices=[], usage={"completion_tokens": 3, "prompt_tokens": 5}),
    b"data: [DONE]\n\n",
]


def test_times_are_those_of_the_events_with_text() -> None:
    exchange = Exchange(due=1.0, arrivals=[(2.0, HEAD)])
    exchange.arrivals += [(3.0 + i, chunk(part)) for i, part in enumerate(STREAM)] + [(8.0, b"0\r\n\r\n")]
    reply = read_reply(exchange)
    assert (reply.times, reply.end, reply.num_tokens, reply.num_prompt_tokens) == ([3.0], 7.0, 3, 5)


def test_any_cut_of_the_bytes_reads_the_same() -> None:
    whole = HEAD + b"".join(map(chunk, STREAM)) + chunk(b"") + b"\r\n"
    for size in (1, 7, 50):
        pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
        reply = read_reply(Exchange(0.0, list(enumerate(pieces))))
        assert reply.num_tokens == 3
        assert reply.times == [(whole.index(chunk(STREAM[2])) - 1) // size], "when the last of their bytes was there"


def test_an_answer_of_known_length() -> None:
    arrivals = [(1.0, b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\n"), (2.0, b"no"), (3.0, b"pe")]
    status, parts = read_http(arrivals)
    assert status == 404 and b"".join(part for _, part in parts) == b"nope"
    with pytest.raises(ValueError, match="status 404: nope"):
        read_reply(Exchange(0.0, arrivals))


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (event(error={"message": "broken"}), "broken"),
        (event(choices=[{"text": "", "finish_reason": "error", "error": "why"}]), "why"),
        (b"", "without its usage"),
    ],
)
def test_a_stream_that_failed_is_no_reply(last: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_reply(Exchange(0.0, [(1.0, HEAD), (2.0, chunk(event(choices=[{"text": "a"}]) + last))]))


def test_arrivals_are_random_with_the_rate_that_was_asked_for() -> None:
    assert arrival_offsets(3, float("inf")) == [0.0, 0.0, 0.0]
    offsets = arrival_offsets(4000, 50.0)
    assert offsets == sorted(offsets) and offsets[-1] == pytest.approx(4000 / 50, rel=0.1)
    gaps = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    assert sum(gap > 2 / 50 for gap in gaps) / len(gaps) == pytest.approx(2.718**-2, rel=0.15)


def test_limits_and_urls_that_mean_nothing_are_refused() -> None:
    assert _read_limits(["ttft:100", "tpot:7.5"]) == {"ttft": 100.0, "tpot": 7.5}
    for text in ("ttft", "ttft:x", "itl:5", "tpot:-1"):
        with pytest.raises(ValueError, match="--goodput takes"):
            _read_limits([text])
    with pytest.raises(ValueError, match="begins with http"):
        Target("ftp://here")
