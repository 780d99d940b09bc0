"""SteppedLLM: requests that their caller advances one step at a time, and how far it has been told of each.

Owns `LLM.add_request`, `LLM.step` and what stands behind them; the requests are the session's. Invariant: what an
interruption keeps from the caller of one step, the next one returns.
"""

from collections.abc import Callable, Iterable, Sequence

from nanovllm.engine.input_processor import InputProcessor, Prompt
from nanovllm.engine.output_processor import Marks
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.lora.request import LoRARequest
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams


class SteppedRequests:
    def __init__(
        self,
        session: Session,
        mark: Callable[[Sequence[Request]], Marks],
        make_output: Callable[[Sequence[Request], Marks, Marks | None], RequestOutput],
    ) -> None:
        self.inbox = Inbox(mark)
        self._session = session
        self._make_output = make_output
        self._returned: dict[Handle, Marks] = {}  # how far each of the inbox

    def step(self) -> list[RequestOutput]:
        """Advance by one step; the outputs of those that got tokens or ended."""
        news = self._session.exclusively(self._step)
        outputs = []
        for handle, marks in news.items():
            is_delta = handle.requests[0].params.output_kind is RequestOutputKind.DELTA
            output = self._make_output(handle.requests, marks, self._returned.get(handle, ()) if is_delta else None)
            if output.outputs:
                outputs.append(output)
        # In the line that returns: what an interruption keeps from the caller is returned by the next call.
        return self._returned.update(news) or outputs

    def _step(self) -> dict[Handle, Marks]:
        """News of the inbox after one step; they stay there until the call after the one that returns them."""
        inbox = self.inbox.news
        for handle, marks in list(self._returned.items()):
            if handle in inbox and inbox[handle][0] is marks:
                del inbox[handle]
            if all(mark.is_ended for mark in marks):
                del self._returned[handle]
        self._session.step()
        return {handle: marks for handle, (marks, _) in list(inbox.items())}

    def are_all_returned(self) -> bool:
        """Has the caller been told all there is?"""
        return all(self._returned.get(handle) is marks for handle, (marks, _) in list(self.inbox.news.items()))


class SteppedLLM:
    # What `LLM` has.
    _session: Session
    _stepped: SteppedRequests
    _input_processor: InputProcessor
    get_default_sampling_params: Callable[[], SamplingParams]
    _give_adapters: Callable[..., None]

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> str:
        """Queue a prompt for `step`; returns its id. Raises ValueError for a bad prompt or an id that is in use."""
        self._session.check_open()
        params = sampling_params if sampling_params is not None else self.get_default_sampling_params()
        handle = self._make_handle(prompt, params, request_id, self._stepped.inbox, lora_request)
        self._session.submit(handle)
        return handle.request_id

    def _make_handle(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None,
        inbox: Inbox[Marks],
        lora_request: LoRARequest | None = None,
    ) -> Handle:
        """One prompt, checked and not queued."""
        with self._session.numbers(1) as (number,):
            group = self._input_processor.process(prompt, params, "prompt", number, request_id)
        if lora_request is not None:
            self._give_adapters([group], lora_request)
        return Handle(group, inbox, only_ends=params.output_kind is RequestOutputKind.FINAL_ONLY)

    def step(self) -> list[RequestOutput]:
        """Advance by one step; returns the requests of `add_request` that got tokens or ended.

        Each has what `SamplingParams.output_kind` says: all its output so far, what is new, or nothing before its end.
        """
        return self._stepped.step()

    def has_unfinished_requests(self) -> bool:
        return self._session.has_unfinished_requests() or not self._stepped.are_all_returned()

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Stop requests, each with all its sequences. An id that has ended, or never was, is passed over.

        Those of `add_request` are forgotten. A call that waits for one gets it with the finish reason "abort".
        """
        for name in [request_id] if isinstance(request_id, str) else list(request_id):
            handle = self._session.find(name)
            if handle is not None and handle.inbox is self._stepped.inbox:
                self._session.cancel([handle])
            elif handle is not None:
                self._session.abort(handle)
