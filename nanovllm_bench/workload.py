"""Workloads: lists of random prompts with the number of output tokens each must get.

    offline        256 prompts of 100 to 1024 tokens, 100 to 1024 output tokens each, temperature 0.6
    offline_1024   the same with 1024 prompts
    shared_prefix  512 prompts: 2048 tokens in common, which are in the prefix cache, and 64 own; 128 output tokens
    prefill        32 prompts of 2048 tokens, 1 output token
    decode_B       B prompts of 128 tokens, 512 output tokens: (time for all - time for the first) / 511 is a step
    ttft           1 prompt of 128 tokens, 1 output token: the time to the first token of an idle engine
    long_prompts   8 prompts of 32,768 tokens, 1 output token
    context_N      1 prompt of N tokens, 512 output tokens: a step of a single request with a long context
    groups         32 prompts of 1,024 tokens, n = 16, 512 output tokens
    two_levels     256 prompts: 1,024 tokens in common, one of 16 documents of 2,048, 32 own; 128 output tokens

Of 256 prompts of 100 to 1,024 tokens with 200 output tokens, what is asked beside plain tokens costs:

    generate_256   nothing is asked              logprobs_256   logprobs=1
    stream_256     outputs as they come          penalty_256    presence_penalty=0.5
    bias_256       logit_bias of a token         grammar_256    structured_outputs: lower-case letters

Owns their definition, so that a figure can be repeated elsewhere. Invariant: a workload depends on its arguments only,
and `variant(n)` has the same lengths with other tokens, so that no run finds another run's prompts in a prefix cache.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nanovllm.structured_outputs import StructuredOutputsParams

_TOKEN_IDS = 10001  # the named workloads draw from 0..10000


@dataclass(frozen=True)
class Workload:
    """prompts: token ids; max_tokens: per prompt, and every prompt gets exactly that many (EOS is ignored).

    prefix: the beginning that all prompts share, which is to be in the prefix cache when the clock starts. n: outputs
    of each prompt. asks: further fields of SamplingParams. streams: outputs are read as they come.
    """

    name: str
    prompts: list[list[int]]
    max_tokens: list[int]
    temperature: float = 0.0
    prefix: list[int] = field(default_factory=list)
    n: int = 1
    asks: dict[str, Any] = field(default_factory=dict)
    streams: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return self.n * sum(self.max_tokens)

    @property
    def is_plain(self) -> bool:
        """Does it ask for no more than every engine offers?"""
        return self.n == 1 and not self.asks and not self.streams

    @property
    def is_prefill(self) -> bool:
        """Does it end with the first token?"""
        return max(self.max_tokens) == 1

    @property
    def is_latency(self) -> bool:
        """Is it about the time of a step, or of the first token of a single request?"""
        return self.name.startswith(("decode_", "context_", "ttft"))

    @property
    def max_model_len(self) -> int:
        """The shortest model length in which every request fits."""
        return max(len(prompt) + count for prompt, count in zip(self.prompts, self.max_tokens, strict=True))

    def variant(self, number: int, vocab_size: int) -> "Workload":
        """The same lengths with every token id shifted; number 0 is the workload itself, folded into the vocabulary."""
        size = min(vocab_size, _TOKEN_IDS)

        def shifted(tokens: list[int]) -> list[int]:
            return [(token + 37 * number) % size for token in tokens]

        return replace(self, prompts=[shifted(prompt) for prompt in self.prompts], prefix=shifted(self.prefix))

    def with_max_tokens(self, count: int) -> "Workload":
        return replace(self, max_tokens=[count] * len(self.prompts))

    def at_most(self, count: int) -> "Workload":
        """The same with outputs cut to `count` tokens."""
        return replace(self, max_tokens=[min(count, own) for own in self.max_tokens])


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


def shared_prefix(num_prompts: int, prefix_len: int, input_len: int, output_len: int) -> Workload:
    """Prompts with a common beginning of `prefix_len` tokens and `input_len` tokens of their own."""
    own = uniform(num_prompts, input_len, output_len)
    if prefix_len < 1:
        raise ValueError(f"prefix-len must be at least 1, got {prefix_len}")
    prefix = _random_prompt(random.Random(1), prefix_len)
    name = f"{num_prompts} x ({prefix_len} shared + {input_len})+{output_len}"
    return replace(own, name=name, prompts=[prefix + prompt for prompt in own.prompts], prefix=prefix)


def named(name: str) -> Workload:
    """A workload by its name above. Raises ValueError for another name."""
    if name in _NAMED:
        return replace(_NAMED[name](), name=name)
    kind, _, count = name.partition("_")
    if kind in ("decode", "context") and count.isdecimal() and int(count):
        return replace(uniform(int(count), 128, 512) if kind == "decode" else uniform(1, int(count), 512), name=name)
    raise ValueError(
        f"there is no workload {name!r}; there are {', '.join(_NAMED)}, decode_N for N prompts and context_N for one "
        "of N tokens"
    )


def check_counts(name: str, workload: Workload, counts: list[int]) -> None:
    """Raises RuntimeError where the engine of this name made other numbers of tokens than the workload asks for."""
    if counts != [count for count in workload.max_tokens for _ in range(workload.n)]:
        raise RuntimeError(f"{name} made {sum(counts)} tokens where the workload asks for {workload.num_output_tokens}")


def _offline(num_prompts: int, seed: int) -> Workload:
    # The order of draws is part of the definition: first every prompt with its length, then every output length.
    rng = random.Random(seed)
    prompts = [_random_prompt(rng, rng.randint(100, 1024)) for _ in range(num_prompts)]
    return Workload("", prompts, [rng.randint(100, 1024) for _ in range(num_prompts)], temperature=0.6)


def _two_levels() -> Workload:
    rng = random.Random(2)
    system, documents = _random_prompt(rng, 1024), [_random_prompt(rng, 2048) for _ in range(16)]
    prompts = [system + documents[i // 16] + _random_prompt(rng, 32) for i in range(256)]
    return Workload("", prompts, [128] * 256, temperature=0.6)


def _asking(streams: bool = False, **asks: Any) -> Workload:
    plain = _offline(256, seed=3)
    return replace(plain, max_tokens=[200] * len(plain.prompts), streams=streams, asks=asks)


def _random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randint(0, _TOKEN_IDS - 1) for _ in range(length)]


_NAMED: Mapping[str, Callable[[], Workload]] = {
    "offline": lambda: _offline(256, seed=0),
    "offline_1024": lambda: _offline(1024, seed=9),
    "shared_prefix": lambda: shared_prefix(512, 2048, 64, 128),
    "prefill": lambda: uniform(32, 2048, 1),
    "ttft": lambda: uniform(1, 128, 1),
    "long_prompts": lambda: uniform(8, 32768, 1),
    "groups": lambda: replace(uniform(32, 1024, 512), n=16, temperature=0.6),
    "two_levels": _two_levels,
    "generate_256": _asking,
    "stream_256": lambda: _asking(streams=True),
    "logprobs_256": lambda: _asking(logprobs=1),
    "penalty_256": lambda: _asking(presence_penalty=0.5),
    "bias_256": lambda: _asking(logit_bias={5: 1.0}),
    "grammar_256": lambda: _asking(structured_outputs=StructuredOutputsParams(regex="[a-z ]*")),
}
