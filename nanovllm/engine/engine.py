"""Engine: the loop. It plans a step, queues it, and reads results up to `overlap_depth` steps behind.

Owns the order of things and nothing else. Invariant: results are taken in the order their steps were queued, so depth 1
(synchronous) and any other depth give the same tokens.

        depth 2    host   | plan 1 | plan 2 | read 1, plan 3 | read 2, plan 4 | ...
                   device          | step 1          | step 2         | step 3 ...
"""

from collections import deque
from time import perf_counter

from nanovllm.engine.features.between_steps import BetweenSteps
from nanovllm.engine.interfaces import Executor, PendingStep
from nanovllm.engine.metrics import EngineTimes
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduler_output import SchedulerOutput


class Engine(BetweenSteps):
    def __init__(self, scheduler: Scheduler, executor: Executor, output_processor: OutputProcessor, overlap_depth: int):
        self.scheduler = scheduler
        self.executor = executor
        self.output_processor = output_processor
        self.overlap_depth = overlap_depth
        self.times = EngineTimes()
        self._in_flight, self._caught_up = deque[PendingStep](), list[Request]()

    def add_request(self, request: Request) -> None:
        self.scheduler.add_request(request)

    def has_work(self) -> bool:
        return bool(self._in_flight) or (self.scheduler.has_unfinished_requests() and not self.is_paused)

    def step(self) -> list[Request]:
        """Advance by at most one step; returns the requests that got a token or ended."""
        start = perf_counter()
        times = self.times
        elsewhere = times.execute_seconds + times.wait_seconds
        plan = None if self.is_paused else self.scheduler.schedule()
        if plan is not None:
            self._execute(plan)
        changed, self._caught_up = self._caught_up, []
        if self._in_flight and (len(self._in_flight) >= self.overlap_depth or plan is None):
            changed += self._collect()
        times.host_seconds += perf_counter() - start - (times.execute_seconds + times.wait_seconds - elsewhere)
        return changed

    def _execute(self, plan: SchedulerOutput) -> None:
        start = perf_counter()
        self._in_flight.append(self.executor.execute(plan))
        self.times.num_steps += 1
        self.times.execute_seconds += perf_counter() - start

    def _collect(self) -> list[Request]:
        start = perf_counter()
        output = self._in_flight.popleft().result()
        self.times.wait_seconds += perf_counter() - start
        return self.scheduler.update(output, self.output_processor.find_stop_string)

    def close(self) -> None:
        self._in_flight.clear()
        self.executor.close()
