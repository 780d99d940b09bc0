"""Routes of training loops, as vLLM has them in its development mode: weights, pause and sleep.

Owns them. They are there only where the environment's VLLM_SERVER_DEV_MODE is 1, for whoever may ask can put other
weights into the engine or stop it. Invariant: what they do is what `LLM`'s methods of the same names do.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.llm import LLM
from nanovllm.server.body import BadRequest, Body, checking, read_body

DEV_MODE = "VLLM_SERVER_DEV_MODE"  # the variable of the environment
_NO_COLLECTIVES = "weights come as handles of this host's GPUs, or as a folder; NCCL between processes is not supported"


async def _call(request: Request, function: Callable[[LLM], Any]) -> Any:
    """function(llm), which may wait for the engine; what it says against the arguments is the client's mistake."""
    llm = request.app.state.served.engine.llm
    with checking():
        try:
            return await asyncio.to_thread(function, llm)
        except RuntimeError as error:  # not now: a pause that holds requests, an engine that sleeps
            raise BadRequest(str(error), status=409) from error


def _mode(request: Request, default: str) -> str:
    return request.query_params.get("mode", default)


async def sleep(request: Request) -> Response:
    level = request.query_params.get("level", "1")
    if level not in ("1", "2"):
        raise BadRequest(f"level must be 1 or 2, got {level!r}", param="level")
    mode = _mode(request, "abort")
    await _call(request, lambda llm: llm.sleep(int(level), mode))
    return Response()


async def wake_up(request: Request) -> Response:
    tags = request.query_params.getlist("tags") or None
    await _call(request, lambda llm: llm.wake_up(tags))
    return Response()


async def is_sleeping(request: Request) -> Response:
    return JSONResponse({"is_sleeping": await _call(request, lambda llm: llm.is_sleeping)})


async def pause(request: Request) -> Response:
    mode = _mode(request, "abort")
    await _call(request, lambda llm: llm.pause(mode))
    return JSONResponse({"status": "paused"})


async def resume(request: Request) -> Response:
    await _call(request, lambda llm: llm.resume())
    return JSONResponse({"status": "resumed"})


async def is_paused(request: Request) -> Response:
    return JSONResponse({"is_paused": await _call(request, lambda llm: llm.is_paused)})


async def reset_prefix_cache(request: Request) -> Response:
    await _call(request, lambda llm: llm.reset_prefix_cache())
    return Response()


async def weight_version(request: Request) -> Response:
    return JSONResponse({"weight_version": await _call(request, lambda llm: llm.weights_version)})


async def world_size(request: Request) -> Response:
    def of(llm: LLM) -> int:
        return llm.config.tensor_parallel_size * llm.config.data_parallel_size

    return JSONResponse({"world_size": await _call(request, of)})


async def start_weight_update(request: Request) -> Response:
    await _call(request, lambda llm: llm.start_weight_update())
    return JSONResponse({"status": "started"})


async def update_weights(request: Request) -> Response:
    """update_info: names and handles (`live/shared_tensors.py`), of tensors on this host's GPUs; or path, a folder of
    safetensors on this host."""
    body = await read_body(request)
    info = body.require_inner("update_info")
    body.finish()
    read = _take_tensors(info)
    mode = _mode(request, "keep")
    version = await _call(request, lambda llm: llm.update_weights(read(), mode=mode))
    return JSONResponse({"status": "updated", "weight_version": version})


async def finish_weight_update(request: Request) -> Response:
    mode = _mode(request, "keep")
    version = await _call(request, lambda llm: llm.finish_weight_update(mode=mode))
    return JSONResponse({"status": "finished", "weight_version": version})


async def init_weight_transfer_engine(request: Request) -> Response:
    raise BadRequest(f"init_weight_transfer_engine is not supported: {_NO_COLLECTIVES}", status=501)


def _take_tensors(info: Body) -> Callable[[], Iterator[tuple[str, Any]]]:
    path, names, handles = info.take("path", str), info.take("names", list), info.take("handles", list)
    for name in ("dtype_names", "shapes"):  # a handle and a file say it themselves
        info.ignore(name)
    info.refuse("packed", (False,), _NO_COLLECTIVES)
    info.finish()
    if path is not None and names is None and handles is None:
        return lambda: _read_folder(Path(path))
    if names is None or handles is None or path is not None:
        raise BadRequest(f"update_info needs names and handles, or path: {_NO_COLLECTIVES}", param="update_info")
    if len(names) != len(handles) or not all(isinstance(name, str) for name in names):
        raise BadRequest("names must be texts, one for each of handles", param="update_info.names")
    return lambda: _open_handles(names, handles)


def _read_folder(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def _open_handles(names: list[str], handles: list[Any]) -> Iterator[tuple[str, Any]]:
    from nanovllm.live.shared_tensors import open_handle

    for name, handle in zip(names, handles, strict=True):
        try:
            yield name, open_handle(handle)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the handle of {name!r} is none that `handle_of` made: {error}") from error


ROUTES: dict[str, tuple[Callable[[Request], Awaitable[Response]], str]] = {
    "/sleep": (sleep, "POST"),
    "/wake_up": (wake_up, "POST"),
    "/is_sleeping": (is_sleeping, "GET"),
    "/pause": (pause, "POST"),
    "/resume": (resume, "POST"),
    "/is_paused": (is_paused, "GET"),
    "/reset_prefix_cache": (reset_prefix_cache, "POST"),
    "/get_weight_version": (weight_version, "GET"),
    "/get_world_size": (world_size, "GET"),
    "/init_weight_transfer_engine": (init_weight_transfer_engine, "POST"),
    "/start_weight_update": (start_weight_update, "POST"),
    "/update_weights": (update_weights, "POST"),
    "/finish_weight_update": (finish_weight_update, "POST"),
}
