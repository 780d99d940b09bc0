"""SamplingState: what each running request asks of the sampler, one row a request.

Owns the columns, on the host (which stages does this step need?) and on the device (with which values?), what single
stages need beyond them (token counts for penalties, lists of tokens, histories), and what the sampler leaves for the
next step: each row's last token. Does not own the rows: the scheduler hands them out. Invariant: after `upload`, the
device has what the last `set_row` of each row wrote; `columns` and `last_token` stay where they are, so that a CUDA
graph may use them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.sampling_params import LogitsProcessor, SamplingParams

ROW = np.dtype(  # 4-byte columns after an 8-byte one, so that one int32 matrix holds them all
    [
        ("seed", np.int64),
        ("temperature", np.float32),  # 0: greedy
        ("min_p", np.float32),  # 0: off
        ("top_p", np.float32),  # 1: off
        ("top_k", np.int32),  # 0: off
        ("repetition_penalty", np.float32),  # 1: off
        ("frequency_penalty", np.float32),  # 0: off
        ("presence_penalty", np.float32),  # 0: off
        ("_pad", np.int32),
    ]
)
_NO_IDS = np.zeros(0, dtype=np.int64)
_NO_BIAS = np.zeros(0, dtype=np.float32)  # rows' biases are joined: one of another dtype would change all of them


class RowParams(NamedTuple):
    """Columns of some rows on the device, each [n]; dtypes as in `ROW`."""

    seed: Tensor
    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    top_k: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor


class RowEdits(NamedTuple):
    """What one row asks of the stages that edit single logits; on the host."""

    stop_ids: np.ndarray = _NO_IDS  # held back while the row is shorter than its min_length
    bias_ids: np.ndarray = _NO_IDS
    bias: np.ndarray = _NO_BIAS
    allowed_ids: np.ndarray = _NO_IDS  # none: all
    bad_words: tuple[tuple[int, ...], ...] = ()
    processors: tuple[LogitsProcessor, ...] = ()
    num_prompt_tokens: int = 0


_NO_EDITS = RowEdits()


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for: torch's pool keeps the pinned source until it has run."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class SamplingState:
    """Rows 0 .. max_num_seqs - 1; `host` is the NumPy mirror (dtype `ROW`).

    columns [max_num_seqs, C] int32: on the device, the rows of `host` as 4-byte words.
    last_token [max_num_seqs] int32: on the device, what the sampler drew last for each row.
    edits: per row. asks_edits, has_penalties [max_num_seqs] bool: which ask for edits that do not end with min_length,
        and for penalties.
    min_length [max_num_seqs]: no stop token at a position below this; 0: off.
    counts [max_num_seqs, V] int32, made when the first row asks for penalties: see `edits.apply_penalties`.
    num_logprobs, num_prompt_logprobs [max_num_seqs]: how many log-probabilities a row wants beside the token's own; -1:
        none at all.
    histories: all tokens of the rows that entered with theirs. bitmasks: of this step, by row; see `bitmask.py`.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device | str,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        """processors: run for every row, before its own."""
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.host = np.zeros(max_num_seqs, dtype=ROW)
        self.columns = torch.zeros(max_num_seqs, ROW.itemsize // 4, dtype=torch.int32, device=self.device)
        self.last_token = torch.zeros(max_num_seqs, dtype=torch.int32, device=self.device)
        self.edits = [_NO_EDITS] * max_num_seqs
        self.asks_edits = np.zeros(max_num_seqs, dtype=bool)
        self.has_penalties = np.zeros(max_num_seqs, dtype=bool)
        self.min_length = np.zeros(max_num_seqs, dtype=np.int64)
        self.num_logprobs, self.num_prompt_logprobs = np.full((2, max_num_seqs), -1, dtype=np.int64)
        self.counts: Tensor | None = None
        self.histories: dict[int, list[int]] = {}
        self.bitmasks: Mapping[int, np.ndarray] = {}
        self._processors = tuple(processors)
        self._asking: set[int] = set()  # rows that ask for more than stages 8 to 12
        self._is_stale = False

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_len: int,
        stop_ids: Sequence[int],
        token_ids: Sequence[int] | None = None,
        bad_words: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        """Put a request into `row`. seed: any integer, taken modulo 2**64; stop_ids: ids that min_tokens holds back.

        token_ids: prompt and output so far; needed for penalties, for bad words of more than one token, and for
        Python processors. Filters that would keep every token are stored as off, so they cost nothing.
        """
        entry = self.host[row]
        entry["seed"] = np.uint64(seed % 2**64).astype(np.int64)
        entry["temperature"] = 0.0 if params.is_greedy else params.temperature
        entry["min_p"] = params.min_p
        entry["top_p"] = params.top_p
        entry["top_k"] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
            entry[name] = getattr(params, name)
        # An id outside the vocabulary has no logit to hold back: a tokenizer may know more ids than the model.
        known = {stop_id for stop_id in stop_ids if 0 <= stop_id < self.vocab_size} if params.min_tokens else set()
        self.min_length[row] = prompt_len + params.min_tokens if known else 0
        self.asks_edits[row] = bool(
            params.logit_bias
            or params.allowed_token_ids
            or bad_words
            or params.has_penalties
            or params.logits_processors
            or self._processors
        )
        self.has_penalties[row] = params.has_penalties
        self.edits[row] = _NO_EDITS
        if self.asks_edits[row] or known:
            bias = params.logit_bias or {}
            self.edits[row] = RowEdits(
                stop_ids=np.array(sorted(known), dtype=np.int64),
                bias_ids=np.array(list(bias), dtype=np.int64),
                bias=np.array(list(bias.values()), dtype=np.float32),
                allowed_ids=np.unique(np.array(params.allowed_token_ids or (), dtype=np.int64)),
                bad_words=bad_words,
                processors=(*self._processors, *(params.logits_processors or ())),
                num_prompt_tokens=prompt_len,
            )
        self.num_logprobs[row] = self._num_logprobs(params.logprobs)
        self.num_prompt_logprobs[row] = self._num_logprobs(params.prompt_logprobs)
        self._asking.discard(row)
        if self.asks_edits[row] or known or params.logprobs is not None:
            self._asking.add(row)
        self.histories.pop(row, None)
        if token_ids is not None:
            self.histories[row] = list(token_ids)
        if params.has_penalties:
            assert token_ids is not None, "penalties count the tokens so far"
            self._start_counts(row, token_ids, prompt_len)
        self._is_stale = True

    def is_plain(self, rows: Sequence[int]) -> bool:
        """Do these rows ask for no more than to be drawn from their logits as they are?"""
        return (not self._asking or self._asking.isdisjoint(rows)) and not self.bitmasks

    def _num_logprobs(self, asked: int | None) -> int:
        """-1 says "the whole vocabulary" in SamplingParams, and "none" here."""
        if asked is None:
            return -1
        return self.vocab_size if asked == -1 else min(asked, self.vocab_size)

    def _start_counts(self, row: int, token_ids: Sequence[int], prompt_len: int) -> None:
        """Queued behind what steps in flight still count for whoever had the row before."""
        if self.counts is None:
            shape = (len(self.host), self.vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        ids, times = np.unique(np.array(token_ids[prompt_len:], dtype=np.int64), return_counts=True)
        in_prompt = np.unique(np.array(token_ids[:prompt_len], dtype=np.int64))
        pairs = np.concatenate((np.stack((ids, 2 * times)), np.stack((in_prompt, np.ones_like(in_prompt)))), axis=1)
        where, values = upload(pairs, self.device).unbind(0)
        self.counts[row] = 0
        self.counts[row].index_add_(0, where, values.int())

    def count(self, rows_host: np.ndarray, rows: Tensor, tokens: Tensor) -> None:
        """Add freshly drawn tokens [n] to the counts of those of the rows [n] that have penalties."""
        members = np.flatnonzero(self.has_penalties[rows_host])
        if len(members):
            assert self.counts is not None
            index = upload(members, self.device)
            self.counts[rows[index].long(), tokens[index].long()] += 2  # rows differ, so no pair comes twice

    def extend_histories(
        self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        """Take in a step's tokens: `lengths` of them a row, from position `starts` on, all flat in token_ids."""
        if not self.histories:
            return
        first = 0
        for row, start, length in zip(rows, starts, lengths, strict=True):
            history = self.histories.get(row)
            if history is not None:
                history.extend(token_ids[first + len(history) - start : first + length])
            first += length

    def upload(self) -> Tensor:
        """Bring `columns` up to date, all new rows in one copy that the host does not wait for, and return it."""
        if self._is_stale:
            packed = self.host.view(np.int32).reshape(len(self.host), -1)
            self.columns.copy_(upload(packed, self.device), non_blocking=True)
            self._is_stale = False
        return self.columns

    def select(self, rows: Tensor) -> RowParams:
        """The columns of `rows` [n] on the device, up to date."""
        seed, rest = self.upload().index_select(0, rows).split((2, ROW.itemsize // 4 - 2), dim=1)
        temperature, min_p, top_p, _, repetition, frequency, presence, _ = rest.view(torch.float32).unbind(1)
        return RowParams(
            seed.view(torch.int64)[:, 0], temperature, min_p, top_p, rest[:, 3], repetition, frequency, presence
        )
