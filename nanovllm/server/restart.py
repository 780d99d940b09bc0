"""An engine whose process has died: the log says so, and with `--restart` there is a new one in its place.

Owns noticing the death, also of an engine that nobody asks anything of, and the attempts. Invariant: requests that
came before have ended with an error, and while there is no engine new ones are refused at once, with the advice to come
back.
"""

import asyncio
import logging
from collections.abc import Callable

from nanovllm.async_llm import AsyncLLM
from nanovllm.server.served import Served

_log = logging.getLogger("nanovllm.server")
_LOOK_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 60.0


async def keep_alive(served: Served, make_engine: Callable[[], AsyncLLM] | None) -> None:
    """Runs until it is cancelled or, with None, until the engine has died.

    An attempt that fails, say because memory is not free yet, is made again later.
    """
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        if served.engine.is_alive:
            continue
        if make_engine is None:
            _log.error("the engine has died; start the server again, or with --restart, which does it by itself")
            return
        _log.error("the engine has died; a new one is started")
        served.is_restarting = True
        await served.engine.close()
        pause = 1.0
        while True:
            try:
                served.engine = await asyncio.to_thread(make_engine)
                served.engine.poll_in_this_loop()
                break
            except Exception as error:
                _log.error("the engine did not start; the next attempt is in %.0f s", pause, exc_info=error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        served.is_restarting = False
        _log.info("the new engine is ready")
