"""Which steps are captured as CUDA graphs, and how a plan is laid out as the inputs of one.

Owns the kinds of step, their sizes and their layouts; `cuda_graphs.py` captures them and `captured_steps.py` computes
them. Invariant: what fills a size up is padding (row -1), which reads nothing of a request, stores nothing, and whose
token nobody looks at.

    decode     one token for each of some running rows, at most `max_num_seqs` of them
    cascade    the same, where some of them share prefixes that are read once
    prompts    anything with few tokens, most of it prompts: launching their kernels one by one takes longer than
               running them
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.kernels.cascade import CascadeInputs, cascade_inputs, num_words
from nanovllm.runner.cascade_items import CascadeItems


class DecodeInputs(NamedTuple):
    """Inputs of a decode step, each [size] int32."""

    rows: Tensor  # -1: padding
    token_ids: Tensor  # -1: the row's last sampled token
    new_blocks: Tensor  # the block that the token opens; -1: none


class DecodeLayout:
    """size: a batch size."""

    def __init__(self, max_num_seqs: int) -> None:
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
        self.sizes = [size for size in sizes if size < max_num_seqs] + [max_num_seqs]

    def size(self, plan: SchedulerOutput) -> int | None:
        """The size for a plan of one sampled token for each of some rows that run already; None for any other plan."""
        num_reqs = len(plan.rows)
        if plan.num_decodes < num_reqs or plan.new_rows or not all(plan.num_samples):
            return None
        return next(size for size in self.sizes if size >= num_reqs)

    def words(self, size: int) -> int:
        return len(DecodeInputs._fields) * size

    def inputs(self, static: Tensor, size: int) -> DecodeInputs:
        return DecodeInputs(*static.view(-1, size))

    def fill(self, words: np.ndarray, size: int, plan: SchedulerOutput | None) -> None:
        fields = words.reshape(-1, size)
        fields.fill(-1)
        if plan is None:
            return
        fields[0, : len(plan.rows)] = plan.rows
        fields[1, : len(plan.rows)] = plan.token_ids
        if plan.new_blocks:  # one at most for each row, and where its token goes, as it has no other
            opened = {row: block_id for row, _, block_id in plan.new_blocks}
            fields[2, : len(plan.rows)] = [opened.get(row, -1) for row in plan.rows]


class CascadeLayout:
    """Decodes that share prefixes: the inputs of a decode step, then the items. size: a batch size."""

    def __init__(self, decodes: DecodeLayout, items: CascadeItems) -> None:
        self._decodes = decodes
        self._items = items

    def words(self, size: int) -> int:
        return self._decodes.words(size) + num_words(size)

    def inputs(self, static: Tensor, size: int) -> tuple[DecodeInputs, CascadeInputs]:
        decodes, items = static.split([self._decodes.words(size), num_words(size)])
        return self._decodes.inputs(decodes, size), cascade_inputs(items, size)

    def fill(self, words: np.ndarray, size: int, plan: SchedulerOutput | None) -> None:
        decodes, items = np.split(words, [self._decodes.words(size)])
        self._decodes.fill(decodes, size, plan)
        items[:] = self._items.words(plan.shared_prefixes, size) if plan is not None else 0


class PromptInputs(NamedTuple):
    """Inputs of a step with prompts, int32. The last request is padding, and owns the tokens that fill a size up."""

    rows: Tensor  # [num_reqs], -1: padding
    query_start_loc: Tensor  # [num_reqs + 1]
    token_ids: Tensor  # [num_tokens], -1: the row's last sampled token
    # [num_reqs], of the requests that get a token, then padding:
    sampled_rows: Tensor  # -1: padding
    sampled_positions: Tensor  # where that token will stand
    sampled_from: Tensor  # index of the token that it follows


PromptSize = tuple[int, int]  # num_tokens, num_reqs


class PromptLayout:
    """size: tokens and requests, the last of them padding."""

    num_tokens = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    num_reqs = (8, 64)
    longest_decode = 4096  # of a longer context, a single token is better computed by the kernels for decodes

    @property
    def largest(self) -> PromptSize:
        return self.num_tokens[-1], self.num_reqs[-1]

    def at_once(self, most_tokens: int) -> list[PromptSize]:
        """Sizes that are captured when an engine starts, the largest first.

        Else the first prompt of a size, or the first second turn, waits for a capture, which takes a host longer than
        the step takes the device. Smaller steps have kernels of their own, which are compiled behind.
        """
        return [(n, self.num_reqs[0]) for n in reversed(self.num_tokens) if 96 <= n <= min(512, most_tokens)]

    def size(self, plan: SchedulerOutput) -> PromptSize | None:
        num_tokens = next((n for n in self.num_tokens if n >= len(plan.token_ids)), None)
        num_reqs = next((n for n in self.num_reqs if n > len(plan.rows)), None)
        if num_tokens is None or num_reqs is None or not any(plan.num_samples):
            return None
        if max(plan.num_computed_tokens[: plan.num_decodes], default=0) >= self.longest_decode:
            return None
        return num_tokens, num_reqs

    def words(self, size: PromptSize) -> int:
        num_tokens, num_reqs = size
        return num_tokens + 5 * num_reqs + 1

    def inputs(self, static: Tensor, size: PromptSize) -> PromptInputs:
        num_tokens, num_reqs = size
        return PromptInputs(*static.split((num_reqs, num_reqs + 1, num_tokens, num_reqs, num_reqs, num_reqs)))

    def fill(self, words: np.ndarray, size: PromptSize, plan: SchedulerOutput | None) -> None:
        num_tokens, num_reqs = size
        fields = np.split(words, np.cumsum((num_reqs, num_reqs + 1, num_tokens, num_reqs, num_reqs)))
        rows, starts, token_ids, sampled_rows, sampled_positions, sampled_from = fields
        words.fill(0)
        rows.fill(-1)
        sampled_rows.fill(-1)
        if plan is not None:
            which = np.flatnonzero(plan.num_samples)
            rows[: len(plan.rows)] = plan.rows
            np.cumsum(plan.num_scheduled_tokens, out=starts[1 : len(plan.rows) + 1])
            starts[len(plan.rows) + 1 :] = len(plan.token_ids)
            token_ids[: len(plan.token_ids)] = plan.token_ids
            sampled_rows[: len(which)] = rows[which]
            sampled_positions[: len(which)] = np.add(plan.num_computed_tokens, plan.num_scheduled_tokens)[which]
            sampled_from[: len(which)] = starts[which + 1] - 1
        starts[num_reqs] = num_tokens
