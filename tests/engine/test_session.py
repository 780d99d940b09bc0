"""One session, many callers: threads, cancelling, closing. With the fake device, so every token is known."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from tests.engine.fake_device import FakeDevice, check_nothing_leaked, expected_output, make_engine, make_request


def make_session(**options: Any) -> tuple[Session, FakeDevice]:
    engine, device = make_engine(**options)
    return Session(engine), device


def tokens(group: Sequence[Request]) -> list[int]:
    return group[0].output_token_ids


def generate(session: Session, prompts: Sequence[Sequence[int]], max_tokens: int = 8) -> list[list[int]]:
    inbox = Inbox(tokens)
    with session.numbers(len(prompts)) as numbers:
        handles = [
            Handle([make_request(prompt, max_tokens, name=str(number))], inbox, only_ends=True)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
    found = dict(session.run(handles, inbox))
    return [found[handle] for handle in handles]


def expected(prompts: Sequence[Sequence[int]], max_tokens: int = 8) -> list[list[int]]:
    return [expected_output(prompt, len(prompt) + max_tokens, frozenset()) for prompt in prompts]


def check_idle(session: Session) -> None:
    assert not session.has_unfinished_requests() and not session.exclusively(session.step)
    check_nothing_leaked(session.engine)  # type: ignore[arg-type]


def in_threads(count: int, work: Any) -> list[Any]:
    """work(i) in a thread each; what they returned or raised."""
    results: list[Any] = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    return results


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_calls_from_many_threads_run_together_and_equal_those_alone(overlap_depth: int) -> None:
    session, device = make_session(overlap_depth=overlap_depth, num_blocks=400)
    prompts = [[[thread, call, 1] for call in range(5)] for thread in range(8)]
    results = in_threads(8, lambda i: [generate(session, prompts[i]) for _ in range(20)])
    assert results == [[expected(prompts[i])] * 20 for i in range(8)]
    check_idle(session)
    assert len(device.num_tokens_per_step) < 8 * 20 * 5 * 8  # or none ever met another


def test_bad_ids_and_numbers() -> None:
    session, _ = make_session()
    inbox = Inbox(tokens)
    first = Handle([make_request([1], name="mine")], inbox, only_ends=True)
    session.submit(first)
    with pytest.raises(ValueError, match="'mine' is in use"):
        session.submit(Handle([make_request([2], name="mine")], inbox, only_ends=True))
    with session.numbers(2) as numbers:
        assert numbers == [0, 1]
    with pytest.raises(KeyError), session.numbers(1) as numbers:
        raise KeyError
    with session.numbers(1) as numbers:
        assert numbers == [2]
    session.cancel([first])
    check_idle(session)


def test_closing_tells_everyone_who_waits() -> None:
    session, _ = make_session(num_blocks=4000, max_num_seqs=8)
    started = threading.Barrier(5)

    def work(i: int) -> Any:
        started.wait(30)
        if i < 4:
            return generate(session, [[i, 1]], max_tokens=10_000)
        session.close()
        return "closed"

    *errors, closer = in_threads(5, work)
    assert closer == "closed"
    assert all(isinstance(error, RuntimeError) and "closed (by close())" in str(error) for error in errors)


def test_a_thread_that_leaves_in_mid_run_takes_only_its_own_requests_with_it() -> None:
    """It may have been stepping for all; another one takes over."""
    session, _ = make_session(num_blocks=1200)

    def work(i: int) -> Any:
        if i % 2:
            return [generate(session, [[i, call]], max_tokens=20) for call in range(10)]
        inbox = Inbox(tokens)
        with session.numbers(1) as (number,):
            handle = Handle([make_request([i, i], 10_000, name=str(number), limit=1000)], inbox, only_ends=False)
        for _, news in session.run([handle], inbox):
            if len(news) >= 3 + i:
                raise KeyError(i)
        return "it ran to its end"

    results = in_threads(8, work)
    for i, result in enumerate(results):
        if i % 2:
            assert result == [expected([[i, call]], 20) for call in range(10)]
        else:
            assert isinstance(result, KeyError)
    check_idle(session)
