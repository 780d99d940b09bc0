"""SteadyDecode: a batch in which every running request decodes one token a step, and nobody comes or goes.

Most steps are of this kind, and need no look at each request: who needs a block next, whose block has become full and
when the first request ends by its length all follow from counts taken once. Owns these counts; the scheduler drops them
when a request enters or leaves. Invariant: a steady step is to the last block what the general rule would have planned.
"""

from collections.abc import Sequence
from itertools import chain

from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import SharedPrefix


class SteadyDecode:
    """requests: all that run; a step that samples one token for each of them has just been planned.

    shared_prefixes: of that step, and so of those that follow: blocks that fill up now are nobody else's.
    """

    def __init__(self, requests: list[Request], block_size: int, shared_prefixes: list[SharedPrefix]) -> None:
        self.requests = requests
        self.shared_prefixes = shared_prefixes
        self.rows = [request.row for request in requests]
        self.with_stop_strings = [request for request in requests if request.params.stop]  # whose text is looked at
        self._stop_token_ids = frozenset[int]().union(*(request.stop_token_ids for request in requests))
        self.num_context_tokens = sum(request.num_computed_tokens for request in requests)  # that the last step read
        # how many more steps can be planned, and how many results taken in, before one request ends by its length
        self.num_steps_left = min(request.max_total_tokens - request.num_tokens for request in requests)
        self._num_results_left = self.num_steps_left
        self._num_steps = self._num_results = 0
        self._at_block_end: list[list[Request]] = [[] for _ in range(block_size)]  # i steps from now, and so on
        for request in requests:
            self._at_block_end[-request.num_computed_tokens % block_size].append(request)

    def out_of_blocks(self) -> list[Request]:
        """Who needs a new block in the next step."""
        return self._at_block_end[self._num_steps % len(self._at_block_end)]

    def count_step(self) -> None:
        """The next step has been planned."""
        for request in self.requests:
            request.num_computed_tokens += 1
            request.num_pending_tokens += 1
        self.num_context_tokens += len(self.requests)
        self.num_steps_left -= 1
        self._num_steps += 1

    def ends_nobody(self, token_ids: Sequence[list[int]]) -> bool:
        """Do all requests go on after the oldest step's tokens, unless a stop string ends one?"""
        return self._num_results_left > 0 and self._stop_token_ids.isdisjoint(chain.from_iterable(token_ids))

    def take_result(self, token_ids: Sequence[list[int]]) -> list[Request]:
        """The oldest step's tokens, none of which ends a request; returns whose block is now full and computed."""
        for request, sampled in zip(self.requests, token_ids, strict=True):
            request.num_pending_tokens -= 1
            request.token_ids += sampled
        full = self._at_block_end[self._num_results % len(self._at_block_end)]
        self._num_results_left -= 1
        self._num_results += 1
        return full
