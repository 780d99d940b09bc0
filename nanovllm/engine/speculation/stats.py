"""SpeculationStats: what an engine counts of its drafts, under vLLM's names.

Owns the counters. Invariant: they only rise.
"""

from dataclasses import asdict, dataclass, field

from nanovllm.engine.metrics import SchedulerStats


@dataclass(slots=True)
class SpeculationStats(SchedulerStats):
    """A draft is what one request brings into one step. accepted_per_position: of as many as a draft may have."""

    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def counters(self) -> dict[str, float]:
        counts = asdict(self)
        for position, count in enumerate(counts.pop("accepted_per_position")):
            counts[f"spec_decode_num_accepted_tokens_per_pos_{position}"] = count
        return counts

    def count_draft(self, num_drafted: int, num_accepted: int) -> None:
        self.spec_decode_num_drafts += 1
        self.spec_decode_num_draft_tokens += num_drafted
        self.spec_decode_num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            self.accepted_per_position[position] += 1
