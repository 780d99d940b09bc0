"""Adapters as the server knows them: served by name, and, where that is allowed, loaded and unloaded by requests.

Owns the names, and the one that the request at hand has asked for. Invariant: a name that is listed is one that a
request may use; the engine reads the adapter again should it have let go of it.
"""

import json
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from nanovllm.lora.request import LoRARequest
from nanovllm.server.body import BadRequest, checking, read_body

if TYPE_CHECKING:
    from nanovllm.server.served import Served

ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # the variable of the environment that lets clients load adapters

# Of the task that answers a request, and of those that it starts: what `Served.check_model` has found.
asked_for: ContextVar[LoRARequest | None] = ContextVar("asked_for", default=None)


def read_modules(given: Sequence[str]) -> dict[str, LoRARequest]:
    """`--lora-modules`: name=path, or vLLM's JSON with "name" and "path". Raises ValueError."""
    adapters: dict[str, LoRARequest] = {}
    for text in given:
        name, path = _read_module(text)
        if name in adapters:
            raise ValueError(f"--lora-modules names {name!r} twice")
        adapters[name] = LoRARequest(name, path)
    return adapters


def _read_module(text: str) -> tuple[str, str]:
    if not text.startswith("{"):
        name, _, path = text.partition("=")
    else:
        try:
            module = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--lora-modules: {text!r} is no JSON: {error}") from error
        name, path = module.get("name"), module.get("path")
    if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
        raise ValueError(f"--lora-modules takes name=path, or JSON with name and path, got {text!r}")
    return name, path


async def load_lora_adapter(request: Request) -> Response:
    """vLLM's route: lora_name, lora_path; load_inplace to replace one of that name."""
    served: Served = request.app.state.served
    body = await read_body(request)
    name, path = body.require("lora_name", str), body.require("lora_path", str)
    in_place = body.take("load_inplace", bool, False)
    body.ignore("base_model_name", "is_3d_lora_weight")
    body.finish()
    if name in served.names or (name in served.adapters and not in_place):
        raise BadRequest(f"there is a model {name!r} already; unload it, or use load_inplace", param="lora_name")
    adapter = LoRARequest(name, path)
    with checking("lora_path"):
        try:
            await served.engine.add_lora(adapter)
        except FileNotFoundError as error:
            raise BadRequest(str(error), param="lora_path", status=404) from error
        except NotImplementedError as error:
            raise ValueError(str(error)) from error
    served.adapters[name] = adapter
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(request: Request) -> Response:
    """vLLM's route: lora_name. Requests that run go on with it."""
    served: Served = request.app.state.served
    body = await read_body(request)
    name = body.require("lora_name", str)
    body.ignore("lora_int_id")
    body.finish()
    if name not in served.adapters:
        raise BadRequest(f"there is no adapter {name!r} to unload", param="lora_name", status=404)
    del served.adapters[name]
    await served.engine.remove_lora(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")
