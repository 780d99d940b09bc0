"""SamplingParams: what one request asks of the sampler, checked when it is made.

Owns the meaning and the bounds of every field (vLLM's names and meanings). Invariant: an instance that exists is valid
on its own; what depends on the model (vocabulary, lengths) is checked by `engine/input_processor.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from nanovllm.errors import reject_unknown_options
from nanovllm.options import check_fields, option, takes_options
from nanovllm.param_values import MOST_REPETITION, read_capture, read_form, read_logit_bias

if TYPE_CHECKING:
    from nanovllm.structured_outputs import StructuredOutputsParams

# (token ids of prompt and output so far, logits [vocab_size] float32) -> logits of the same shape
LogitsProcessor = Callable[[list[int], Any], Any]

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy, as in vLLM: dividing by them would overflow


class RequestOutputKind(Enum):
    """What the outputs of `LLM.step` hold."""

    CUMULATIVE = 0  # all output so far
    DELTA = 1  # what is new since the request's last output
    FINAL_ONLY = 2  # nothing before the end, then everything


@takes_options
@dataclass(kw_only=True, unsafe_hash=True)  # assigning a field changes the hash, and makes another request of it
class SamplingParams:
    """Parameters of one request. Raises TypeError for a wrong type or name and ValueError for a value out of range.

    A field may be assigned, with the same checks; requests that were queued before keep what they were queued with.

    n: sequences to generate for the prompt, which is computed once. The i-th draws with seed + i; greedy decoding gives
        n times the same, so it wants n = 1.
    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches p (Holtzman et al., 2020), in (0, 1].
    min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
    seed: the same seed gives the same tokens alone, in any batch and after a preemption; None takes one from the
        engine.
    max_tokens: at most this many output tokens; None runs up to the model length.
    min_tokens: no EOS and no stop token before this many output tokens.
    presence_penalty: taken off the logit of each token that stands in the output; in [-2, 2].
    frequency_penalty: taken off the logit of a token for each time that it stands in the output; in [-2, 2].
    repetition_penalty: positive logits of tokens that stand in prompt or output are divided by it, others multiplied
        (Keskar et al., 2019); in [0.001, 1000], 1 is off.
    logit_bias: token id -> what is added to its logit; in [-1e30, 1e30].
    allowed_token_ids: no other token can be drawn.
    bad_words: words that the output never holds; each is held back at its last token, with and without a space before.
    logits_processors: functions (token ids of prompt and output so far, logits [vocab_size] float32) -> logits, run in
        turn. They need each token on the host, so the request is planned every other step where steps overlap. One that
        raises, or returns anything but numbers of that shape, ends its request with finish_reason "error".
    logprobs: log-probabilities of each output token and of the most likely so many, over the whole vocabulary and
        before any of the above; -1 gives all tokens', 0 the drawn ones' alone.
    prompt_logprobs: the same for each prompt token; the request then computes its whole prompt, also where the prefix
        cache holds it.
    structured_outputs: a form that the output must have; needs the extra `structured`. The request is planned every
        other step where steps overlap, and ends as soon as nothing but EOS could follow.
    stop: strings that end the output; the text is cut before them.
    stop_token_ids: tokens that end the output.
    ignore_eos: go on past the model's end-of-sequence tokens.
    include_stop_str_in_output: cut the text after the stop string instead; a stop token's text stays in, too.
    skip_special_tokens: leave special tokens out of the text.
    spaces_between_special_tokens: where special tokens are not left out, False puts no space between two of them.
    detokenize: False leaves `text` empty.
    capture: {"layers": [...]} returns the hidden states behind these decoder layers (0 is the first, -1 the last,
        "norm" the model's last norm) for each token of prompt and output but the last, when the request ends. Its whole
        prompt is computed, also where the prefix cache holds it.
    output_kind: what `LLM.step` returns of this request; `LLM.generate` returns all, `LLM.stream` what is new.
    """

    # No flags for what no flag can hold, and for what the commands decide: they print one text for each prompt, as it
    # comes, and the engine's --seed makes a run reproducible.
    n: int = option(1, low=1, high=16_384, has_flag=False)  # vLLM's bound
    temperature: float = option(1.0, low=0, words="0 (greedy) or more")
    top_k: int = option(0, low=-1, words="0 or -1 (all tokens) or at least 1")
    top_p: float = option(1.0, above=0, high=1)
    min_p: float = option(0.0, low=0, high=1)
    seed: int | None = option(None, low=-(2**63), high=2**64 - 1, words="an integer of 64 bits", has_flag=False)
    max_tokens: int | None = option(16, low=1)
    min_tokens: int = option(0, low=0, high=2**31 - 1)
    presence_penalty: float = option(0.0, low=-2, high=2)
    frequency_penalty: float = option(0.0, low=-2, high=2)
    repetition_penalty: float = option(1.0, low=1e-3, high=MOST_REPETITION, words="in [0.001, 1000] (1 is off)")
    logit_bias: Mapping[int, float] | None = option(None, read=read_logit_bias, hash=False, has_flag=False)
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | None = None
    logits_processors: tuple[LogitsProcessor, ...] | list[LogitsProcessor] | None = option(None, has_flag=False)
    logprobs: int | None = option(None, low=-1, words="-1 (the whole vocabulary), 0 or more", has_flag=False)
    prompt_logprobs: int | None = option(None, low=-1, words="-1 (the whole vocabulary), 0 or more", has_flag=False)
    structured_outputs: "StructuredOutputsParams | None" = option(None, read=read_form, has_flag=False)
    stop: tuple[str, ...] | list[str] | str | None = option(
        (), read=lambda stop: (stop,) if isinstance(stop, str) else () if stop is None else stop
    )
    stop_token_ids: tuple[int, ...] | list[int] | None = option((), read=lambda ids: () if ids is None else ids)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = option(True, has_flag=False)
    capture: Mapping[str, Any] | None = option(None, read=read_capture, hash=False, has_flag=False)
    output_kind: RequestOutputKind = option(RequestOutputKind.CUMULATIVE, has_flag=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n must be 1 with temperature={self.temperature} (greedy), got {self.n}: all outputs would be equal"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be in [0, max_tokens={self.max_tokens}], got {self.min_tokens}")
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids is empty, so no token could be drawn; give one, or None to allow all")
        for word in self.bad_words or ():
            if not word.strip():
                raise ValueError(f"bad_words must not hold an empty string, got {word!r}")
        if "" in (self.stop or ()):
            raise ValueError("stop must not hold an empty string: it would end every output at once")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop strings {self.stop!r} need the text: set detokenize=True or use stop_token_ids")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):  # all are, once it is made
            vars(self).update(vars(replace(self, **{name: value})))
        elif name in self.__dataclass_fields__:
            object.__setattr__(self, name, value)
        else:
            reject_unknown_options("SamplingParams", [name], self.__dataclass_fields__)

    @property
    def __struct_fields__(self) -> tuple[str, ...]:
        """The names of all fields, where programs that copy vLLM's parameters look for them."""
        return tuple(self.__dataclass_fields__)

    def clone(self) -> "SamplingParams":
        """A copy of its own, to assign to."""
        copy = object.__new__(type(self))
        vars(copy).update(vars(self))
        return copy

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def edits_logits(self) -> bool:
        """Is there anything that `sampling/stages/` does to the logits before a token is drawn?"""
        options = self.logit_bias, self.allowed_token_ids, self.bad_words, self.min_tokens, self.logits_processors
        return self.has_penalties or self.structured_outputs is not None or any(options)

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)
