"""Proposers: who guesses a request's next tokens on the host.

Owns the interface, which a user's own proposer has as well, and the choice by method. Invariant: whatever a proposer
says, only tokens of the vocabulary become drafts; one that fails is asked no more, and requests go on without.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

from nanovllm.engine.request import Request
from nanovllm.engine.speculation.lookup import NGrams, Suffixes
from nanovllm.errors import brief
from nanovllm.speculative_config import SpeculativeConfig


class Proposer(Protocol):
    """What guesses tokens for `LLM(speculative_config={"method": "custom_class", "proposer": ...})`."""

    def propose(self, token_ids: Sequence[int], num_tokens: int) -> Sequence[int]:
        """Up to num_tokens tokens that may follow; none where there is no guess.

        token_ids: all of a request's so far, prompt and output; not to be changed. A wrong guess costs a little time,
        and changes no output.
        """
        ...


class Proposals:
    """Drafts of an engine's requests. make: a proposer for one request, or the same one for all."""

    def __init__(self, make: Callable[[], Proposer], vocab_size: int) -> None:
        self._make = make
        self._vocab_size = vocab_size
        self._of_request: dict[Request, Proposer] = {}
        self._has_failed = False

    def propose(self, request: Request, num_tokens: int) -> list[int]:
        """A draft behind all tokens of the request, which the host knows."""
        if self._has_failed or num_tokens < 1:
            return []
        proposer = self._of_request.get(request)
        if proposer is None:
            proposer = self._of_request[request] = self._make()
        try:
            return self._checked(proposer.propose(request.token_ids, num_tokens), num_tokens)
        except Exception as error:
            self._has_failed = True
            warnings.warn(
                f"the proposer {brief(proposer)} failed, and nothing is drafted from here on: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return []

    def _checked(self, draft: Sequence[int], num_tokens: int) -> list[int]:
        """Its beginning, up to the first thing that is no token of the model's."""
        checked: list[int] = []
        for token_id in list(draft)[:num_tokens]:
            if isinstance(token_id, bool) or not 0 <= int(token_id) < self._vocab_size:
                break
            checked.append(int(token_id))
        return checked

    def forget(self, request: Request) -> None:
        self._of_request.pop(request, None)

    def clear(self) -> None:
        self._of_request.clear()


def make_proposals(config: SpeculativeConfig, vocab_size: int) -> Proposals:
    """Raises ValueError or TypeError for a class that cannot be found or made."""
    return Proposals(_maker(config), vocab_size)


def _maker(config: SpeculativeConfig) -> Callable[[], Proposer]:
    if config.method == "ngram":
        shortest, longest = config.lookup_range
        return lambda: NGrams(shortest, longest)
    if config.method == "suffix":
        longest, factor = config.suffix_decoding_max_tree_depth, config.suffix_decoding_max_spec_factor
        return lambda: Suffixes(longest, factor, config.suffix_decoding_min_token_prob)
    proposer: Any = config.proposer
    if proposer is None:
        proposer = _load_class(config.model or "")(config)
    return lambda: proposer


def _load_class(path: str) -> Callable[[SpeculativeConfig], Proposer]:
    """path: "package.module.Class", of a class that is made with the SpeculativeConfig."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"speculative_config.model={path!r} is no class that can be imported ({error}); give 'package.module.Class'"
        ) from error
    if not callable(getattr(found, "propose", None)):
        raise TypeError(f"speculative_config.model={path!r} must be a class with a method propose")
    return found
