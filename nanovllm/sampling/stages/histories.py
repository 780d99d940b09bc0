"""Histories: all tokens of the rows that entered with theirs, on the host, as far as the host knows them.

Owns these lists. Invariant: a row's list ends at the last token of its request that a plan has named; behind a draft,
at the last one that was drawn.
"""

from nanovllm.engine.scheduler_output import SchedulerOutput


class Histories:
    def __init__(self) -> None:
        self._tokens: dict[int, list[int]] = {}

    def of(self, row: int) -> list[int]:
        """Token ids of prompt and output; empty for a row without any."""
        return self._tokens.get(row, [])

    def add(self, row: int, token_id: int) -> None:
        """The row's next token, which no plan has named yet."""
        if row in self._tokens:
            self._tokens[row].append(token_id)

    def begin(self, plan: SchedulerOutput) -> None:
        """Take in new rows and the step's tokens."""
        for new in plan.new_rows:
            self._tokens.pop(new.row, None)
            if new.token_ids is not None:
                self._tokens[new.row] = list(new.token_ids)
        if not self._tokens:
            return
        first = 0
        columns = plan.rows, plan.num_computed_tokens, plan.num_scheduled_tokens, plan.num_samples
        for row, start, length, num_samples in zip(*columns, strict=True):
            history = self._tokens.get(row)
            if history is not None:  # which drafts do not belong to until they are accepted
                known = first + length - max(0, num_samples - 1)
                history.extend(plan.token_ids[first + len(history) - start : known])
            first += length
