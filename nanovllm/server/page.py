"""The page at "/": a chat with the model and a look at the engine, in one file without anything from elsewhere.

Owns handing it out; what it does is in `page.html`. Invariant: the page holds no secret, so it has no key; what it asks
for does. A browser lets it speak to this server alone.
"""

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


async def page(request: Request) -> Response:
    return Response(_text(), media_type="text/html; charset=utf-8", headers=_HEADERS)


@cache
def _text() -> str:
    return files("nanovllm.server").joinpath("page.html").read_text(encoding="utf-8")
