"""Waiting as long as a busy machine needs: httpx's calls without its five seconds, and conditions that come true."""

import time
from collections.abc import Callable
from functools import partial

import httpx

SECONDS = 600.0  # a guard, not a measurement
get, post, stream = (partial(call, timeout=SECONDS) for call in (httpx.get, httpx.post, httpx.stream))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
