"""httpx's calls without its five seconds, which a busy machine may need for an answer."""

from functools import partial

import httpx

SECONDS = 600.0  # a guard, not a measurement
get, post, stream = (partial(call, timeout=SECONDS) for call in (httpx.get, httpx.post, httpx.stream))
