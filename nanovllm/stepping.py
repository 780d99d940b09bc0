"""SteppedRequests: requests that their caller advances one step at a time, and how far it has been told of each.

Owns what stands behind `LLM.add_request` and `LLM.step`; the requests themselves are the session's. Invariant: what an
interruption keeps from the caller of one step, the next one returns.
"""

from collections.abc import Callable, Sequence

from nanovllm.engine.output_processor import Marks
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind


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
