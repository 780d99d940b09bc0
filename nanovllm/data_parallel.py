"""DataParallelEngine: several engines, each in a process of its own, behind the calls of one.

        LLM -> DataParallelEngine --prompt, parameters, seeds--> replica 0: Engine on its own device (or devices)
                                  --...------------------------> replica 1
                                  <--new tokens, ends-----------

Owns the replicas, and which of them computes a request: the one that would be done with it first, counting the tokens
that it has left and sparing those of the prompt that its prefix cache should hold. This process keeps a copy of each
request and adds what its replica reports, so text is made here. Invariant: a request belongs to one replica for life.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from nanovllm.config import ResolvedConfig
from nanovllm.engine.block_pool import hash_block
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import End, Request
from nanovllm.executor.calls import CallFailed, pickle_function
from nanovllm.executor.children import Child, Children, start_child
from nanovllm.executor.worker import RunnerTimes


@dataclass(frozen=True)
class ReplicaSetup:
    """config: of one replica, resolved, its model a path. num_threads: for a CPU."""

    config: ResolvedConfig
    num_threads: int


class Admission(NamedTuple):
    """The sequences of one prompt, for a replica. key: the first one's number; the others' follow.

    Siblings and constraint are left out: the first would travel once for each, the second cannot.
    """

    key: int
    requests: list[Request]


def growing(request: Request) -> list[list[Any]]:
    """What a replica appends to."""
    scoring, capture = request.scoring, request.capture
    prompt_logprobs: list[Any] = [] if scoring is None else scoring.logprobs
    states = [] if capture is None else capture.states
    return [request.token_ids, request.logprobs, prompt_logprobs, states, request.weights_versions]


class News(NamedTuple):
    """What has become of a sequence since its last news. grown: what is new in each list of `growing`; starts: behind
    how many items, so that news that were taken in by half can be taken in again.
    """

    key: int
    starts: tuple[int, ...]
    grown: tuple[list[Any], ...]
    end: End | None
    num_cached_tokens: int | None
    begun_at: float | None


class StepNews(NamedTuple):
    """What one step has brought, in one message.

    The first three lists run in parallel: sequences that have grown by one token and nothing else, how many tokens each
    had, and the new one. They are nearly all of nearly every message, and cost a tenth of what `News` cost.
    """

    keys: list[int]
    starts: list[int]
    token_ids: list[int]
    others: list[News]


class Ready(NamedTuple):
    num_blocks: int
    runner_times: RunnerTimes


@dataclass
class _Replica:
    child: Child
    num_blocks: int
    num_tokens_left: int = 0  # of its unfinished requests, prompt and longest output
    waited_for_since: float = 0.0  # when it last said something, or got its first request after that
    cached: dict[bytes, None] = field(default_factory=dict)  # hashes of blocks it has computed, oldest first

    def num_cached_blocks(self, hashes: list[bytes]) -> int:
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in self.cached), len(hashes))

    def remember(self, hashes: list[bytes]) -> None:
        for block_hash in hashes:
            self.cached.pop(block_hash, None)
            self.cached[block_hash] = None
        while len(self.cached) > self.num_blocks:
            del self.cached[next(iter(self.cached))]


class _Placed(NamedTuple):
    request: Request
    replica: _Replica
    num_tokens: int  # that it adds to the replica's load


class DataParallelEngine:
    planner = None
    is_paused = False  # the replicas plan no steps then, so nothing is waited for

    def __init__(self, config: ResolvedConfig, setups: list[ReplicaSetup], output_processor: OutputProcessor) -> None:
        """config: of the whole, resolved. Raises what the replicas raise while they start."""
        self.output_processor = output_processor
        self._block_size = config.block_size
        self._timeout = config.distributed_timeout_seconds
        self._children = Children()
        self._finalize = weakref.finalize(self, Children.kill, self._children)
        for number in range(len(setups)):
            self._children.add(start_child(f"data-parallel replica {number}", "nanovllm.replica"))
        self._next_key = 0
        self._keys: dict[Request, int] = {}
        self._placed: dict[int, _Placed] = {}  # unfinished sequences, by key
        self._news: deque[StepNews] = deque()  # that came while something else was waited for
        self._number = 0
        self._replicas: list[_Replica] = []
        ready: list[Ready] = self._call("start", setups, is_limited=False)
        for child in self._children.members:
            child.limit_sends(self._timeout)
        self.num_blocks = min(one.num_blocks for one in ready)
        self.runner_times = ready[0].runner_times
        self._replicas = [
            _Replica(child, one.num_blocks) for child, one in zip(self._children.members, ready, strict=True)
        ]

    # -- what LLM calls of an engine --

    def add_request(self, request: Request) -> None:
        """The sequences of one prompt travel together, with the first."""
        if request.index:
            return
        group = request.siblings or [request]
        hashes = self._hashes(request) if len(self._replicas) > 1 else []  # else there is no choice
        replica = min(self._replicas, key=lambda one: self._cost(one, hashes))
        num_cached = min(replica.num_cached_blocks(hashes) * self._block_size, request.num_prompt_tokens - 1)
        key = self._next_key
        self._next_key += len(group)
        if not replica.num_tokens_left:
            replica.waited_for_since = time.monotonic()
        placed = {}
        for i, sequence in enumerate(group):
            num_tokens = sequence.max_total_tokens - (num_cached if i == 0 else request.num_prompt_tokens)
            placed[key + i] = _Placed(sequence, replica, num_tokens)
            replica.num_tokens_left += num_tokens
        sent = [replace(sequence, siblings=[], constraint=None) for sequence in group]
        self._send(replica.child, "add", Admission(key, sent))
        replica.remember(hashes)
        self._placed.update(placed)
        self._keys.update((one.request, key) for key, one in placed.items())

    def abort(self, request: Request) -> None:
        key = self._keys.get(request)
        if key is not None:
            self._send(self._placed[key].replica.child, "abort", key)
            request.end = End("abort")
            self._forget(request)

    def has_work(self) -> bool:
        return bool(self._news or (self._placed and not self.is_paused))

    def has_news(self) -> bool:
        """Whether `step` would return at once, or raise for a silence that has been too long."""
        if self._news or self._children.have_spoken():
            return True
        return self.has_work() and self._slowest().waited_for_since + self._timeout < time.monotonic()

    def step(self) -> list[Request]:
        """Wait for news from any replica, and take in all there are; returns the requests that got tokens or ended."""
        if not self._news and self._placed and not self.is_paused:
            slowest = self._slowest()
            if not self._children.wait(slowest.waited_for_since + self._timeout):
                raise self._children.fail(self._silence("a step", slowest.child.name))
        while self._children.have_spoken():
            self._take_in()
        changed: dict[Request, None] = {}
        while self._news:
            news = self._news[0]
            for key, start, token_id in zip(news.keys, news.starts, news.token_ids, strict=True):
                if (placed := self._placed.get(key)) is not None:
                    placed.request.token_ids[start:] = (token_id,)
                    changed[placed.request] = None
            for other in news.others:
                if other.key in self._placed:
                    changed[self._apply(other)] = None
            self._news.popleft()
        return list(changed)

    def restart(self, requests: Iterable[Request]) -> None:
        """After an interruption, of which the replicas know nothing: they go on with these, and drop other requests."""
        kept = dict.fromkeys(requests)
        self._placed = {key: one for key, one in self._placed.items() if self._keys.get(one.request) == key}
        self._keys = {request: key for request, key in self._keys.items() if key in self._placed}
        for replica in self._replicas:
            replica.num_tokens_left = sum(one.num_tokens for one in self._placed.values() if one.replica is replica)
        for request in [request for request in self._keys if request not in kept]:
            self.abort(request)
        for request in kept:
            if request not in self._keys and not request.is_finished:
                self.add_request(request)

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """What function(model) returns, for each rank of each replica; as `MultiprocessExecutor.apply`."""
        return self._ask("apply_model", function)

    def do(self, function: Callable[[Any], Any]) -> list[Any]:
        """What function(session) returns, for each replica's, called there between two steps."""
        return self._ask("do", function)

    def _ask(self, name: str, function: Callable[[Any], Any]) -> list[Any]:
        answers = self._call(name, [pickle_function(function)] * len(self._replicas))
        for number, answer in enumerate(answers):
            if isinstance(answer, CallFailed):
                raise answer.as_error(f"data-parallel replica {number}")
        return [result for answer in answers for result in answer]

    def get_metrics(self) -> dict[str, float]:
        """The replicas' metrics, each added up."""
        answers = self._call("get_metrics", [None] * len(self._replicas))
        return {name: sum(answer[name] for answer in answers) for name in answers[0]}

    def reset_prefix_cache(self) -> None:
        self._call("reset_prefix_cache", [None] * len(self._replicas))
        self.forget_cached()

    def forget_cached(self) -> None:
        """What is in the replicas' prefix caches is of no use any more."""
        for replica in self._replicas:
            replica.cached.clear()

    def is_alive(self) -> bool:
        """Whether all replicas run; also known while nobody waits for one."""
        return all(child.process.poll() is None for child in self._children.members)

    def close(self) -> None:
        """End the replicas and wait for them. May be called twice."""
        if self._finalize.detach() is None:
            return
        for child in self._children.members:
            with suppress(OSError):  # it has ended, or reads nothing: `join` sees to it
                child.send(("close", 0, None))
        self._children.join()

    def fileno(self) -> int:
        """Can be read from when news have come: for an event loop, whose handlers of signals interrupt nothing."""
        self._children.guard = nullcontext  # each message would cost a dozen calls of the system else
        return self._children.fileno()

    # -- which replica --

    def _slowest(self) -> _Replica:
        """Of those that have something to do, which has said nothing for longest."""
        return min((one for one in self._replicas if one.num_tokens_left), key=lambda one: one.waited_for_since)

    def _cost(self, replica: _Replica, hashes: list[bytes]) -> int:
        return replica.num_tokens_left - replica.num_cached_blocks(hashes) * self._block_size

    def _hashes(self, request: Request) -> list[bytes]:
        hashes: list[bytes] = []
        parent, size = request.cache_salt, self._block_size
        for start in range(0, request.num_prompt_tokens - size + 1, size):
            parent = hash_block(parent, request.token_ids[start : start + size])
            hashes.append(parent)
        return hashes

    # -- messages --

    def _send(self, child: Child, name: str, value: Any) -> int:
        self._number += 1
        try:
            with self._children.guard():
                child.send((name, self._number, value))
        except BlockingIOError as error:
            raise self._children.fail(f"{child.name} read nothing for {self._timeout:g} s") from error
        except OSError as error:  # it has ended
            raise self._children.fail(None) from error
        return self._number

    def _silence(self, name: str, *silent: str) -> str:
        limit = f"{self._timeout:g} s (distributed_timeout_seconds)"
        return f"no answer within {limit} to {name} from {', '.join(silent)}"

    def _call(self, name: str, values: list[Any], *, is_limited: bool = True) -> list[Any]:
        """Send values[i] to replica i; the answers, in order. A late answer is passed over, after a TimeoutError."""
        deadline = time.monotonic() + self._timeout if is_limited else None
        children = list(self._children.members)
        numbers = {
            self._send(child, name, value): i for i, (child, value) in enumerate(zip(children, values, strict=True))
        }
        answers: dict[int, Any] = {}
        while len(answers) < len(values):
            silent = [child.name for i, child in enumerate(children) if i not in answers]
            if not self._children.wait(deadline):
                raise TimeoutError(self._silence(name, *silent))
            for number, answer in self._take_in():
                if number in numbers:
                    answers[numbers[number]] = answer
        return [answers[i] for i in range(len(values))]

    def _take_in(self) -> list[tuple[int, Any]]:
        """Read what has come; keep the news among it for `step`, and return the answers."""
        with self._children.guard():
            messages = self._children.receive()
            now = time.monotonic()
            for replica in self._replicas:
                if any(child is replica.child for child, _ in messages):
                    replica.waited_for_since = now
            self._news.extend(_read_news(value) for _, (number, value) in messages if number == 0)
        return [(number, value) for _, (number, value) in messages if number != 0]

    def _apply(self, news: News) -> Request:
        request = self._placed[news.key].request
        for grown, start, items in zip(growing(request), news.starts, news.grown, strict=True):
            grown[start:] = items
        request.num_cached_tokens, request.begun_at = news.num_cached_tokens, news.begun_at
        if news.end is not None:
            request.end = news.end
            self._forget(request)
        return request

    def _forget(self, request: Request) -> None:
        placed = self._placed.pop(self._keys.pop(request))
        placed.replica.num_tokens_left -= placed.num_tokens


def _read_news(message: Any) -> StepNews:
    keys, starts, token_ids, others = message
    return StepNews(keys, starts, token_ids, [News._make(one) for one in others])
