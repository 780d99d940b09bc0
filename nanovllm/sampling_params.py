"""SamplingParams: what one request asks of the sampler, checked when it is made.

Owns the meaning and the bounds of every field (vLLM's names and meanings). Invariant: an instance that exists is valid
on its own; what depends on the model (vocabulary, lengths) is checked by `engine/input_processor.py`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from types import NoneType
from typing import Any

from nanovllm.errors import reject_unknown_options

# (token ids of prompt and output so far, logits [vocab_size] float32) -> logits of the same shape
LogitsProcessor = Callable[[list[int], Any], Any]

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy, as in vLLM: dividing by them would overflow
MAX_N = 16_384  # sequences of one prompt; vLLM's bound


class RequestOutputKind(Enum):
    """What the outputs of `LLM.step` hold."""

    CUMULATIVE = 0  # all output so far
    DELTA = 1  # what is new since the request's last output
    FINAL_ONLY = 2  # nothing before the end, then everything


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """A form that the output must have: exactly one of these. Raises TypeError or ValueError that names the field.

    json: a JSON schema as a dict or text, or a pydantic model class; kept as text.
    regex: a regular expression that the whole output matches. choice: the output is one of these strings.
    grammar: a context-free grammar, in Lark's notation or (with "::=") in GBNF.
    """

    json: str | Mapping[str, Any] | type | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None

    def __new__(cls, *args: object, **options: object) -> "StructuredOutputsParams":
        reject_unknown_options("StructuredOutputsParams", options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            raise ValueError(f"structured_outputs needs one of json, regex, choice and grammar, got {given or 'none'}")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if not isinstance(value, (str, NoneType)):
                raise TypeError(f"structured_outputs.{name} must be a string, got {value!r}")
        if self.json is not None:
            object.__setattr__(self, "json", _read_schema(self.json))
        if self.choice is not None:
            if not isinstance(self.choice, (list, tuple)):
                raise TypeError(f"structured_outputs.choice must be a list of strings, got {self.choice!r}")
            for text in self.choice:
                if not isinstance(text, str):
                    raise TypeError(f"structured_outputs.choice must hold strings, got {text!r}")
            if not self.choice or not all(self.choice):
                raise ValueError(
                    f"structured_outputs.choice must hold one or more strings, none of them empty, got {self.choice!r}"
                )
            object.__setattr__(self, "choice", tuple(self.choice))

    @property
    def kind(self) -> tuple[str, Any]:
        """The field that is set, and its value."""
        return next((field.name, value) for field in fields(self) if (value := getattr(self, field.name)) is not None)


def _read_schema(schema: Any) -> str:
    """JSON text of a schema in any of its forms. A pydantic model is known by its method: nothing is imported."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"structured_outputs.json is no JSON ({error}): {schema!r}") from error
        return schema
    if not isinstance(schema, Mapping):
        raise TypeError(
            f"structured_outputs.json must be a schema (dict or JSON text) or a pydantic model, got {schema!r}"
        )
    try:
        return json.dumps(dict(schema))
    except TypeError as error:
        raise TypeError(f"structured_outputs.json holds what is no JSON: {error}") from error


