"""Served: one engine as the routes see it: names, bounds, and what is counted of each request.

Owns admission: a request beyond `max_waiting` is refused before any work is done for it, so that queues stay short.
Invariant: every request that was admitted is counted out again, however it ends.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from nanovllm.async_llm import AsyncLLM
from nanovllm.engine.input_processor import Prompt
from nanovllm.engine.session import Handle
from nanovllm.errors import RequestError
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.adapters import asked_for
from nanovllm.server.body import BadRequest, Body, checking
from nanovllm.server.metrics import Metrics, RequestTiming
from nanovllm.streams import Stream

RETRY_AFTER_SECONDS = 1


class Overloaded(RuntimeError):
    """The server takes no more requests now."""


class Served:
    """names: that requests may call the model by, the first of which answers carry.

    trust_request_chat_template: run the chat templates that requests bring. adapters: by the names that ask for them.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        names: Sequence[str],
        max_unfinished: int,
        trust_request_chat_template: bool = False,
        adapters: Mapping[str, LoRARequest] | None = None,
    ) -> None:
        self.engine = engine
        self.names = list(names)
        self.adapters = dict(adapters or {})
        self.max_unfinished = max_unfinished
        self.trust_request_chat_template = trust_request_chat_template
        self.num_unfinished = 0
        self.start_time = int(time.time())
        self.is_draining = False
        self.is_restarting = False  # the engine has died, and a new one is on its way (`restart.py`)
        self.metrics = Metrics(names[0], _cache_config(engine))
        self.defaults = engine.llm.get_default_sampling_params()

    @property
    def all_names(self) -> list[str]:
        """The model's, then its adapters'."""
        return [*self.names, *self.adapters]

    @property
    def tokenizer(self) -> Any:
        return self.engine.llm._known_tokenizer()

    @property
    def max_model_len(self) -> int:
        return self.engine.llm.config.max_model_len

    @property
    def is_alive(self) -> bool:
        return self.engine.is_alive and not self.is_restarting

    def check_model(self, body: Body) -> str:
        """The name that the client used, which says the adapter of what follows. BadRequest for a model that is not
        served here.
        """
        name: str = body.take("model", str, self.names[0])
        asked_for.set(self.adapters.get(name))
        if name not in self.all_names:
            raise BadRequest(
                f"the model {name!r} is not served here; there is {', '.join(map(repr, self.all_names))}",
                param="model", status=404, code="model_not_found",
            )  # fmt: skip
        return name

    @contextmanager
    def admitted(self, num_requests: int) -> Iterator[None]:
        """So many requests more, `n` outputs being as many. Raises Overloaded, for a client to come back later."""
        if self.is_draining:
            raise Overloaded("the server is shutting down")
        if self.is_restarting:
            raise Overloaded("the engine has died, and a new one is being started: try again later")
        if self.num_unfinished + num_requests > self.max_unfinished:
            raise Overloaded(
                f"{self.num_unfinished} requests are unfinished and {self.max_unfinished} is the most: try again later"
            )
        self.num_unfinished += num_requests
        try:
            yield
        finally:
            self.num_unfinished -= num_requests

    async def final(self, prompt: Prompt, params: SamplingParams, request_id: str) -> RequestOutput:
        """The one output of a request that wants it at its end. If it failed, its output says why."""
        handle = await self._check(prompt, params, request_id)
        timing = self.metrics.begin(handle.requests)
        outputs = []
        try:
            async for output in self.engine.outputs(handle):
                timing.count(output)
                outputs.append(output)
        except RequestError:
            pass  # the output that came before says so
        finally:
            timing.end()
        return outputs[-1]

    async def follow(
        self, prompt: Prompt, params: SamplingParams, request_id: str, called: Callable[[], None]
    ) -> "Followed":
        """`AsyncLLM.follow`, counted."""
        handle = await self._check(prompt, params, request_id)
        return Followed(self.engine, self.engine.follow(handle, called), self.metrics.begin(handle.requests))

    async def _check(self, prompt: Prompt, params: SamplingParams, request_id: str) -> Handle:
        engine = self.engine
        with checking():
            handle = await engine.check(prompt, params, request_id, asked_for.get())
            if engine.llm._session.find(request_id) is not None:
                raise ValueError(f"request_id {request_id!r} is in use by an unfinished request; choose another")
        return handle

    async def in_thread(self, function: Any, *arguments: Any) -> Any:
        """What takes milliseconds of Python or more: templates, texts to token ids."""
        return await asyncio.to_thread(function, *arguments)


def _cache_config(engine: AsyncLLM) -> dict[str, str]:
    """What vLLM's metric of this name says of it, as far as it is known here."""
    config = engine.llm.config
    return {
        "block_size": str(config.block_size),
        "cache_dtype": config.kv_cache_dtype,
        "enable_prefix_caching": str(config.enable_prefix_caching),
        "gpu_memory_utilization": str(config.gpu_memory_utilization),
        "max_model_len": str(config.max_model_len),
        "max_num_seqs": str(config.max_num_seqs),
        "quantization": str(engine.llm.quantization),
    }


class Followed:
    """A request whose outputs are read one by one, and counted."""

    def __init__(self, engine: AsyncLLM, stream: Stream, timing: RequestTiming) -> None:
        self._engine, self._stream, self._timing = engine, stream, timing

    def read(self) -> RequestOutput:
        output = self._stream.read()
        if output.outputs:
            self._timing.count(output)
        return output

    def read_text(self) -> tuple[str, int] | None:
        """As `Stream.read_text`."""
        grown = self._stream.read_text()
        if grown is not None and grown[1]:
            self._timing.count_more(grown[1])
        return grown

    def leave(self) -> None:
        self._engine.leave(self._stream)
        self._timing.end()
