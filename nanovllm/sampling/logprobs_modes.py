"""Which numbers a request's log-probabilities are (`logprobs_mode`, as in vLLM), where they are not the plain ones.

    raw_logprobs         log-softmax of the logits as the model gives them: `Pipeline.logprobs` alone
    raw_logits           these logits
    processed_logprobs   log-softmax of the logits that the token was drawn from: edited (stages 1 to 7), divided by the
                         temperature, and -inf where min_p, top_k or top_p dropped a token; a greedy row is only edited
    processed_logits     these logits

Owns the last three. What edits made of a row's logits is there only while its token is drawn, so its numbers are kept
from then on to the end of the step. Invariant: the token that was drawn has a finite number.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.sampling.buckets import apply_top_p_by_buckets
from nanovllm.sampling.draw_columns import DrawColumns
from nanovllm.sampling.logits import apply_min_p, apply_temperature, apply_top_k
from nanovllm.sampling.logprobs import packed, rows_at_once, top_logprobs
from nanovllm.sampling.rows import SampledRows, upload

Packed = list[tuple[np.ndarray, Tensor]]  # as `Pipeline.logprobs` returns it


@dataclass
class LogprobsMode:
    """name: one of the last three. kept: numbers of rows whose logits were edited, by (row, position)."""

    name: str
    columns: DrawColumns

    def __post_init__(self) -> None:
        self._kept: dict[tuple[int, int], Tensor] = {}

    @property
    def is_processed(self) -> bool:
        return self.name.startswith("processed")

    def keep(self, edited: Tensor, tokens: Tensor, rows: SampledRows, asked: np.ndarray) -> None:
        """The numbers of rows [n] that have just been drawn from edited [n, V]; asked [n]: how many each wants."""
        if self.is_processed:
            for members, top in self._of(edited, tokens, rows, asked):
                for member, entry in zip(members.tolist(), top, strict=True):
                    self._kept[int(rows.rows_host[member]), int(rows.positions_host[member])] = entry

    def logprobs(self, logits: Tensor, tokens: Tensor, rows: SampledRows, asked: np.ndarray) -> Packed:
        """As `Pipeline.logprobs`; logits [n, V] as the model gave them. Called once, at the end of a step."""
        kept, self._kept = self._kept, {}
        keys = list(zip(rows.rows_host.tolist(), rows.positions_host.tolist(), strict=True))
        is_kept = np.array([key in kept for key in keys], dtype=bool)
        results: Packed = []
        for k in np.unique(asked[is_kept & (asked >= 0)]):
            members = np.flatnonzero(is_kept & (asked == k))
            results.append((members, torch.stack([kept[keys[member]] for member in members])))
        return results + self._of(logits, tokens, rows, np.where(is_kept, -1, asked))

    def _of(self, logits: Tensor, tokens: Tensor, rows: SampledRows, asked: np.ndarray) -> Packed:
        results: Packed = []
        for k in np.unique(asked[asked >= 0]):
            members = np.flatnonzero(asked == k)
            size = rows_at_once(logits.device, logits.shape[1], int(k))
            parts = []
            for start in range(0, len(members), size):
                part = members[start : start + size]
                index = upload(part, logits.device)
                chosen = self._processed(logits[index].float(), tokens[index].long(), rows.select(part))
                parts.append(packed(top_logprobs(chosen, tokens[index], int(k), self.name.endswith("logits"))))
            results.append((members, torch.cat(parts)))
        return results

    def _processed(self, logits: Tensor, tokens: Tensor, rows: SampledRows) -> Tensor:
        asked = self.columns.host[rows.rows_host]
        if not self.is_processed or (asked["temperature"] == 0).all():
            return logits
        params = self.columns.select(rows.rows.long())
        is_greedy = params.temperature == 0
        scaled = values = apply_temperature(logits, params.temperature.masked_fill(is_greedy, 1.0))
        if (asked["min_p"] > 0).any():
            values = apply_min_p(values, params.min_p.masked_fill(is_greedy, 0.0))
        if (asked["top_k"] > 0).any():
            values = apply_top_k(values, params.top_k.masked_fill(is_greedy, 0), int(asked["top_k"].max()))
        if (asked["top_p"] < 1).any():
            values = apply_top_p_by_buckets(values, params.top_p.masked_fill(is_greedy, 1.0))
        # The sampler finds the same tokens in other ways, which may round a boundary differently.
        return values if values is scaled else values.scatter(1, tokens[:, None], scaled.gather(1, tokens[:, None]))
