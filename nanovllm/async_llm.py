"""AsyncLLM: an LLM for asyncio, with vLLM's interface: each request is an async iterator of its outputs.

Owns requests from a coroutine's call to their end; how news of them come is `streams.py`. Outputs are made in the event
loop of who waits, and prompts are tokenized in threads of their own. Invariant: whatever ends an iterator, also before
its first output, ends its request.
"""

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

from nanovllm.data_parallel import DataParallelEngine
from nanovllm.engine.input_processor import Prompt
from nanovllm.engine.session import Handle, Inbox
from nanovllm.errors import RequestError
from nanovllm.live.async_surface import AsyncLiveWeights
from nanovllm.llm import LLM
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.streams import Poller, Stream, Streams, step_for_all

_QUICK_SIZE = 4000  # characters or token ids
_NUM_TOKENIZING_THREADS = 4  # tokenizers leave the interpreter's lock, and a long text takes a second


class AsyncLLM(AsyncLiveWeights):
    """Load a model and generate with it from coroutines. model and options are those of `LLM`, which is `self.llm`.

        async with AsyncLLM("demo") as engine:
            async for output in engine.generate("The capital of France is", SamplingParams(max_tokens=20)):
                print(output.outputs[0].text)

    Loading blocks: `await asyncio.to_thread(AsyncLLM, "demo")` where a loop runs already. `llm` may be used beside it,
    from other threads; what blocks there (`get_metrics`, say) belongs into `asyncio.to_thread` as well.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.llm = LLM(model, **options)
        self._session = self.llm._session
        self._inbox = Inbox(self.llm._output_processor.mark)
        self._streams: Streams = {}
        self._tokenizing = ThreadPoolExecutor(_NUM_TOKENIZING_THREADS, "nanovllm tokenizing")
        # Nothing that the thread holds leads back here: an engine that is forgotten ends, also at the interpreter's.
        self._finalize = weakref.finalize(self, self._session.close)
        self._thread: threading.Thread | None = None
        self._poller: Poller | None = None

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one prompt as they come, of the kind that `SamplingParams.output_kind` names, to the finished one.

        Leaving the iterator, or cancelling the task that waits for it, stops the request and frees its blocks. Raises
        ValueError or TypeError for bad input; RequestError behind the output of a request that failed; RuntimeError if
        the engine has closed.
        """
        async with aclosing(
            self.outputs(await self.check(prompt, sampling_params, request_id, lora_request))
        ) as outputs:
            async for output in outputs:
                yield output

    async def check(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> Handle:
        """The first half of `generate`, for who must know which errors are its caller's: ValueError and TypeError here.

        The request is tokenized and not queued.
        """
        params = sampling_params if sampling_params is not None else self.llm.get_default_sampling_params()
        make_handle = partial(self.llm._make_handle, prompt, params, request_id, self._inbox, lora_request)
        self._session.check_open()
        is_read = lora_request is None or not self.llm._adapters.needs_reading(lora_request)
        if is_read and _is_quick(prompt, params):
            return make_handle()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, make_handle)

    def poll_in_this_loop(self) -> None:
        """For a server, before its first request: where the engine is a process of its own, the event loop that runs
        now reads what it sends, and no thread does. Every request must then come from this loop.
        """
        engine = self._session.engine
        if isinstance(engine, DataParallelEngine):
            self._poller = Poller(self._session, engine, self._inbox, self._streams)

    async def outputs(self, handle: Handle) -> AsyncGenerator[RequestOutput, None]:
        """The second half of `generate`. Raises ValueError only for an id that is in use."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] | None = None  # no `asyncio.Event`, which costs as much again for each token

        def call() -> None:
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

        stream = self.follow(handle, call)
        try:
            while not stream.is_finished:
                if not stream.has_news:
                    waiter = loop.create_future()
                    await waiter
                output = stream.read()
                if output.outputs:
                    yield output
            for request in handle.requests:
                if request.end is not None and request.end.error is not None:
                    raise RequestError(request.end.error)
        finally:
            self.leave(stream)

    def follow(self, handle: Handle, called: Callable[[], None]) -> Stream:
        """`outputs` for who has thousands a second to pass on: called(), in this event loop, when there is news.

        A call a step at most, and none of them has to be answered: what was not read is in what is read next. `leave`
        the stream in the end. Raises ValueError for an id that is in use, RuntimeError if the engine has closed.
        """
        stream = self._streams[handle] = Stream(self.llm, handle, called)
        try:
            if self._poller is None and self._thread is None:
                self._start_thread()
            self._session.submit(handle)
        except BaseException:
            self.leave(stream)
            raise
        return stream

    def _start_thread(self) -> None:
        arguments = self._session, self._inbox, self._streams
        self._thread = threading.Thread(target=step_for_all, args=arguments, name="nanovllm engine", daemon=True)
        self._thread.start()

    def leave(self, stream: Stream) -> None:
        """Stop its request, if it has not ended."""
        self._streams.pop(stream.handle, None)
        self._session.cancel([stream.handle])

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """As `LLM.add_lora`; the event loop goes on meanwhile."""
        return await asyncio.to_thread(self.llm.add_lora, lora_request)

    async def remove_lora(self, lora_id: int | str) -> bool:
        return await asyncio.to_thread(self.llm.remove_lora, lora_id)

    async def list_loras(self) -> set[int]:
        return self.llm.list_loras()

    async def pin_lora(self, lora_id: int | str) -> bool:
        return self.llm.pin_lora(lora_id)

    @property
    def is_alive(self) -> bool:
        """False when it is closed, or when a process of its own (`engine_process`, replicas) has died."""
        engine = self._session.engine
        return not self.llm._is_closed and (not isinstance(engine, DataParallelEngine) or engine.is_alive())

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their iterators get a last output with the finish reason "abort". Unknown ids are ignored."""
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            handle = self._session.find(name)
            if handle is not None:
                self._session.abort(handle)

    async def close(self) -> None:
        """Free the model and the KV cache, after the step that runs now; every open iterator raises RuntimeError."""
        await asyncio.to_thread(self._close)
        if self._poller is not None:
            self._poller.close()

    def _close(self) -> None:
        self._finalize()
        if self._thread is not None:
            self._thread.join()
        self._tokenizing.shutdown()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _is_quick(prompt: Prompt, params: SamplingParams) -> bool:
    """Whether checking takes less time than the way to another thread and back does where the interpreter is busy."""
    if params.structured_outputs is not None:
        return False
    sizes = prompt.values() if isinstance(prompt, Mapping) else (prompt,)
    return all(len(one) <= _QUICK_SIZE for one in sizes if isinstance(one, (str, list)))
