"""Recorder: from what planner and engine do to the events of a trace.

Owns what is written of a step, of a request and of the queue, in Chrome's trace format:

    engine    host      a slice for each call of `Engine.step`: planning, queueing, waiting, taking in
              device    a slice for each step: requests, tokens of prompts and of outputs
              queue     who stood at its head, and what for
    rows      row i     a slice for each part of a prompt, and one for each run of steps in which a request decoded
    requests            a slice from when a request waits until it is admitted

Invariant: the slices of rows have exactly the tokens that the plans had, also those that were computed in vain; nothing
is written of a request in a step that changes nothing for it, so a trace grows with steps and changes.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from nanovllm.engine.request import End, Request
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.tracing.trace_file import TraceFile

ENGINE, ROWS, REQUESTS = 1, 2, 3  # processes, in the format's words
HOST, DEVICE, QUEUE = 1, 2, 3  # threads of the first
_COUNTER_SECONDS = 0.05  # between two values of a counter


class RowSlice(NamedTuple):
    row: int
    first: "Step"
    name: str
    arguments: str


@dataclass(slots=True, eq=False)
class Step:
    """A step in flight. begin, end: of its time on the device, once that is known."""

    number: int
    queued: float
    decodes: dict["Life", None]
    rows: int
    tokens: int
    prompt_tokens: int
    begin: float = -1.0
    end: float = -1.0
    slices: list["RowSlice"] = field(default_factory=list)  # that end with it


@dataclass(slots=True, eq=False)
class Life:
    """What is remembered of an unfinished request."""

    name: str
    number: int  # tells sequences of equal names apart
    since: float  # it waits
    since_step: int
    behind: str  # who stood at the head then
    head_steps: dict[str, int] = field(default_factory=dict)  # for what it waited there -> plans
    num_known: int = 0  # tokens when it was admitted: what is computed before is a prompt's, or once more
    num_preemptions: int = 0
    was_running: bool = False
    row: int = -1
    decode_since: Step | None = None


class Recorder:
    def __init__(self, path: Path, clock: Callable[[], float] = perf_counter) -> None:
        """Raises OSError where the file cannot be written."""
        self._file = TraceFile(path)
        self._clock = clock
        self._start = clock()
        self._lives: dict[Request, Life] = {}
        self._of_row: dict[int, Life] = {}
        self._in_flight: deque[Step] = deque()
        self._last: Step | None = None  # that was planned
        self._num_steps = self._num_lives = 0
        self._head: tuple[Life, str] | None = None
        self._head_since = self._head_since_step = 0.0
        self._counters_at, self._counters = -1.0, (-1, -1, -1)
        self._device_free = 0.0  # when the last step ended
        for pid, name in ((ENGINE, "engine"), (ROWS, "rows"), (REQUESTS, "requests")):
            self._name("process_name", pid, 0, name)
        for tid, name in ((HOST, "host"), (DEVICE, "device"), (QUEUE, "head of the queue")):
            self._name("thread_name", ENGINE, tid, name)
        self._named_rows: set[int] = set()

    # -- requests --

    def waits(self, request: Request, head: Request | None = None) -> None:
        """A request is new in the queue. head: of the queue, if it is not itself."""
        name = request.request_id if len(request.siblings) < 2 else f"{request.request_id}[{request.index}]"
        self._num_lives += 1
        life = Life(json.dumps(name), self._num_lives, self._clock(), self._num_steps, "null")
        if head is not None:
            life.behind = self._lives[head].name
        self._lives[request] = life

    def preempted(self, request: Request, reason: str, num_computed: int) -> None:
        """A running one goes back to the head of the queue."""
        life = self._lives[request]
        self._leave_row(life, f'"preempted","args":{{"request":{life.name},"for":"{reason}","lost":{num_computed}}}')
        life.num_preemptions += 1

    def ended(self, request: Request, end: End) -> None:
        life = self._lives.pop(request, None)
        if life is None:
            return
        num_output = len(request.token_ids) - request.num_prompt_tokens
        finished = (
            f'"finished","args":{{"request":{life.name},"reason":"{end.finish_reason}",'
            f'"prompt":{request.num_prompt_tokens},"output":{num_output},"cached":{request.num_cached_tokens or 0},'
            f'"preemptions":{life.num_preemptions}}}'
        )
        if life.row >= 0:
            self._leave_row(life, finished)
            return
        self._write_wait(life, '"left":"it ended"')
        self._instant(REQUESTS, 0, finished)
        if self._head is not None and self._head[0] is life:
            self.head(None, "")

    def head(self, request: Request | None, reason: str) -> None:
        """Who stands at the head of the queue after a plan, and for what it waits."""
        life = None if request is None else self._lives[request]
        if life is not None:
            life.head_steps[reason] = life.head_steps.get(reason, 0) + 1
            if self._head is not None and self._head[0] is life and self._head[1] == reason:
                return
        if self._head is not None:
            before, why = self._head
            self._slice(
                ENGINE, QUEUE, f'"{why}"', self._head_since, self._clock(),
                f'"request":{before.name},"plans":{self._num_steps - int(self._head_since_step)}',
            )  # fmt: skip
        self._head = None if life is None else (life, reason)
        self._head_since, self._head_since_step = self._clock(), self._num_steps

    # -- steps --

    def planned(self, plan: SchedulerOutput, running: list[Request], is_steady: bool) -> Step:
        """A plan is about to be queued. running: in order of admission. is_steady: as the step before, a token more."""
        last, num_rows, num_tokens = self._last, len(plan.rows), len(plan.token_ids)
        step = Step(self._num_steps, self._clock(), {}, num_rows, num_tokens, 0)
        self._num_steps += 1
        if is_steady and last is not None and not last.prompt_tokens:  # the last token of a prompt may be one of them
            step.decodes = last.decodes
        else:
            self._read_plan(plan, running, step, last)
        self._last = step
        self._in_flight.append(step)
        return step

    def _read_plan(self, plan: SchedulerOutput, running: list[Request], step: Step, last: Step | None) -> None:
        for new, request in zip(plan.new_rows, running[len(running) - len(plan.new_rows) :], strict=True):
            self._enter_row(self._lives[request], request, new.row, new.num_computed_tokens)
        starts, counts = plan.num_computed_tokens, plan.num_scheduled_tokens
        for row, start, count in zip(plan.rows, starts, counts, strict=True):
            life = self._of_row[row]
            if start >= life.num_known and count > 1:
                arguments = f'"request":{life.name},"tokens":{count},"from":{start},"step":{step.number}'
                step.slices.append(RowSlice(row, step, "verify", arguments))
            elif start >= life.num_known:
                step.decodes[life] = None
                if life.decode_since is None:
                    life.decode_since = step
            else:
                step.prompt_tokens += count
                name = "recompute" if life.was_running else "prefill"
                arguments = f'"request":{life.name},"tokens":{count},"from":{start},"step":{step.number}'
                step.slices.append(RowSlice(row, step, name, arguments))
        if last is not None and last.decodes is not step.decodes:
            for life in last.decodes:
                if life not in step.decodes:
                    self._end_decode(life, last)

    def done(self, step: Step, begin: float, end: float) -> None:
        """The oldest step's results have come. begin, end: of its time on the device, by the clock's seconds."""
        assert step is self._in_flight[0], "results come in the order of steps"
        self._in_flight.popleft()
        step.begin = max(begin, self._device_free)
        step.end = self._device_free = max(end, step.begin)
        kind = "decode" if not step.prompt_tokens else "prefill" if step.prompt_tokens == step.tokens else "mixed"
        self._slice(
            ENGINE, DEVICE, f'"{kind}"', step.begin, step.end,
            f'"step":{step.number},"rows":{step.rows},"tokens":{step.tokens},"prompt_tokens":{step.prompt_tokens}',
        )  # fmt: skip
        for one in step.slices:
            self._write_row_slice(one, step)
        step.slices.clear()

    def stepped(self, start: float, parts: tuple[float, float, float], counts: tuple[int, int, int]) -> None:
        """A call of `Engine.step` returns. parts: seconds of planning, queueing and waiting; the rest is taking in.

        counts: requests that run and that wait, free blocks.
        """
        now = self._clock()
        plan, execute, wait = (10 * round(1e5 * part) for part in parts)  # a digit more is a fifth of the file
        self._slice(ENGINE, HOST, '"step"', start, now, f'"plan":{plan},"queue":{execute},"wait":{wait}')
        if counts != self._counters and now - self._counters_at >= _COUNTER_SECONDS:
            (running, waiting, free), before = counts, self._counters
            self._counters, self._counters_at = counts, now
            start_of = f'{{"ph":"C","pid":{ENGINE},"ts":{self._time(now)},"name":'
            if counts[:2] != before[:2]:
                self._file.add(f'{start_of}"requests","args":{{"running":{running},"waiting":{waiting}}}}}')
            self._file.add(f'{start_of}"free blocks","args":{{"blocks":{free}}}}}')

    def restarted(self, requests: Iterable[Request]) -> None:
        """What was in flight is dropped; these, the unfinished ones, wait again."""
        self._drop("restarted")
        kept = [request for request in requests if not request.is_finished]
        self._lives = {request: self._lives[request] for request in kept if request in self._lives}
        for request in kept:
            if request not in self._lives:
                self.waits(request)

    def _drop(self, name: str) -> None:
        while self._in_flight:
            self.done(self._in_flight[0], self._in_flight[0].queued, self._clock())
        for life in list(self._of_row.values()):
            self._leave_row(life, f'"{name}","args":{{"request":{life.name}}}')
        self._last = None
        self.head(None, "")

    def flush(self) -> None:
        """Return when all that has ended is in the file."""
        self._file.flush()

    def close(self) -> None:
        """Write what has begun. May be called twice."""
        self._drop("closed")
        for life in self._lives.values():
            self._write_wait(life, '"left":"closed"')
        self._lives.clear()
        self._file.close()

    # -- lines --

    def _enter_row(self, life: Life, request: Request, row: int, num_cached: int) -> None:
        life.row, life.num_known = row, len(request.token_ids)
        self._of_row[row] = life
        if row not in self._named_rows:
            self._named_rows.add(row)
            self._name("thread_name", ROWS, row, f"row {row}")
        self._write_wait(life, f'"row":{row},"cached":{num_cached},"tokens":{life.num_known}')

    def _leave_row(self, life: Life, instant: str) -> None:
        """instant: name and arguments of what happened. Whoever has not ended waits from now on."""
        if life.decode_since is not None and self._last is not None:
            self._end_decode(life, self._last)
            self._last.decodes = {other: None for other in self._last.decodes if other is not life}
        self._instant(ROWS, life.row, instant)
        del self._of_row[life.row]
        life.row, life.was_running = -1, True
        life.since, life.since_step, life.behind, life.head_steps = self._clock(), self._num_steps, "null", {}

    def _end_decode(self, life: Life, last: Step) -> None:
        first = life.decode_since
        assert first is not None
        life.decode_since = None
        num_steps = last.number - first.number + 1
        arguments = f'"request":{life.name},"tokens":{num_steps},"first":{first.number},"last":{last.number}'
        one = RowSlice(life.row, first, "decode", arguments)
        if last.end < 0:
            last.slices.append(one)
        else:
            self._write_row_slice(one, last)

    def _write_row_slice(self, one: RowSlice, last: Step) -> None:
        self._slice(ROWS, one.row, f'"{one.name}"', one.first.begin, last.end, one.arguments)

    def _write_wait(self, life: Life, result: str) -> None:
        reasons = json.dumps(life.head_steps)
        start = f'{{"pid":{REQUESTS},"tid":0,"cat":"request","id":{life.number},"name":"waiting","ph":'
        plans = self._num_steps - life.since_step
        arguments = f'"request":{life.name},"plans":{plans},"at head":{reasons},"behind":{life.behind},{result}'
        self._file.add(f'{start}"b","ts":{self._time(life.since)},"args":{{{arguments}}}}}')
        self._file.add(f'{start}"e","ts":{self._time(self._clock())}}}')

    def _slice(self, pid: int, tid: int, name: str, begin: float, end: float, arguments: str) -> None:
        time = self._time(begin)
        self._file.add(
            f'{{"ph":"X","pid":{pid},"tid":{tid},"ts":{time},"dur":{self._time(end) - time},"name":{name},'
            f'"args":{{{arguments}}}}}'
        )

    def _instant(self, pid: int, tid: int, what: str) -> None:
        """what: name and arguments."""
        time = self._time(self._clock())
        self._file.add(f'{{"ph":"i","s":"t","pid":{pid},"tid":{tid},"ts":{time},"name":{what}}}')

    def _name(self, kind: str, pid: int, tid: int, name: str) -> None:
        self._file.add(json.dumps({"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}))

    def _time(self, seconds: float) -> int:
        """Microseconds since the start."""
        return round(1e6 * (seconds - self._start))
