"""InputProcessor: prompts and parameters in, checked Requests out.

Owns every check that depends on the model: token ids, lengths, stop tokens. Invariant: a Request that leaves here can
be run to its end, so nothing user-facing fails after it; nothing is queued here, so a bad item leaves nothing behind.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from nanovllm.engine.features.capture import Capture, check_layers
from nanovllm.engine.features.constraints import CompileConstraint, make_constraint
from nanovllm.engine.features.context_length import ContextRule
from nanovllm.engine.features.prompt_forms import check_dict, check_token_options, no_room, token_id_error, too_long
from nanovllm.engine.features.remote_functions import check_importable
from nanovllm.engine.features.scoring import Scoring, check_num_logprobs
from nanovllm.engine.interfaces import TokenConstraint
from nanovllm.engine.prompt_text import PromptText
from nanovllm.engine.request import Request
from nanovllm.engine.string_options import StringOptions
from nanovllm.errors import brief
from nanovllm.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(kw_only=True, eq=False)
class InputProcessor:
    """encode: as in `PromptText`. special_tokens: those that are left out of texts, with their ids.

    max_model_len: prompt and output together; num_cache_tokens: what the whole KV cache holds.
    eos_token_ids: each of them ends an output. length_dependent_from: keys of prompts longer than this depend on the
    prompt's length (dynamic RoPE scaling), so KV blocks are shared only among prompts of one length; None if they never
    do. long_from: contexts longer than this have keys of another kind (longrope); None if none have.
    max_logprobs: most log-probabilities of one token that a request may ask for; -1 allows all.
    has_logits_processors: the engine has some of its own, which run for every request. is_remote: requests are
    computed in other processes, where Python functions are found by name. compile_constraint: makes a new one for
    (params, ignore_eos); None without a tokenizer.
    """

    encode: Callable[..., list[int]] | None
    special_tokens: Mapping[str, int]
    vocab_size: int
    num_layers: int
    max_model_len: int
    num_cache_tokens: int
    eos_token_ids: Sequence[int]
    seed: int
    max_logprobs: int = -1
    length_dependent_from: int | None = None
    long_from: int | None = None
    has_logits_processors: bool = False
    is_remote: bool = False
    compile_constraint: CompileConstraint | None = None
    masks_come_late: bool = False  # see `features/constraints.py`

    def __post_init__(self) -> None:
        self.text = PromptText(self.encode, self.max_model_len)
        self._strings = StringOptions(self.text, self.special_tokens, self.vocab_size)
        self._contexts: ContextRule | None = None
        if self.length_dependent_from is not None or self.long_from is not None:
            self._contexts = ContextRule(self.length_dependent_from, self.long_from)

    def process(
        self, prompt: Prompt, params: SamplingParams, name: str, number: int, request_id: str | None = None
    ) -> list[Request]:
        """Raise ValueError or TypeError for `name` (say "prompts[3]"), or return requests that fit: `n` of one id.

        number: what the id and seed come from where none is given.
        """
        if not isinstance(params, SamplingParams):
            raise TypeError(f"{name}: sampling_params must be SamplingParams, got {type(params).__name__}")
        params = params.clone()  # the caller may assign to its own
        text, token_ids = self._read_prompt(prompt, name)
        max_total_tokens = self._fit(token_ids, params, name)
        self._check(params, name)
        stop_tokens = self._strings.read_stop(params, name) if params.stop else {}
        bad_words = self._strings.read_bad_words(params, name) if params.bad_words else ()
        constraints = [self.make_constraint(params, name) for _ in range(params.n)]
        uses_python = bool(params.logits_processors) or self.has_logits_processors
        needs_host_tokens = uses_python or any(len(word) > 1 for word in bad_words)
        eos = frozenset() if params.ignore_eos else frozenset(self.eos_token_ids)
        seed = self.request_seed(number) if params.seed is None else params.seed
        salt, context = b"", None
        if self._contexts is not None:
            salt, context = self._contexts.of_prompt(len(token_ids), max_total_tokens)
        # Of n sequences one scores the prompt, and the others may take its blocks.
        others = params if params.prompt_logprobs is None or params.n == 1 else replace(params, prompt_logprobs=None)
        requests = [
            Request(
                request_id=str(number) if request_id is None else request_id,
                index=index,
                prompt=text,
                token_ids=list(token_ids),
                num_prompt_tokens=len(token_ids),
                params=others if index else params,
                seed=(seed + index) % 2**64,
                stop_token_ids=eos | stop_tokens.keys() | frozenset(params.stop_token_ids or ()),
                stop_reasons={**stop_tokens, **dict.fromkeys(eos)},
                max_total_tokens=max_total_tokens,
                cache_salt=salt,
                bad_words=bad_words,
                needs_history=needs_host_tokens or params.has_penalties or params.prompt_logprobs is not None,
                needs_host_tokens=needs_host_tokens or (constraint is not None and not self.masks_come_late),
                constraint=constraint,
                context=copy(context),
                scoring=None if params.prompt_logprobs is None or index else Scoring(),
                capture=None if params.capture is None else Capture(params.capture["layers"]),
            )
            for index, constraint in enumerate(constraints)
        ]
        if params.n > 1:
            for request in requests:
                request.siblings = requests
        return requests

    def read_prompt(self, prompt: Prompt, name: str) -> list[int]:
        """Token ids of a prompt. Raises ValueError or TypeError that names it."""
        return self._read_prompt(prompt, name)[1]

    def make_constraint(self, params: SamplingParams, name: str) -> TokenConstraint | None:
        """A new constraint for one sequence, if its parameters ask for one. ValueError for `name` if it cannot be."""
        if params.structured_outputs is None:
            return None
        return make_constraint(self.compile_constraint, params.structured_outputs, params.ignore_eos, name)

    def _check(self, params: SamplingParams, name: str) -> None:
        """What of the parameters depends on the model or its engine."""
        if params.stop_token_ids or params.allowed_token_ids or params.logit_bias:
            check_token_options(params, self.vocab_size, name)
        if self.is_remote and params.logits_processors:
            check_importable(params.logits_processors, f"{name}: logits_processors")
        if params.capture is not None:
            check_layers(params.capture["layers"], self.num_layers, name)
        if self.max_logprobs >= 0:
            check_num_logprobs(params, self.max_logprobs, name)

    def _read_prompt(self, prompt: Prompt, name: str) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            check_dict(prompt, name)
            if "prompt_token_ids" in prompt:
                token_ids = self.check_token_ids(prompt["prompt_token_ids"], f"{name}['prompt_token_ids']")
                return prompt.get("prompt"), token_ids
            prompt, name = prompt["prompt"], f"{name}['prompt']"
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{name} is empty; give at least one character")
            token_ids = self.text.read(prompt, name)
            if not token_ids:
                raise ValueError(f"{name} {brief(prompt)} has no tokens; give at least one that the tokenizer knows")
            return prompt, self.check_token_ids(token_ids, name)  # a tokenizer may know more tokens than the model
        return None, self.check_token_ids(prompt, name)

    def check_token_ids(self, token_ids: Any, name: str) -> list[int]:
        is_raw = isinstance(token_ids, (str, bytes, bytearray, memoryview))
        if is_raw or not hasattr(token_ids, "__iter__"):
            raise TypeError(f"{name} must be a string or a list of token ids, got {type(token_ids).__name__}")
        if hasattr(token_ids, "__len__"):
            self._check_length(len(token_ids), name)  # before a copy is made
        token_ids = list(islice(token_ids, self.max_model_len + 1))
        if not token_ids:
            raise ValueError(f"{name} is empty; give at least one token id")
        try:
            values = np.frombuffer(array("q", token_ids), dtype=np.int64)  # all at once: half the time of one by one
            is_known = values.min() >= 0 and values.max() < self.vocab_size
            if is_known and not any(isinstance(token_ids[index], bool) for index in np.flatnonzero(values <= 1)):
                return values.tolist()
        except (TypeError, OverflowError):
            pass
        raise token_id_error(token_ids, self.vocab_size, name)

    def _fit(self, token_ids: list[int], params: SamplingParams, name: str) -> int:
        """Most tokens that prompt and output may have together; ValueError if not even one output token fits."""
        num_prompt = len(token_ids)
        self._check_length(num_prompt, name)
        if num_prompt >= self.num_cache_tokens:
            raise no_room(num_prompt, self.num_cache_tokens, name)
        limit = min(self.max_model_len, self.num_cache_tokens)
        return limit if params.max_tokens is None else min(limit, num_prompt + params.max_tokens)

    def _check_length(self, num_prompt: int, name: str) -> None:
        if num_prompt >= self.max_model_len:
            raise too_long(num_prompt, self.max_model_len, name)

    def request_seed(self, number: int) -> int:
        """What the request of that number draws with, if its parameters have no seed."""
        return int.from_bytes(blake2b(f"{self.seed}/{number}".encode(), digest_size=8).digest(), "little")
