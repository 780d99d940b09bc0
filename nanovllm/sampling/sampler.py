"""Sampler: the last logits of each request become its next token.

The order of the stages, as in vLLM but for the grammar, which has the last word here:

     0. logprobs            of the raw logits: log-softmax, top k and ranks            rows that ask
     1. allowed_token_ids   all other tokens are ruled out                             rows that ask
     2. bad_words           the token that would complete one is ruled out             rows that ask
     3. min_tokens          stop ids are ruled out while the output is too short       rows that ask
     4. logit_bias          added to single logits                                     rows that ask
     5. logits_processors   Python functions, the engine's and then the request's      rows that ask
     6. penalties           repetition, then frequency, then presence                  rows that ask
     7. structured_outputs  tokens that the grammar does not allow are ruled out       rows that ask
     8. greedy              argmax, the lowest id on a tie                             rows with temperature 0; done
        temperature         logits / temperature                                       all other rows
     9. min_p               drop tokens below min_p times the highest probability      rows that ask
    10. top_k               keep the k highest, with ties                              rows that ask
    11. top_p               keep the nucleus of what is left, at least one token       rows that ask
    12. draw                lowest id where the CDF exceeds uniform(seed, position)    all sampled rows

Owns the order and the choice of route; `logprobs.py` (0), `edits.py` (1 to 6), `bitmask.py` (7) and `logits.py` (8 to
12) own the arithmetic, `processors.py` (5) the user's functions, `state.py` the parameters. Rows that ask for an edit
get a float32 copy of their logits; the others never see those stages. On a GPU, stages 8 to 12 are
`kernels/sample_triton.py`, which reads the parameters there. On a CPU the host mirrors say which rows need what, so a
stage that nobody asked for is not run. Invariant: a row's token depends on its logits, parameters, history, seed and
position alone, and so does the route to it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.dispatch import use_triton
from nanovllm.sampling.bitmask import apply_bitmask
from nanovllm.sampling.edits import add_bias, allow_only, apply_penalties, rule_out
from nanovllm.sampling.logits import (
    MASKED,
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    apply_top_p_by_buckets,
    find_candidates,
    pick_by_weight,
    pick_highest,
)
from nanovllm.sampling.logprobs import CHUNK, packed, top_logprobs
from nanovllm.sampling.philox import uniform
from nanovllm.sampling.processors import run_processors
from nanovllm.sampling.state import RowParams, SamplingState, upload

_NUM_CANDIDATES = 128  # what the filters look at first; rows that keep more are filtered whole
_NO_IDS = np.zeros(0, dtype=np.int64)


class Sampler:
    def __init__(self, state: SamplingState, is_deterministic: bool = False, tp: TensorParallel | None = None) -> None:
        """tp: the ranks that sample the same logits."""
        self._state = state
        self._is_deterministic = is_deterministic
        self._tp = tp or TensorParallel()
        self._failures: dict[int, str] = {}  # row -> why its edits failed

    def sample(
        self, logits: Tensor, rows_host: np.ndarray, rows: Tensor, positions_host: np.ndarray, positions: Tensor
    ) -> Tensor:
        """Next tokens, int32 [n]; `SamplingState.last_token` keeps them by row. logits [n, V] of any float dtype, left
        unchanged; positions [n]: where the new tokens will stand; rows [n]: the requests' rows. Both are int32 on the
        device, and known to the host.
        """
        edited = np.flatnonzero(self.needs_edits(rows_host, positions_host))
        if len(edited) == 0:
            return self._draw(logits, rows_host, rows, positions)
        tokens = self._draw_others(logits, edited, rows_host, rows, positions)
        self.redraw(logits, tokens, edited, rows_host, rows, positions_host, positions)
        return tokens

    def redraw(
        self,
        logits: Tensor,
        tokens: Tensor,
        edited: np.ndarray,
        rows_host: np.ndarray,
        rows: Tensor,
        positions_host: np.ndarray,
        positions: Tensor,
    ) -> None:
        """Replace the tokens [n], drawn without stages 1 to 7, of those rows that ask for any of these.

        edited: which of the n rows these are, by `needs_edits`. Else as `sample`. Counts what is drawn for penalties,
        so it comes once for each token.
        """
        size = max(1, CHUNK[logits.device.type] // logits.shape[1])
        for start in range(0, len(edited), size):
            part = edited[start : start + size]
            index = upload(part, logits.device)
            values = self._edit(logits[index].float(), rows_host[part], rows[index], positions_host[part])
            tokens[index] = self._draw(values, rows_host[part], rows[index], positions[index])
        self._state.count(rows_host, rows, tokens)

    def needs_edits(self, rows_host: np.ndarray, positions_host: np.ndarray) -> np.ndarray:
        """Which of these rows ask for any of the stages 1 to 7, bool [n]."""
        state = self._state
        asks = state.asks_edits[rows_host] | (positions_host < state.min_length[rows_host])
        return asks | np.isin(rows_host, list(state.bitmasks)) if state.bitmasks else asks

    def take_failures(self, rows_host: np.ndarray) -> dict[int, str]:
        """Which of these n rows, that were sampled last, have no token, and why: their Python processors failed."""
        if not self._failures:
            return {}
        failures, self._failures = self._failures, {}
        return {index: failures[row] for index, row in enumerate(rows_host.tolist()) if row in failures}

    def logprobs(self, logits: Tensor, tokens: Tensor, rows_host: np.ndarray) -> list[tuple[np.ndarray, Tensor]]:
        """Stage 0, for the tokens [n] that were drawn: (members, what they asked for), one of each size asked for.

        members: which of the n rows; with theirs as `logprobs.packed` has it.
        """
        asked = self._state.num_logprobs[rows_host]
        results = []
        for k in np.unique(asked[asked >= 0]):
            members = np.flatnonzero(asked == k)
            index = upload(members, logits.device)
            results.append((members, packed(top_logprobs(logits[index], tokens[index], int(k)))))
        return results

    def sample_captured(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Stages 8 to 12 on a GPU and without the host, so that it can be captured in a CUDA graph.

        Reads `SamplingState.columns` as last uploaded, and keeps the tokens as `sample` does. rows, positions int32; a
        row of -1 is padding, which gives token 0 and keeps nothing.
        """
        from nanovllm.kernels.sample_triton import sample_triton

        state = self._state
        return sample_triton(logits, rows, positions, state.columns, state.last_token, self._is_deterministic)

    # -- stages 1 to 7 --

    def _edit(self, logits: Tensor, rows_host: np.ndarray, rows: Tensor, positions_host: np.ndarray) -> Tensor:
        """logits [n, V] float32, a copy of our own; each stage in turn, for those rows that ask."""
        state = self._state
        asked = [state.edits[row] for row in rows_host]
        logits = self._with_ids(allow_only, logits, [edits.allowed_ids for edits in asked])
        logits = self._with_ids(rule_out, logits, [self._completing(row) for row in rows_host])
        too_short = positions_host < state.min_length[rows_host]
        stop_ids = [edits.stop_ids if short else _NO_IDS for edits, short in zip(asked, too_short, strict=True)]
        logits = self._with_ids(rule_out, logits, stop_ids)
        biases = np.concatenate([edits.bias for edits in asked])
        if len(biases):
            bias_ids = [edits.bias_ids for edits in asked]
            logits = self._with_ids(add_bias, logits, bias_ids, upload(biases, logits.device))
        members = np.flatnonzero([bool(edits.processors) for edits in asked])
        if len(members):
            index = upload(members, logits.device)
            values = logits[index]
            functions = [asked[i].processors for i in members]
            reasons = run_processors(values, [state.histories[rows_host[i]] for i in members], functions, self._tp)
            self._failures.update((int(rows_host[members[i]]), reason) for i, reason in reasons.items())
            logits = logits.index_copy(0, index, values)
        members = np.flatnonzero(state.has_penalties[rows_host])
        if len(members):
            assert state.counts is not None
            index = upload(members, logits.device)
            params = state.select(rows[index])
            penalised = apply_penalties(
                logits[index],
                state.counts.index_select(0, rows[index]),
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
            logits = logits.index_copy(0, index, penalised)
        members = np.flatnonzero(np.isin(rows_host, list(state.bitmasks)))
        if len(members):
            index, words = (
                upload(array, logits.device)
                for array in (members, np.stack([state.bitmasks[row] for row in rows_host[members]]))
            )
            logits = logits.index_copy(0, index, apply_bitmask(logits[index], words))
        return logits

    def _with_ids(
        self, stage: Callable[..., Tensor], logits: Tensor, token_ids: Sequence[np.ndarray], *values: Tensor
    ) -> Tensor:
        """Run a stage on lists of tokens, one a row; not at all if they are all empty."""
        flat = np.concatenate(token_ids)
        if len(flat) == 0:
            return logits
        index = np.arange(len(token_ids)).repeat([len(ids) for ids in token_ids])
        return stage(logits, *upload(np.stack((index, flat)), logits.device).unbind(0), *values)

    def _completing(self, row: int) -> np.ndarray:
        """Tokens that would complete a bad word after the row's output so far."""
        bad_words = self._state.edits[row].bad_words
        if not bad_words:
            return _NO_IDS
        first = self._state.edits[row].num_prompt_tokens
        history = self._state.histories.get(row, [])
        found = []
        for *before, last in bad_words:
            begin = len(history) - len(before)
            if not before or (begin >= first and history[begin:] == before):
                found.append(last)
        return np.unique(np.array(found, dtype=np.int64))

    # -- stages 8 to 12 --

    def _draw_others(
        self, logits: Tensor, edited: np.ndarray, rows_host: np.ndarray, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """As `_draw`, but for the rows that are edited first; their tokens are yet to come."""
        if use_triton(logits):
            self._state.upload()
            return self.sample_captured(logits, rows.index_fill(0, upload(edited, rows.device), -1), positions)
        tokens = torch.empty(len(rows_host), dtype=torch.int32)
        others = np.delete(np.arange(len(rows_host)), edited)
        if len(others):
            index = torch.from_numpy(others)
            tokens[index] = self._draw(logits[index], rows_host[others], rows[index], positions[index])
        return tokens

    def _draw(self, logits: Tensor, rows_host: np.ndarray, rows: Tensor, positions: Tensor) -> Tensor:
        """Without stages 1 to 7; each row's token is also kept in `last_token`."""
        if use_triton(logits):
            self._state.upload()
            return self.sample_captured(logits, rows, positions)
        asked = self._state.host[rows_host]
        greedy = asked["temperature"] == 0
        filtered = ~greedy & _asks_for_a_filter(asked)
        tokens = torch.empty(len(rows_host), dtype=torch.int32)
        for members in (greedy, ~greedy & ~filtered, filtered):
            if members.all():
                tokens.copy_(self._pick(logits, asked, rows, positions))
            elif members.any():
                index = torch.from_numpy(np.flatnonzero(members))
                tokens[index] = self._pick(logits[index], asked[members], rows[index], positions[index]).int()
        self._state.last_token[rows] = tokens
        return tokens

    def _pick(self, logits: Tensor, asked: np.ndarray, rows: Tensor, positions: Tensor) -> Tensor:
        """Tokens of rows that are all greedy, all plain, or all filtered; on a CPU."""
        if asked["temperature"][0] == 0:
            return pick_highest(logits)
        params = self._state.select(rows)
        noise = uniform(params.seed, positions)
        size = max(1, CHUNK["cpu"] // logits.shape[1])
        picked = []
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            scaled = apply_temperature(logits[part], params.temperature[part])
            picked.append(
                _filter_and_draw(scaled, RowParams(*(column[part] for column in params)), asked[part], noise[part])
            )
        return torch.cat(picked)


def _asks_for_a_filter(asked: np.ndarray) -> np.ndarray:
    return (asked["min_p"] > 0) | (asked["top_k"] > 0) | (asked["top_p"] < 1)


def _filter_and_draw(scaled: Tensor, params: RowParams, asked: np.ndarray, noise: Tensor) -> Tensor:
    """Filter and draw. The filters look at the highest tokens first, and at whole rows only where these do not settle
    it, since to search whole rows is dear.
    """
    if not _asks_for_a_filter(asked).any():
        return pick_by_weight(scaled.softmax(-1), noise)
    if scaled.shape[1] <= _NUM_CANDIDATES:
        return pick_by_weight(_filter(scaled, params, asked)[0].softmax(-1), noise)
    total = 1 / scaled.softmax(-1).amax(-1) if (asked["top_p"] < 1).any() else None
    values, ids = find_candidates(scaled, _NUM_CANDIDATES)
    values, is_exact = _filter(values, params, asked, total)
    tokens = ids.gather(1, pick_by_weight(values.softmax(-1), noise)[:, None])[:, 0]
    rest = (~is_exact).nonzero()[:, 0]
    if len(rest):
        values, _ = _filter(scaled[rest], RowParams(*(column[rest] for column in params)), asked[rest.numpy()])
        tokens[rest] = pick_by_weight(values.softmax(-1), noise[rest])
    return tokens


def _filter(values: Tensor, params: RowParams, asked: np.ndarray, total: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """min_p, top_k and top_p on scaled logits [n, width]: whole rows, or their `width` highest tokens.

    Also returns bool [n]: would the whole row have kept the same tokens? It would if what is kept lies above the lowest
    candidate, for all others are at most as high as that one, and if the total that top_p compares with was right.
    total [n]: the weight of the whole row in units of its highest token, for top_p on candidates.
    """
    lowest, highest = values.aminmax(dim=-1)
    kept = values
    if (asked["min_p"] > 0).any():
        kept = apply_min_p(kept, params.min_p)
    if (asked["top_k"] > 0).any():
        kept = apply_top_k(kept, params.top_k, int(asked["top_k"].max()))
    is_exact = _lowest_kept(kept) > lowest
    if (asked["top_p"] < 1).any():
        outside = None
        if total is not None:
            inside = (values - highest[:, None]).exp().sum(-1)
            outside = (total - inside).clamp(min=0).masked_fill(is_exact, 0.0)
        is_exact |= (params.min_p == 0) & (params.top_k == 0)
        if kept.shape[1] <= _NUM_CANDIDATES:
            kept = apply_top_p(kept, params.top_p, outside)
        else:
            kept = apply_top_p_by_buckets(kept, params.top_p)
        is_exact &= _lowest_kept(kept) > lowest
    return kept, is_exact


def _lowest_kept(values: Tensor) -> Tensor:
    return values.masked_fill(values == MASKED, torch.inf).amin(-1)
