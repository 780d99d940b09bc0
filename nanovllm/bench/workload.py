"""Workloads: lists of random prompts with the number of output tokens each must get.

Owns their definition, so that a figure can be repeated elsewhere. Invariant: a workload depends on its arguments only,
and `variant(n)` has the same lengths with other tokens, so that no run finds another run's prompts in a prefix cache.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

_TOKEN_IDS = 10001  # the named workloads draw from 0..10000


@dataclass(frozen=True)
class Workload:
    """prompts: token ids; max_tokens: per prompt, and every prompt gets exactly that many (EOS is ignored)."""

    name: str
    prompts: list[list[int]]
    max_tokens: list[int]
    temperature: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.max_tokens)

    @property
    def max_model_len(self) -> int:
        """The shortest model length in which every request fits."""
        return max(len(prompt) + count for prompt, count in zip(self.prompts, self.max_tokens, strict=True))

    def variant(self, number: int, vocab_size: int) -> "Workload":
        """The same lengths with every token id shifted; number 0 is the workload itself, folded into the vocabulary."""
        size = min(vocab_size, _TOKEN_IDS)
        return replace(self, prompts=[[(token + 37 * number) % size for token in prompt] for prompt in self.prompts])

    def with_max_tokens(self, count: int) -> "Workload":
        return replace(self, max_tokens=[count] * len(self.prompts))


def uniform(num_prompts: int, input_len: int, output_len: int, *, mixed: bool = False) -> Workload:
    """`num_prompts` prompts of `input_len` tokens; mixed: lengths from a quarter of the given ones up to all of it.

    Raises ValueError for a number below 1.
    """
    for name, value in (("number of prompts", num_prompts), ("input-len", input_len), ("output-len", output_len)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rng = random.Random(0)

    def length(longest: int) -> int:
        return rng.randint(max(1, longest // 4), longest) if mixed else longest

    prompts = [_random_prompt(rng, length(input_len)) for _ in range(num_prompts)]
    name = f"{num_prompts} x {'up to ' if mixed else ''}{input_len}+{output_len}"
    return Workload(name, prompts, [length(output_len) for _ in range(num_prompts)])


def named(name: str) -> Workload:
    """One of NAMED."""
    return NAMED[name]()


def _offline(name: str, num_prompts: int, seed: int) -> Workload:
    # The order of draws is part of the definition: first every prompt with its length, then every output length.
    rng = random.Random(seed)
    prompts = [_random_prompt(rng, rng.randint(100, 1024)) for _ in range(num_prompts)]
    return Workload(name, prompts, [rng.randint(100, 1024) for _ in range(num_prompts)], temperature=0.6)


def _prefill() -> Workload:
    return replace(uniform(32, 2048, 1), name="prefill")


def _random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randint(0, _TOKEN_IDS - 1) for _ in range(length)]


NAMED: Mapping[str, Callable[[], Workload]] = {
    "offline": lambda: _offline("offline", 256, seed=0),
    "offline_1024": lambda: _offline("offline_1024", 1024, seed=9),
    "prefill": _prefill,
}
