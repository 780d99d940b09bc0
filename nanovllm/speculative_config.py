"""SpeculativeConfig: how an engine guesses tokens ahead, checked when it is made (`LLM(speculative_config={...})`).

Owns vLLM's names for it, and which belong to which method; `engine/speculation/` makes drafts of it. Invariant: an
instance that exists names a method that is here, and all that the method needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.errors import brief
from nanovllm.options import check_fields, option, takes_options

MODEL_METHODS = ("draft_model", "eagle3", "dflash", "mtp")  # which guess with a model of their own, on the device
NAMED_METHODS = ("draft_model", "eagle3", "dflash")  # whose model is another checkpoint
METHODS = ("ngram", "suffix", "custom_class", *MODEL_METHODS)
_NOT_YET = ("eagle", "medusa", "mlp_speculator", "dflash2", "dspark", "xpress", "peagle")
MAX_DRAFT_TOKENS = 63
_FEW = 8  # requests that may have drafts in any case
_OF_METHOD = {
    "prompt_lookup_max": ("ngram",),
    "prompt_lookup_min": ("ngram",),
    "suffix_decoding_max_tree_depth": ("suffix",),
    "suffix_decoding_max_spec_factor": ("suffix",),
    "suffix_decoding_min_token_prob": ("suffix",),
    "proposer": ("custom_class",),
    "model": ("custom_class", *NAMED_METHODS),
    "revision": NAMED_METHODS,
}


def _read_method(method: Any) -> Any:
    if method == "[ngram]":  # vLLM's old name, which stood where the model's does
        return "ngram"
    if isinstance(method, str) and method.endswith("_mtp"):  # vLLM's older names, one for each family
        return "mtp"
    if method in _NOT_YET:
        raise NotImplementedError(
            f"speculative_config.method={method!r} is not supported; use {', '.join(map(repr, METHODS))}"
        )
    return method


@takes_options
@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Raises TypeError, ValueError or NotImplementedError that names the field.

    method: "ngram" (what followed the last tokens where they stood before), "suffix" (the same from all places, as far
        as they agree), "draft_model" (a smaller model with the same tokens), "eagle3" or "dflash" (a
        head in the format of the package speculators), "mtp" (the prediction head of the model's own checkpoint) or
        "custom_class" (a proposer of your own).
    num_speculative_tokens: most tokens that are guessed at once for one request.
    prompt_lookup_max: most tokens that are looked up; 5 if not given.
    prompt_lookup_min: fewest tokens that are looked up; 2 if not given.
    suffix_decoding_max_tree_depth: most tokens of context that are compared to tell places apart.
    suffix_decoding_max_spec_factor: most guessed tokens for each token of context that agrees.
    suffix_decoding_min_token_prob: a guess ends where its token is less likely than this, by what followed before.
    model: the draft model or head, as `LLM` takes one; of "custom_class" the proposer's class, "package.module.Class".
    revision: of the draft model, where that is a Hub name.
    proposer: of "custom_class" the proposer itself, in the place of `model`.
    disable_by_batch_size: with more running requests than this nothing is guessed.
    adaptive: guess only as much as pays, by measured step times and what was accepted so far; off,
        num_speculative_tokens in every step.
    """

    method: str = option(read=_read_method, choices=METHODS)
    num_speculative_tokens: int = option(low=1, high=MAX_DRAFT_TOKENS)
    prompt_lookup_max: int | None = option(None, low=1)
    prompt_lookup_min: int | None = option(None, low=1)
    suffix_decoding_max_tree_depth: int = option(24, low=2)
    suffix_decoding_max_spec_factor: float = option(1.0, above=0)
    suffix_decoding_min_token_prob: float = option(0.1, low=0, high=1)
    model: str | None = None
    revision: str | None = None
    proposer: Any = option(None, read=lambda proposer: proposer)
    disable_by_batch_size: int = option(64, low=1)
    adaptive: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "speculative_config.")
        defaults = {name: field.default for name, field in type(self).__dataclass_fields__.items()}
        for name, methods in _OF_METHOD.items():
            if getattr(self, name) is not defaults[name] and self.method not in methods:
                raise ValueError(
                    f"speculative_config.{name} is for method {' or '.join(map(repr, methods))}, and {self.method!r} "
                    "is given; leave it out"
                )
        shortest, longest = self.lookup_range
        if shortest > longest:
            raise ValueError(
                f"speculative_config.prompt_lookup_min ({shortest}) must be at most prompt_lookup_max ({longest})"
            )
        if self.method == "custom_class" and (self.model is None) == (self.proposer is None):
            raise ValueError(
                "speculative_config: method 'custom_class' needs either proposer=<an object with a method propose> or "
                "model='package.module.Class'"
            )
        if self.method in NAMED_METHODS and self.model is None:
            raise ValueError(f"speculative_config.model must name the model that drafts for method {self.method!r}")
        if self.proposer is not None and not callable(getattr(self.proposer, "propose", None)):
            raise TypeError(f"speculative_config.proposer must have a method propose, got {brief(self.proposer)}")

    @property
    def sizes(self) -> "SpeculativeConfig":
        """Who drafts is left out: all that a worker has to know of what the host drafts."""
        return SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=self.num_speculative_tokens,
            disable_by_batch_size=self.disable_by_batch_size,
        )

    @property
    def lookup_range(self) -> tuple[int, int]:
        """Fewest and most tokens that n-grams look up. As in vLLM, one that is given alone is both."""
        longest = self.prompt_lookup_max or self.prompt_lookup_min or 5
        return self.prompt_lookup_min or self.prompt_lookup_max or 2, longest


def num_unseen(config: SpeculativeConfig) -> int:
    """Most tokens that a model of `MODEL_METHODS` has not seen when its last draft was verified just before.

    A draft model has not computed the last token of its draft, nor what was drawn behind it; a head computes all that
    was accepted anew, by the target's states.
    """
    return 2 if config.method == "draft_model" else 1 + config.num_speculative_tokens


def num_draft_places(config: SpeculativeConfig | None) -> int:
    """Most tokens that a step computes of a request with a draft."""
    return 0 if config is None else 1 + config.num_speculative_tokens


def most_drafting(config: Any, has_states: bool) -> int:
    """config: a ResolvedConfig. With more running requests than this nothing is guessed: where layers keep states, so
    that those behind the tokens of drafts take about as much memory as those of all rows.
    """
    most: int = config.speculative_config.disable_by_batch_size
    if not has_states:
        return most
    return min(most, max(_FEW, config.max_num_seqs // num_draft_places(config.speculative_config)))


def num_draft_slots(config: Any) -> int:
    """config: a ResolvedConfig. Of a model with states, how many a step that verifies keeps until it is known which of
    them count: one behind each token of every request that may have a draft.
    """
    if config.speculative_config is None:
        return 0
    num_requests = min(config.max_num_seqs, most_drafting(config, has_states=True))
    return num_requests * num_draft_places(config.speculative_config)


def read_speculative_config(value: Any) -> SpeculativeConfig | None:
    """None for what asks for nothing."""
    if value is None or isinstance(value, SpeculativeConfig):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"speculative_config must be a dict, got {brief(value)}")
    if not value:
        return None
    given = dict(value)
    if given.get("model") in ("ngram", "[ngram]") and "method" not in given:
        given["method"] = given.pop("model")
    for name in ("method", "num_speculative_tokens"):
        if given.get(name) is None:
            raise ValueError(f"speculative_config needs {name!r}, got {brief(value)}")
    return SpeculativeConfig(**given)