def _read_capture(capture: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(capture, Mapping):
        raise TypeError(f"capture must be a dict like {{'layers': [0, 5]}}, got {capture!r}")
    reject_unknown_options("capture", capture, ["layers"])
    layers = capture.get("layers")
    if not isinstance(layers, (list, tuple)) or not all(_is_integer(layer) for layer in layers):
        raise TypeError(f"capture['layers'] must be a list of integers, got {layers!r}")
    if not layers:
        raise ValueError("capture['layers'] is empty; name a layer, or leave capture out")
    return {"layers": tuple(dict.fromkeys(layers))}


_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request. Raises TypeError for a wrong type or name and ValueError for a value out of range.

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
    presence_penalty, frequency_penalty: taken off the logit of each token that stands in the output, once, and once for
        each time it stands there; in [-2, 2].
    repetition_penalty: positive logits of tokens that stand in prompt or output are divided by it, others multiplied
        (Keskar et al., 2019); above 0, 1 is off.
    logit_bias: token id -> what is added to its logit. allowed_token_ids: no other token can be drawn.
    bad_words: words that the output never holds; each is held back at its last token, with and without a space before.
    logits_processors: functions (token ids of prompt and output so far, logits [vocab_size] float32) -> logits, run in
        turn. They need each token on the host, so the request is planned every other step where steps overlap.
    logprobs: log-probabilities of each output token and of the most likely so many, over the whole vocabulary and
        before any of the above; -1 gives all tokens', 0 the drawn ones' alone. prompt_logprobs: the same for each
        prompt token; the request then computes its whole prompt, also where the prefix cache holds it.
    structured_outputs: a form that the output must have; needs the extra `structured`. The request is planned every
        other step where steps overlap, and ends as soon as nothing but EOS could follow.
    stop: strings that end the output; the text is cut before them. stop_token_ids: tokens that end it.
    ignore_eos: go on past the model's end-of-sequence tokens.
    include_stop_str_in_output: cut the text after the stop string instead; a stop token's text stays in, too.
    skip_special_tokens: leave special tokens out of the text. spaces_between_special_tokens: where they are not left
        out, False puts no space between two of them. detokenize: False leaves `text` empty.
    capture: {"layers": [...]} returns the hidden states behind these decoder layers (0 is the first, -1 the last) for
        each token of prompt and output but the last, when the request ends. Its whole prompt is computed, also where
        the prefix cache holds it.
    output_kind: what `LLM.step` returns of this request; `LLM.generate` returns all, `LLM.stream` what is new.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | None = None
    logits_processors: tuple[LogitsProcessor, ...] | list[LogitsProcessor] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    capture: Mapping[str, Any] | None = field(default=None, hash=False)
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __new__(cls, *args: object, **options: object) -> "SamplingParams":
        reject_unknown_options("SamplingParams", options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name in ("n", "top_k", "min_tokens", "max_tokens", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is None and name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        for name in (
            "ignore_eos",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "detokenize",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")
        if not isinstance(self.structured_outputs, (StructuredOutputsParams, NoneType)):
            raise TypeError(f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r}")
        if self.capture is not None:
            object.__setattr__(self, "capture", _read_capture(self.capture))
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 1 <= self.n <= MAX_N:
            raise ValueError(f"n must be in [1, {MAX_N}], got {self.n}")
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n must be 1 with temperature={self.temperature} (greedy), got {self.n}: all outputs would be equal"
            )
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
        self._check_edits()
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

    def _check_edits(self) -> None:
        """What edits single logits, and log-probabilities. Sequences become tuples, logit_bias a dict of its own."""
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must be in [-2, 2], got {getattr(self, name)}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) < -1:
                raise ValueError(f"{name} must be -1 (the whole vocabulary), 0 or more, got {getattr(self, name)}")
        for name, is_member, kind in (
            ("allowed_token_ids", _is_integer, "integers"),
            ("bad_words", lambda item: isinstance(item, str), "strings"),
            ("logits_processors", callable, "functions (token_ids, logits) -> logits"),
        ):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple, NoneType)):
                raise TypeError(f"{name} must be a list, got {value!r}")
            for item in value or ():
                if not is_member(item):
                    raise TypeError(f"{name} must hold {kind}, got {item!r}")
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids is empty, so no token could be drawn; give one, or None to allow all")
        for word in self.bad_words or ():
            if not word.strip():
                raise ValueError(f"bad_words must not hold an empty string, got {word!r}")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise TypeError(f"logit_bias must be a dict of token ids to numbers, got {self.logit_bias!r}")
            for token_id, bias in self.logit_bias.items():
                if not _is_integer(token_id):
                    raise TypeError(f"logit_bias must have token ids as keys, got {token_id!r}")
                if isinstance(bias, bool) or not isinstance(bias, (int, float)):
                    raise TypeError(f"logit_bias[{token_id}] must be a number, got {bias!r}")
                if not math.isfinite(bias):
                    raise ValueError(
                        f"logit_bias[{token_id}] must be finite, got {bias}; allowed_token_ids or bad_words rule out"
                    )
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Parameters of `LLM.beam_search`. Raises TypeError for a wrong type or name and ValueError out of range.

    beam_width: sequences that are kept at a time, and returned. max_tokens: at most this many output tokens.
    ignore_eos: go on past the model's end-of-sequence tokens.
    temperature: logits are divided by it; 0 and 1 leave them as they are.
    length_penalty: sequences are compared by their log-probability divided by this power of their length, prompt
        included; above 0 it favours long ones.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __new__(cls, *args: object, **options: object) -> "BeamSearchParams":
        reject_unknown_options("BeamSearchParams", options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not _is_integer(value):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        for name in ("temperature", "length_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
