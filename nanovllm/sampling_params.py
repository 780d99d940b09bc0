"""SamplingParams: what one request asks of the sampler, checked when it is made.

Owns the meaning and the bounds of every field (vLLM's names and meanings). Invariant: an instance that exists is valid
on its own; what depends on the model (vocabulary, lengths) is checked by `engine/input_processor.py`.
"""

import math
from dataclasses import dataclass, fields
from types import NoneType

from nanovllm.errors import reject_unknown_options

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy, as in vLLM: dividing by them would overflow


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request. Raises TypeError for a wrong type or name and ValueError for a value out of range.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches p (Holtzman et al., 2020), in (0, 1].
    min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
    seed: the same seed gives the same tokens alone, in any batch and after a preemption; None takes one from the
        engine.
    max_tokens: at most this many output tokens; None runs up to the model length.
    min_tokens: no EOS and no stop token before this many output tokens.
    stop: strings that end the output; the text is cut before them. stop_token_ids: tokens that end it.
    ignore_eos: go on past the model's end-of-sequence tokens.
    skip_special_tokens: leave special tokens out of the text. detokenize: False leaves `text` empty.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __new__(cls, *args: object, **options: object) -> "SamplingParams":
        reject_unknown_options("SamplingParams", options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name in ("top_k", "min_tokens", "max_tokens", "seed"):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        for name in ("ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < -1:
            raise ValueError(f"top_k must be 0 or -1 (all tokens) or at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise ValueError(f"min_tokens must be in [0, max_tokens={self.max_tokens}], got {self.min_tokens}")
        for name in ("stop", "stop_token_ids"):
            if not isinstance(getattr(self, name), (str, list, tuple, NoneType)):
                raise TypeError(f"{name} must be a list, got {getattr(self, name)!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for text in stop:
            if not isinstance(text, str):
                raise TypeError(f"stop must hold strings, got {text!r}")
            if not text:
                raise ValueError("stop must not hold an empty string: it would end every output at once")
        if stop and not self.detokenize:
            raise ValueError(f"stop strings {stop!r} need the text: set detokenize=True or use stop_token_ids")
        stop_token_ids = tuple(self.stop_token_ids or ())
        for token_id in stop_token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise TypeError(f"stop_token_ids must hold integers, got {token_id!r}")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON
