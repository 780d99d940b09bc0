"""/v1/embeddings, as OpenAI has it: a vector for each text or list of token ids.

Owns the route; how states become a vector is `nanovllm.embedding`'s. Invariant: vectors come in the order of the input.
"""

import asyncio
import base64
import struct
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nanovllm.embedding import PARAMS, Pooling
from nanovllm.outputs import RequestOutput
from nanovllm.server.body import checking, read_body
from nanovllm.server.completions import take_prompts
from nanovllm.server.events import unless_gone
from nanovllm.server.served import Served


async def embeddings(request: Request) -> Response:
    served: Served = request.app.state.served
    body = await read_body(request)
    name = served.check_model(body)
    prompts = take_prompts(body, "input")
    encoding = body.choose("encoding_format", ("float", "base64"), "float")
    kind, is_normalized = body.choose("pooling", ("last", "mean"), "last"), body.take("normalize", bool, True)
    dimensions = body.take("dimensions", int)
    body.ignore("user")
    body.finish()
    with checking("dimensions"):
        pooling = Pooling(kind=kind, is_normalized=is_normalized, dimensions=dimensions)
        pooling.check(served.engine.llm.model_config.hidden_size)
    with served.admitted(len(prompts)):
        results = await unless_gone(request, _embed_all(served, prompts, pooling, f"embd-{request.state.request_id}"))
    if results is None:
        return Response(status_code=499)
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector) if encoding == "base64" else vector}
        for i, (_, vector) in enumerate(results)
    ]
    num_tokens = sum(len(output.prompt_token_ids) for output, _ in results)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})


async def _embed_all(
    served: Served, prompts: list[Any], pooling: Pooling, request_id: str
) -> list[tuple[RequestOutput, list[float]]]:
    """If one prompt is bad the others are cancelled."""

    async def embed(i: int, prompt: Any) -> tuple[RequestOutput, list[float]]:
        output = await served.final(prompt, PARAMS, f"{request_id}-{i}")
        states = output.outputs[0].hidden_states
        assert states is not None
        output.outputs[0].hidden_states = None
        return output, await served.in_thread(pooling.vector, states["norm"])

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(embed(i, prompt)) for i, prompt in enumerate(prompts)]
    return [task.result() for task in tasks]


def _encoded(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
