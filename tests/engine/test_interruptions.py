"""An exception from outside at every line of a step: afterwards every request ends with its own tokens, and no block,
row or piece of text is lost.

A trace function raises at the k-th line that runs in nanovllm's files, for every k. That is more than signals do, whose
handlers run between some lines only.
"""

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np
import pytest

import nanovllm
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from tests.engine.fake_device import check_nothing_leaked, expected_output, make_engine, make_request

FOLDER = nanovllm.__path__[0]


class Interruption(BaseException):
    pass


class Tracer:
    """Raises at the k-th line of the package that runs inside `with tracer:`, once."""

    def __init__(self, k: int) -> None:
        self.left = k

    @property
    def has_raised(self) -> bool:
        return self.left <= 0

    def __enter__(self) -> None:
        if not self.has_raised:
            sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(FOLDER) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise Interruption
        return self._line


class Form:
    """A constraint that allows everything, and knows what it has seen."""

    error = None

    def __init__(self) -> None:
        self.seen: list[int] = []

    def advance(self, token_id: int) -> bool:
        self.seen.append(token_id)
        return False

    def restart(self, token_ids: Sequence[int]) -> None:
        self.seen = list(token_ids)

    def retract(self, num_tokens: int) -> bool:
        del self.seen[-num_tokens:]
        return True

    def bitmasks(self, constraints: Sequence[Any]) -> np.ndarray:
        return np.full((len(constraints), 4), -1, dtype=np.int32)


class HalfRight:
    def propose(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """One token that is right, and one that is not."""
        return [*expected_output(token_ids, len(token_ids) + 1, frozenset()), 0][:num_tokens]


def requests() -> list[list[Request]]:
    """Prompts that share blocks, two siblings, a form, a stop token, one that joins when a row is free."""
    output = expected_output([7, 7, 7], 40, frozenset())
    stopped = make_request([7, 7, 7], 30, [output[2]], name="stopped")
    formed = make_request(range(9), 3, name="formed")
    formed.constraint, formed.needs_host_tokens = Form(), True
    group = [make_request(range(10), 3, name="group") for _ in range(2)]
    for index, request in enumerate(group):
        request.index, request.siblings = index, group
    return [[stopped], group, [formed], [make_request(range(12), 2, name="last")]]


def check(group: Sequence[Request]) -> None:
    for request in group:
        prompt = request.token_ids[: request.num_prompt_tokens]
        assert request.output_token_ids == expected_output(prompt, request.max_total_tokens, request.stop_token_ids)
        if isinstance(request.constraint, Form):
            assert request.constraint.seen == request.output_token_ids


DRAFTS: dict[str | None, dict[str, Any]] = {
    None: {},
    "host": {"proposer": HalfRight()},
    "chained": {"drafter": "draft_model", "num_speculative_tokens": 2},
}


def make_session(overlap_depth: int, drafts: str | None = None) -> Session:
    # few blocks and rows, so that some wait and some are preempted
    sizes = {"num_blocks": 9, "block_size": 4, "max_num_seqs": 3}
    engine, _ = make_engine(**sizes, overlap_depth=overlap_depth, **DRAFTS[drafts])
    return Session(engine)


def check_idle(session: Session) -> None:
    assert not session.exclusively(session.step)  # it mends what the interruption left
    assert not session.has_unfinished_requests()
    check_nothing_leaked(session.engine)  # type: ignore[arg-type]
    assert not session.engine.output_processor._texts


def run_all(session: Session, tracer: Tracer) -> None:
    """Submit and wait as a caller does who tries again after each interruption."""

    def tell(group: Sequence[Request]) -> list[list[int]]:
        session.engine.output_processor._texts.update(dict.fromkeys(group))  # type: ignore[arg-type]
        return [request.output_token_ids for request in group]

    inbox = Inbox(tell)
    handles = [Handle(group, inbox, only_ends=False) for group in requests()]
    newest: dict[Handle, list[list[int]]] = {}
    unfinished = set(handles)
    for handle in handles:
        session.submit(handle)
    for _ in range(200):
        if not unfinished:
            break
        try:
            with tracer:
                session.wait(inbox)
        except Interruption:
            continue
        for handle in list(inbox.news):
            news, is_last = inbox.news.pop(handle)
            before = newest.get(handle, [[] for _ in handle.requests])
            assert all(new[: len(old)] == old for new, old in zip(news, before, strict=True)), "what was told stands"
            newest[handle] = news
            if is_last:
                unfinished.discard(handle)
    assert not unfinished, "it does not come to its end"
    for handle in handles:
        check(handle.requests)
        assert newest[handle] == [request.output_token_ids for request in handle.requests]


@pytest.mark.parametrize(
    ("overlap_depth", "drafts"),
    [(1, None), (2, None), *(pytest.param(2, drafts, marks=pytest.mark.slow) for drafts in ("host", "chained"))],
)
def test_waiting_again_after_an_interruption_at_any_line(overlap_depth: int, drafts: str | None) -> None:
    k = 0
    while True:
        k += 3 if drafts == "chained" else 1  # whose other lines are those of the other cases
        session, tracer = make_session(overlap_depth, drafts), Tracer(k)
        run_all(session, tracer)
        check_idle(session)
        if not tracer.has_raised:
            break
    assert k > 500


def generate(session: Session) -> None:
    inbox: Inbox[None] = Inbox(lambda group: None)
    handles = [Handle(group, inbox, only_ends=True) for group in requests()]
    for _ in session.run(handles, inbox):
        pass
    for handle in handles:
        check(handle.requests)


def leave_early(session: Session) -> None:
    inbox: Inbox[None] = Inbox(lambda group: None)
    stream = session.run([Handle(group, inbox, only_ends=False) for group in requests()], inbox)
    next(stream)
    stream.close()


@pytest.mark.parametrize("call", [generate, leave_early])
def test_a_call_interrupted_at_any_line_leaves_nothing_and_harms_nobody(call: Callable[[Session], None]) -> None:
    k = 0
    while True:
        k += 1
        session, tracer = make_session(2), Tracer(k)
        inbox: Inbox[None] = Inbox(lambda group: None)
        other = Handle([make_request([5, 6], 9, name="other")], inbox, only_ends=True)
        session.submit(other)
        try:
            with tracer:
                call(session)
        except Interruption:
            pass
        session.exclusively(session.step)
        assert list(session._handles) in (["other"], []), "an interrupted call takes its requests with it"
        while other.request_id in session._handles:
            session.wait(inbox)
        check(other.requests)
        check_idle(session)
        if not tracer.has_raised:
            break
    assert k > 300
