"""Sampler: the last logits of each request become its next token.

The order of the stages, as in vLLM:

    1. min_tokens    stop ids are masked while the output is too short         every row that asks
    2. greedy        argmax, the lowest id on a tie                            rows with temperature 0; done
       temperature   logits / temperature                                      all other rows
    3. min_p         drop tokens below min_p times the highest probability     rows that ask
    4. top_k         keep the k highest, with ties                             rows that ask
    5. top_p         keep the nucleus of what is left, at least one token      rows that ask
    6. draw          lowest id where the CDF exceeds uniform(seed, position)   all sampled rows

Owns the order and the choice of route; `logits.py` owns the arithmetic, `state.py` the parameters. On a GPU, stages 2
to 6 are `kernels/sample_triton.py`, which reads the parameters there. On a CPU the host mirrors say which rows need
what, so a stage that nobody asked for is not run. Invariant: a row's token depends on its logits, parameters, seed and
position alone, and so does the route to it.
"""

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
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
from nanovllm.sampling.philox import uniform
from nanovllm.sampling.state import RowParams, SamplingState, upload

_NUM_CANDIDATES = 128  # what the filters look at first; rows that keep more are filtered whole
_CHUNK = 2**21  # logits handled at a time: float32 temporaries then stay in the cache


class Sampler:
    def __init__(self, state: SamplingState) -> None:
        self._state = state

    def sample(self, logits: Tensor, rows_host: np.ndarray, rows: Tensor, positions: Tensor) -> Tensor:
        """Next tokens, int32 [n]. logits [n, V] of any float dtype, left unchanged; positions [n]: where the new tokens
        will stand; rows_host and rows, int32 [n]: the requests' rows, on the host and on the device.
        """
        asked = self._state.host[rows_host]
        if asked["min_length"].any():
            logits = self._hold_back_stop_ids(logits, rows_host, rows, positions)
        if use_triton(logits):
            self._state.upload()
            return self.sample_captured(logits, rows, positions)
        greedy = asked["temperature"] == 0
        filtered = ~greedy & _asks_for_a_filter(asked)
        tokens = torch.empty(len(rows_host), dtype=torch.int32)
        for members in (greedy, ~greedy & ~filtered, filtered):
            if members.all():
                tokens.copy_(self._pick(logits, asked, rows, positions))
            elif members.any():
                index = torch.from_numpy(np.flatnonzero(members))
                tokens[index] = self._pick(logits[index], asked[members], rows[index], positions[index]).int()
        return tokens

    def needs_host(self, rows_host: np.ndarray) -> bool:
        """Does any of these rows ask for min_tokens, which `sample_captured` does not do?"""
        return bool(self._state.host["min_length"][rows_host].any())

    def sample_captured(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """As `sample`, on a GPU and without the host, so that it can be captured in a CUDA graph; without min_tokens.

        Reads `SamplingState.columns` as last uploaded. rows, positions int32; a row of -1 is padding and gives token 0.
        """
        from nanovllm.kernels.sample_triton import sample_triton

        return sample_triton(logits, rows, positions, self._state.columns)

    def _hold_back_stop_ids(self, logits: Tensor, rows_host: np.ndarray, rows: Tensor, positions: Tensor) -> Tensor:
        pairs = [(i, stop_id) for i, row in enumerate(rows_host) for stop_id in self._state.stop_ids[row]]
        index, stop_ids = upload(np.array(pairs, dtype=np.int64), logits.device).unbind(1)
        too_short = positions[index] < self._state.select(rows[index]).min_length
        logits = logits.clone()
        logits[index, stop_ids] = logits[index, stop_ids].masked_fill(too_short, MASKED)
        return logits

    def _pick(self, logits: Tensor, asked: np.ndarray, rows: Tensor, positions: Tensor) -> Tensor:
        """Tokens of rows that are all greedy, all plain, or all filtered; on a CPU."""
        if asked["temperature"][0] == 0:
            return pick_highest(logits)
        params = self._state.select(rows)
        noise = uniform(params.seed, positions)
        size = max(1, _CHUNK // logits.shape[1])
        picked = []
        for start in range(0, len(logits), size):
            part = slice(start, start + size)
            scaled = apply_temperature(logits[part], params.temperature[part])
            picked.append(_draw(scaled, RowParams(*(column[part] for column in params)), asked[part], noise[part]))
        return torch.cat(picked)


def _asks_for_a_filter(asked: np.ndarray) -> np.ndarray:
    return (asked["min_p"] > 0) | (asked["top_k"] > 0) | (asked["top_p"] < 1)


def _draw(scaled: Tensor, params: RowParams, asked: np.ndarray, noise: Tensor) -> Tensor:
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
