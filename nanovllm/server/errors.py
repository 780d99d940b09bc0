"""What an error looks like to a client: OpenAI's body, or Anthropic's for those who came by its routes.

Owns both, and whose fault an exception is. Invariant: the status says whose fault it was, and the type says the same in
the dialect's words. Only what a check of the request has found is the client's: all else is a fault of the server, and
logged.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.responses import JSONResponse

from nanovllm.errors import EngineDeadError, NotReadyError, cut
from nanovllm.server.body import BadRequest
from nanovllm.server.served import RETRY_AFTER_SECONDS, Overloaded, Served

_log = logging.getLogger("nanovllm.server")

_OPENAI_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Fault(NamedTuple):
    """param: the field that is wrong."""

    message: str
    status: int
    code: str | int | None = None
    param: str | None = None
    headers: Mapping[str, str] | None = None


def fault_of(error: BaseException, served: Served, request_id: str) -> Fault:
    """What an exception that ended a request means. One that nobody expected is logged."""
    while isinstance(error, BaseExceptionGroup):  # of several prompts one is bad: what is wrong with the first that is
        error = error.exceptions[0]
    if isinstance(error, BadRequest):
        return Fault(str(error), error.status, error.code, error.param)
    if isinstance(error, Overloaded):
        status = 503 if served.is_draining or served.is_restarting else 429
        return Fault(str(error), status, headers={"retry-after": str(RETRY_AFTER_SECONDS)})
    if isinstance(error, NotReadyError):
        return Fault(str(error), 503, headers={"retry-after": str(RETRY_AFTER_SECONDS)})
    if isinstance(error, EngineDeadError) or not served.is_alive:
        return Fault(f"the engine has ended: {cut(str(error))}", 503)
    _log.error("%s", request_id, exc_info=error)
    return Fault(f"{type(error).__name__}: {cut(str(error))}", 500)


def error_response(path: str, fault: Fault) -> JSONResponse:
    """path: of the route that was asked."""
    return JSONResponse(_body(path, fault), fault.status, headers=fault.headers)


def error_event(path: str, fault: Fault) -> str:
    """The last of a stream whose status has been sent."""
    name = "" if path.startswith(("/v1/chat/", "/v1/completions", "/inference/")) else "event: error\n"
    return f"{name}data: {json.dumps(_body(path, fault))}\n\n"


def _body(path: str, fault: Fault) -> dict[str, Any]:
    status = fault.status
    kind = "invalid_request_error" if status < 500 else None
    if path.startswith("/v1/messages"):
        error = {"type": _ANTHROPIC_TYPES.get(status, kind or "api_error"), "message": fault.message}
        return {"type": "error", "error": error}
    code = fault.code if fault.code is not None else status
    body = {"message": fault.message, "type": _OPENAI_TYPES.get(status, kind or "server_error")}
    return {"error": {**body, "param": fault.param, "code": code}}
