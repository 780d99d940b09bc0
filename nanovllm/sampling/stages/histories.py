"""Histories: all tokens of the rows that entered with theirs, on the host, as far as the host knows them.

Owns these lists. Invariant: a row's list ends at the last token of its request that a plan has named.
"""

from nanovllm.engine.scheduler_output import SchedulerOutput


class Histories:
    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}

    def of(self, row: int) -> list[int]:
        """Token ids of prompt and output; empty for a row without any."""
        return self._tokens.get(row, [])

    def begin(self, plan: SchedulerOutput) -> None:
        """Take in new rows and the step's tokens."""
        for new in plan.new_rows:
            self._tokens.pop(new.row, None)
            if new.token_ids is not None:
                self._tokens[new.row] = list(new.token_ids)
        if not self._tokens:
            return
        first = 0
        for row, start, length in zip(plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, strict=True):
            history = self._tokens.get(row)
            if history is not None:
                history.extend(plan.token_ids[first + len(history) - start : first + length])
            first += length
