"""Vectors for texts: the hidden states behind the model's last norm, made one. The requests behind `LLM.embed`.

Owns the pooling. The states come as `capture` brings them; the one token that each request also draws is looked at by
nobody. Invariant: a text's vector does not depend on what else runs, and states are let go as soon as it is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.engine.features.capture import Capture
from nanovllm.engine.request import Request
from nanovllm.engine.session import Handle, Inbox, Session
from nanovllm.errors import brief
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=1, detokenize=False, capture={"layers": ["norm"]})


@dataclass(kw_only=True)
class EmbeddingOutput:
    """embedding: hidden_size numbers, or as many as `dimensions` says."""

    embedding: list[float]


@dataclass(kw_only=True)
class EmbeddingRequestOutput:
    """One text and its vector (vLLM's names)."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How a text's states [tokens, hidden_size] become one vector. Raises ValueError for values that mean nothing.

    kind: "last" takes the last token's, "mean" the mean of all. dimensions: the first so many numbers of it.
    is_normalized: divided by its length, after that.
    """

    kind: str = "last"
    is_normalized: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("last", "mean"):
            raise ValueError(f"pooling must be 'last' or 'mean', got {brief(self.kind)}")
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, got {self.dimensions}")

    def check(self, hidden_size: int) -> None:
        if self.dimensions is not None and self.dimensions > hidden_size:
            raise ValueError(f"dimensions is {self.dimensions}, and this model's vectors have {hidden_size}")

    def vector(self, states: Tensor) -> list[float]:
        pooled = (states[-1] if self.kind == "last" else states.float().mean(0)).float()[: self.dimensions]
        if self.is_normalized:
            pooled = torch.nn.functional.normalize(pooled, dim=0)
        result: list[float] = pooled.tolist()
        return result


def embed(session: Session, groups: Sequence[Sequence[Request]], pooling: Pooling) -> list[EmbeddingRequestOutput]:
    """groups: one request with PARAMS for each text, checked and not queued."""

    def make(group: Sequence[Request]) -> list[Tensor]:
        return _capture_of(group[0]).by_layer()["norm"]

    inbox = Inbox(make)
    handles = [Handle(group, inbox, only_ends=True) for group in groups]
    vectors: dict[Handle, list[float]] = {}
    for handle, parts in session.run(handles, inbox):
        vectors[handle] = pooling.vector(torch.cat(parts))
        _capture_of(handle.requests[0]).states.clear()
    return [
        EmbeddingRequestOutput(
            request_id=handle.request_id,
            outputs=EmbeddingOutput(embedding=vectors[handle]),
            prompt_token_ids=handle.requests[0].token_ids[: handle.requests[0].num_prompt_tokens],
        )
        for handle in handles
    ]


def _capture_of(request: Request) -> Capture:
    """Of a request with PARAMS."""
    assert request.capture is not None
    return request.capture


def join_hidden_states(output: RequestOutput) -> RequestOutput:
    """What `capture` brought in parts, as one float32 tensor a layer."""
    for completion in output.outputs:
        if completion.hidden_states is not None:
            parts = completion.hidden_states
            completion.hidden_states = {layer: torch.cat(parts[layer]).float() for layer in parts}
    return output
