"""TracedEngine and TracedScheduler: the engine and its planner, telling a recorder what they do.

Owns what is told, and when; what becomes of it is `recorder.py`'s. Invariant: every plan and every result is the
untraced engine's. An engine without a trace has none of this: `build.py` takes these classes in place of theirs.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

from nanovllm.config import ResolvedConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.interfaces import Executor
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import End, Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.tracing.device_clock import DeviceClock, PlaceStep
from nanovllm.tracing.recorder import Recorder, Step

NO_ROW, NO_BLOCKS, NO_BUDGET, UNREAD_TOKEN = "a row", "blocks", "budget", "its last token"
NO_ADAPTER, NO_PREFIX = "an adapter", "its prefix"


class TracedScheduler(Scheduler):
    def __init__(self, *args: Any, recorder: Recorder, **options: Any) -> None:
        self.recorder = recorder
        self.plan_seconds = 0.0  # of the newest plan
        self.is_steady = False  # is it one token more for everyone in the plan before?
        self._why = NO_ROW
        self._is_planning = False
        self._refused_for: str | None = None  # by the newest answer to one of the planner's questions
        super().__init__(*args, **options)
        self.cache.has_room = self._noted(self.cache.has_room, self._missing_room)  # type: ignore[method-assign]
        self._admits = self._noted(self._admits, lambda: NO_ADAPTER)

    def schedule(self) -> SchedulerOutput | None:
        start, steady = perf_counter(), self._steady
        self._why = NO_ROW  # the short cut leaves no other reason to wait
        self._is_planning = True
        plan = super().schedule()
        self._is_planning = False
        self.is_steady = steady is not None and self._steady is steady
        self.recorder.head(self.waiting[0] if self.waiting else None, self._why)
        self.plan_seconds = perf_counter() - start
        return plan

    def add_request(self, request: Request) -> None:
        self.recorder.waits(request, self.waiting[0] if self.waiting else None)
        super().add_request(request)

    def finish(self, request: Request, end: End) -> None:
        is_new = not request.is_finished
        super().finish(request, end)
        if is_new:
            self.recorder.ended(request, end)

    def _schedule_waiting(
        self,
        budget: int,
        scheduled: list[tuple[Request, int]],
        new_rows: list[NewRow],
        new_blocks: list[tuple[int, int, int]],
    ) -> None:
        num_before = len(scheduled)
        self._refused_for = None
        super()._schedule_waiting(budget, scheduled, new_rows, new_blocks)
        if self.waiting:
            budget -= sum(num_new for _, num_new in scheduled[num_before:])
            self._why = self._reason(self.waiting[0], budget)

    def _reason(self, request: Request, budget: int) -> str:
        """Why it was not admitted, in the order of the planner's own questions."""
        if not self._free_rows:
            return NO_ROW
        if budget <= 0:
            return NO_BUDGET
        if request.num_pending_tokens:
            return UNREAD_TOKEN
        return self._refused_for or NO_BUDGET

    def _missing_room(self) -> str:
        return NO_PREFIX if getattr(self.cache, "is_looking", False) else NO_BLOCKS

    def _noted(self, question: Callable[..., bool], reason: Callable[[], str]) -> Callable[..., bool]:
        """The planner's question, whose answer is remembered: asking again could do something twice."""

        def ask(*about: Any) -> bool:
            answer = question(*about)
            self._refused_for = None if answer else reason()
            return answer

        return ask

    def _preempt(self, request: Request) -> None:
        self._why = NO_BLOCKS
        self.recorder.preempted(request, NO_BLOCKS if self._is_planning else "its length", request.num_computed_tokens)
        super()._preempt(request)


def traced(planner: type[Scheduler]) -> type[TracedScheduler]:
    """The traced form of this kind of Scheduler."""
    return TracedScheduler if planner is Scheduler else type("TracedScheduler", (TracedScheduler, planner), {})


class TracedEngine(Engine):
    scheduler: TracedScheduler

    def __init__(
        self,
        scheduler: TracedScheduler,
        executor: Executor,
        output_processor: OutputProcessor,
        overlap_depth: int,
        clock: DeviceClock,
    ) -> None:
        """clock: of the device that the executor's steps run on."""
        super().__init__(scheduler, executor, output_processor, overlap_depth)
        self._recorder = scheduler.recorder
        self._clock = clock
        self._steps: deque[tuple[Step, PlaceStep]] = deque()  # those in flight

    def step(self) -> list[Request]:
        start = perf_counter()
        times, scheduler = self.times, self.scheduler
        execute, wait = times.execute_seconds, times.wait_seconds
        changed = super().step()
        plan, execute, wait = scheduler.plan_seconds, times.execute_seconds - execute, times.wait_seconds - wait
        counts = len(scheduler.running), len(scheduler.waiting), scheduler.cache.pool.num_free_blocks
        self._recorder.stepped(start, (plan, execute, wait), counts)
        if not self.has_work():
            self._recorder.flush()
        return changed

    def _execute(self, plan: SchedulerOutput) -> None:
        step = self._recorder.planned(plan, self.scheduler.running, self.scheduler.is_steady)
        self._steps.append((step, self._clock.measure(lambda: super(TracedEngine, self)._execute(plan))))

    def _collect(self) -> list[Request]:
        start, waited = perf_counter(), self.times.wait_seconds
        changed = super()._collect()
        step, place = self._steps.popleft()
        self._recorder.done(step, *place(start + self.times.wait_seconds - waited))
        return changed

    def get_metrics(self) -> dict[str, float]:
        """As the engine's. Whoever asks finds everything that has ended in the trace's file, too."""
        self._recorder.flush()
        return super().get_metrics()

    def restart(self, requests: Iterable[Request]) -> None:
        unfinished = list(requests)
        self._steps.clear()
        super().restart(unfinished)
        self._recorder.restarted(unfinished)

    def close(self) -> None:
        super().close()
        self._recorder.close()


def open_recorder(config: ResolvedConfig) -> Recorder:
    """Raises OSError for a file that cannot be written."""
    path = config.trace or ""
    is_rank = config.distributed_executor_backend == "external_launcher"
    return Recorder(Path(numbered(path, int(os.environ.get("RANK", "0"))) if is_rank else path))


def numbered(path: str, number: int) -> str:
    """run.json.gz -> run.0.json.gz, where several engines write."""
    ending = ".json.gz" if path.endswith(".gz") else ".json"
    return f"{path.removesuffix(ending)}.{number}{ending}"


def traces_of(config: ResolvedConfig) -> list[Path]:
    """The files that an engine with this config writes."""
    path, size = config.trace or "", config.data_parallel_size
    return [Path(path)] if size == 1 else [Path(numbered(path, number)) for number in range(size)]
