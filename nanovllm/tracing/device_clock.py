"""When a step ran on its device, by the host's clock.

Owns how that is measured for each kind of executor. Invariant: asking costs the device nothing, and the host no wait
that reading the step's result is not already.

On a GPU of this process CUDA events stand before and behind each step. They know differences only, so the steps are
chained, and held between the time at which the host queued a step and the one at which it had its result.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

PlaceStep = Callable[[float], tuple[float, float]]  # when its result was there -> begin and end, in seconds


class DeviceClock(Protocol):
    def measure(self, queue: Callable[[], None]) -> PlaceStep:
        """Call `queue`, which queues a step."""


class HostClock:
    """runs_at_once: a step has run when it is queued. Else, in other processes, it has when its result is there."""

    def __init__(self, runs_at_once: bool) -> None:
        self._runs_at_once = runs_at_once

    def measure(self, queue: Callable[[], None]) -> PlaceStep:
        begin = perf_counter()
        queue()
        end = perf_counter()
        return lambda returned: (begin, end if self._runs_at_once else returned)


class CudaClock:
    def __init__(self) -> None:
        import torch  # here: the planner's room needs none

        self._make: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)
        self._before: tuple[Any, float] | None = None  # the end of the step before

    def measure(self, queue: Callable[[], None]) -> PlaceStep:
        queued = perf_counter()
        first, last = self._make(), self._make()
        first.record()
        queue()
        last.record()

        def place(returned: float) -> tuple[float, float]:
            last.synchronize()  # it stands right behind the result
            begin = queued
            if self._before is not None:
                event, end = self._before
                begin = max(queued, end + event.elapsed_time(first) / 1e3)
            end = begin + first.elapsed_time(last) / 1e3
            late = max(0.0, end - returned)
            self._before = last, end - late
            return begin - late, end - late

        return place


def choose_clock(device: str, executor: str) -> DeviceClock:
    """device, executor: the config's device and distributed_executor_backend."""
    if executor == "mp":
        return HostClock(runs_at_once=False)
    return CudaClock() if device.startswith("cuda") else HostClock(runs_at_once=True)
