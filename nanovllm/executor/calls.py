"""What child processes that run a model have in common: functions of the user's, answers, and last words.

Owns the way of `apply_model` to another process and back. Invariant: a function of the user's that fails is an error
of the caller's and ends nothing; any other failure ends the child, which reports it first.
"""

import pickle
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nanovllm.executor.children import Failure

_NOT_IMPORTABLE = "apply_model runs in other processes here: give it a function of a module that can be imported ({})"


@dataclass(frozen=True)
class CallFailed:
    """What a function of the user's raised; the child lives on."""

    error: Exception | None  # None where it cannot be pickled
    traceback: str

    def as_error(self, where: str) -> Exception:
        error = self.error or RuntimeError("a function given to apply_model failed")
        error.add_note(f"on {where}:\n{self.traceback}")
        return error


def pickle_function(function: Callable[[Any], Any]) -> bytes:
    """For `call_function` in a child. Raises TypeError for a function that has no name there."""
    try:
        return pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(_NOT_IMPORTABLE.format(error)) from error


def call_function(function: bytes, call: Callable[[Callable[[Any], Any]], Any]) -> Any:
    """What call(function) returns, or CallFailed."""
    try:
        try:
            loaded = pickle.loads(function)
        except (AttributeError, ImportError) as error:
            raise TypeError(_NOT_IMPORTABLE.format(error)) from error
        result = call(loaded)
        pickle.dumps(result)
        return result
    except Exception as error:
        return CallFailed(_pickled_or_none(error), traceback.format_exc())


def locked_sender(connection: Connection) -> Callable[[Any], None]:
    """A `send` for several threads."""
    lock = threading.Lock()

    def send(message: Any) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with lock:
            connection.send_bytes(data)

    return send


def report_failure(function: Callable[[], None], send: Callable[[Any], None]) -> int:
    """Run it; exit status. An exception is reported to the parent, which then ends every child."""
    try:
        function()
    except EOFError:  # the parent has gone
        return 1
    except Exception as error:
        send(Failure(_pickled_or_none(error), traceback.format_exc()))
        return 1
    return 0


def _pickled_or_none(error: Exception) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a stranger's exception does when it is copied
        return None
    return error
