"""What an error looks like to a client: OpenAI's body, or Anthropic's for those who came by its routes.

Owns both. Invariant: the status says whose fault it was, and the type says the same in the dialect's words.
"""

from collections.abc import Mapping

from starlette.responses import JSONResponse

_OPENAI_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_response(
    path: str,
    message: str,
    status: int,
    code: str | int | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """path: of the route that was asked. param: the field that is wrong."""
    kind = "invalid_request_error" if status < 500 else None
    if path.startswith("/v1/messages"):
        error = {"type": _ANTHROPIC_TYPES.get(status, kind or "api_error"), "message": message}
        return JSONResponse({"type": "error", "error": error}, status, headers=headers)
    body = {
        "message": message,
        "type": _OPENAI_TYPES.get(status, kind or "server_error"),
        "param": param,
        "code": code if code is not None else status,
    }
    return JSONResponse({"error": body}, status, headers=headers)
