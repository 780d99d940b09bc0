"""Interruptions: what is raised in the middle of a step, and is not the engine's.

Owns the distinction; what follows from it is the session's. Invariant: what cannot be told from a fault is a fault.
"""

import signal
from functools import partial
from types import CodeType
from typing import Any


def is_from_outside(error: BaseException) -> bool:
    """Did something that is not the engine's raise this in the middle of a step?

    That is what is no Exception, as KeyboardInterrupt and SystemExit, and what passed through the handler of a signal.
    """
    if not isinstance(error, Exception):
        return True
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            return True
        traceback = traceback.tb_next
    return False


def _code(handler: Any) -> CodeType | None:
    """The Python code of a signal handler: a function, a method, or an object that can be called."""
    handler = handler.func if isinstance(handler, partial) else handler
    handler = getattr(handler, "__func__", handler)
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = type(handler).__call__
    return getattr(handler, "__code__", None)
