"""Every pair of features on a tiny model: together, in a batch, they give what they give alone.

Each pair runs two requests that use both features, beside two plain ones, and must return what the same requests
return one at a time in a plain engine (synchronous, no chunks, room for everyone, nothing cached). Each feature also
checks that it was really in use. The table in docs/features.md is written from these runs:

    python -m tests.test_features_pairwise          write it anew
"""

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from nanovllm import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from nanovllm.lora.request import LoRARequest
from tests.gguf_files import convert
from tests.lora.random_adapters import make_tensors, request
from tests.test_llm_outputs import check_nothing_is_left
from tests.test_llm_sampling import forbid_repeats
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, load_hugging_face, save_random, save_tokenizer

DOCS = Path(__file__).parent.parent / "docs" / "features.md"
STOPS = set("acegikmoqsuwy02468ACEGIKMOQSUWY!#%')+-/;=?")
WORDS = "[a-f]{3,9} [a-f]{9}"
PROMPTS = ["the same long beginning of all, one", "the same long beginning of all, two"]
PLAIN = ["the same long beginning of all, three", "something else"]
FAVOURED = {ord("b"): 6.0, ord("c"): 5.0, ord("B"): 6.0, ord("x"): 6.0, ord(" "): -100.0}
BAD_WORDS = ["a", "b", "x", "ff"]
ALLOWED = [ord(character) for character in "abcdegh ABCDEFGHIJKLMNOP"]
NUM_HELD_BACK = 8  # tokens that nothing ends
ENDS = [byte for byte in range(128, 256) if byte % 4 == 2]


Outputs = list[RequestOutput]


@dataclass(frozen=True)
class Feature:
    """params and engine: options that switch it on. shows: can it be seen in the outputs?

    changes: a request without it gives other tokens. model: options that make another model, so of the reference too.
    """

    params: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    shows: Callable[[Outputs], bool] = lambda outputs: True
    counts: str = ""  # a metric that must have grown
    changes: bool = False
    has_adapter: bool = False
    is_updated: bool = False  # to other weights, with which it leaves the prompts' KV, and back


def each(outputs: Outputs, holds: Callable[[Any], bool]) -> bool:
    return all(holds(completion) for output in outputs for completion in output.outputs)


def never_repeats(outputs: Outputs) -> bool:
    """For as long as the other features leave it a choice, which they do at first."""
    return each(outputs, lambda completion: len(set(completion.token_ids[:4])) == len(completion.token_ids[:4]))


class MostlyRight:
    """Drafts what a sequence goes on with in a run that is known, and now and then something else."""

    def __init__(self) -> None:
        self.known: list[list[int]] = []

    def propose(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        length = len(token_ids)
        following = [known[length : length + num_tokens] for known in self.known if known[:length] == token_ids]
        draft = max(following, key=len, default=[7] * num_tokens)
        return [token_id if (length + i) % 5 else ord("e") for i, token_id in enumerate(draft)]


PROPOSER = MostlyRight()
FEATURES = {
    "n": Feature({"n": 3}, shows=lambda outputs: all(len(output.outputs) == 3 for output in outputs)),
    "stop": Feature(
        {"stop": sorted(STOPS)},  # after the tokens that min_tokens holds back, none but the one that ends it
        shows=lambda outputs: each(outputs, lambda c: STOPS.isdisjoint(map(chr, c.token_ids[NUM_HELD_BACK:-1]))),
        changes=True,
    ),
    "logprobs": Feature({"logprobs": 2}, shows=lambda outputs: each(outputs, lambda c: len(c.logprobs[0]) in (2, 3))),
    "logprobs_mode": Feature({"logprobs": 2}, model={"logprobs_mode": "processed_logprobs"}),
    "prompt_logprobs": Feature(
        {"prompt_logprobs": 2},
        shows=lambda outputs: all(len(o.prompt_logprobs) == len(o.prompt_token_ids) for o in outputs),
    ),
    "penalties": Feature({"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.5}, changes=True),
    "logit_bias": Feature({"logit_bias": FAVOURED}, changes=True),
    "bad_words": Feature(
        {"bad_words": BAD_WORDS},
        shows=lambda outputs: each(outputs, lambda c: not any(word in c.text for word in BAD_WORDS)),
        changes=True,
    ),
    "min_tokens": Feature(
        {"min_tokens": NUM_HELD_BACK, "stop_token_ids": ENDS},
        shows=lambda outputs: each(outputs, lambda c: len(c.token_ids) > NUM_HELD_BACK),
    ),
    "allowed_token_ids": Feature(
        {"allowed_token_ids": ALLOWED},
        shows=lambda outputs: each(outputs, lambda c: set(c.token_ids) <= set(ALLOWED)),
        changes=True,
    ),
    "processors": Feature({"logits_processors": [forbid_repeats]}, shows=never_repeats, changes=True),
    "grammar": Feature(
        {"structured_outputs": StructuredOutputsParams(regex=WORDS)},
        shows=lambda outputs: each(outputs, lambda c: c.stop_reason or re.fullmatch(WORDS, c.text)),
        changes=True,
    ),
    "seed": Feature({"seed": 7}, changes=True),
    # Two at a time, so that the others come when what they share has been computed.
    "prefix hit": Feature(engine={"enable_prefix_caching": True, "max_num_seqs": 2}, counts="num_prompt_tokens_cached"),
    "preemption": Feature(engine={"num_gpu_blocks_override": 9, "max_model_len": 72}, counts="num_preemptions"),
    "chunked prefill": Feature(engine={"max_num_batched_tokens": 5, "max_num_seqs": 5}),  # prompts have 37 tokens
    "overlap depth 2": Feature(engine={"overlap_depth": 2}),
    # Room for one request and a half, so that what comes next evicts, and finds what was evicted.
    "kv_offload_gb": Feature(
        engine={"kv_offload_gb": 0.01, "num_gpu_blocks_override": 13, "enable_prefix_caching": True},
        counts="num_blocks_saved",
    ),
    "prefix_store": Feature(engine={"prefix_store": "store", "enable_prefix_caching": True}),
    "trace": Feature(engine={"trace": "run.json.gz"}),  # in a folder of the tests, a file for each engine
    "speculation": Feature(
        engine={
            "speculative_config": {
                **{"method": "custom_class", "proposer": PROPOSER, "num_speculative_tokens": 3, "adaptive": False}
            }
        },
        counts="spec_decode_num_accepted_tokens",
    ),
    # The plain requests beside have none.
    "new weights": Feature(is_updated=True),
    "lora_request": Feature(model={"enable_lora": True, "max_lora_rank": 4}, has_adapter=True, changes=True),
    "quantization": Feature(model={"quantization": "int8"}),
    "kv_cache_dtype": Feature(model={"kv_cache_dtype": "fp8"}),
    "gguf": Feature(model={"quantization": "gguf"}),
    "states": Feature(model={"model": "Qwen3_5ForCausalLM"}),
    "latents": Feature(model={"model": "DeepseekV2ForCausalLM"}),
    # With overlap and the prefix cache, so that fewer engines have to start: each of them starts two processes.
    "tensor parallel 2": Feature(engine={"tensor_parallel_size": 2, "overlap_depth": 2, "enable_prefix_caching": True}),
}
# How far log-probabilities may lie apart: the number of rows in a matrix product changes its rounding. Where a cache or
# the inputs of products have 8 bits, a number beside the edge between two codes then falls to either side.
TOLERANCES = {"kv_cache_dtype": 2e-3, "gguf": 3e-2}
TOLERANCE = 1e-4  # of all others
# Two values of one option, or two models; what a GGUF file has packed cannot be given anew; the adapter is for another
# model than that with latents (`tests/models/test_latent_families.py`).
NO_PAIRS = (
    *(("quantization", "gguf"), ("new weights", "gguf"), ("states", "latents")),
    ("lora_request", "latents"),
)
# Refused by name, where layers keep states.
NOT_WITH_STATES = ("kv_offload_gb", "prefix_store", "lora_request")
PAIRS = [
    names
    for names in combinations(FEATURES, 2)
    if names not in NO_PAIRS and not ("states" in names and {*names} & {*NOT_WITH_STATES})
]


class Engines:
    """One engine for each set of options, and the reference."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        save_random(folder, vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
        save_tokenizer(folder)
        self._folder = folder
        self._engines: dict[str, LLM] = {}
        self._alone: dict[tuple[str, ...], RequestOutput] = {}
        self.adapter = request("adapter", make_tensors(load_hugging_face(folder)))

    def get(self, **options: Any) -> LLM:
        key = repr(sorted(options.items()))
        if key not in self._engines:
            defaults = {"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 12, "overlap_depth": 1}
            defaults["enable_prefix_caching"] = False
            for name in ("trace", "prefix_store"):
                if name in options:
                    options[name] = self._folder / f"{len(self._engines)}.{options[name]}"
            model = self._folder_of(options.pop("model", None))
            if options.get("quantization") == "gguf":
                defaults["tokenizer"], model = str(self._folder), self._packed(model)
            self._engines[key] = self._stack.enter_context(LLM(str(model), **{**defaults, **options}))
        return self._engines[key]

    def tensors(self, architecture: str | None) -> dict[str, Any]:
        return load_file(self._folder_of(architecture) / "model.safetensors")

    def _folder_of(self, architecture: str | None) -> Path:
        """Of another model, if one is named."""
        folder = self._folder / (architecture or "")
        if not folder.exists():
            save_random(folder, str(architecture), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
            save_tokenizer(folder)
        return folder

    def _packed(self, folder: Path) -> Path:
        """The same model, of which matrices with rows of 32 numbers or a multiple are in blocks of 4 bits."""
        path = folder / "packed.gguf"
        return path if path.exists() else convert(folder, path, quantize)

    def alone(
        self, prompt: str, params: SamplingParams, model: dict[str, Any], adapter: LoRARequest | None = None
    ) -> RequestOutput:
        """What the reference returns for this request, which is computed once."""
        key = prompt, repr(params), repr(model), repr(adapter)
        if key not in self._alone:
            llm = self.get(**model)
            (self._alone[key],) = llm.generate(prompt, params, use_tqdm=False, lora_request=adapter)
            output = self._alone[key]
            PROPOSER.known += [[*output.prompt_token_ids, *c.token_ids] for c in output.outputs]
        return self._alone[key]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.close()


def quantize(name: str, matrix: np.ndarray) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Of `convert`: Q4_0 where blocks fit, also into half of a row where two ranks have one each."""
    is_dense = matrix.shape[-1] % 32 or "attn_output" in name
    kind = GGMLQuantizationType.F32 if is_dense else GGMLQuantizationType.Q4_0
    return gguf.quants.quantize(matrix.astype(np.float32), kind), kind


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def make_params(names: Iterable[str], index: int) -> SamplingParams:
    """Requests always draw, and always with a seed: else nothing could be compared. "seed" gives both the same one."""
    options: dict[str, Any] = {"temperature": 1.2, "max_tokens": 24, "seed": 100 + 10 * index, "ignore_eos": True}
    for name in names:
        options.update(FEATURES[name].params)
    return SamplingParams(**options)


def check_pair(engines: Engines, names: tuple[str, ...]) -> None:
    params = [make_params(names, index) for index in range(2)]
    plain = [make_params((), index) for index in (2, 3)]
    model = {key: value for name in names for key, value in FEATURES[name].model.items()}
    adapter = engines.adapter if any(FEATURES[name].has_adapter for name in names) else None
    prompts, asked, adapters = PROMPTS + PLAIN, params + plain, [adapter, adapter, None, None]
    expected = [engines.alone(*one) for one in zip(prompts, asked, [model] * 4, adapters, strict=True)]
    llm = engines.get(**{key: value for name in names for key, value in FEATURES[name].engine.items()}, **model)
    llm.reset_prefix_cache()
    if any(FEATURES[name].is_updated for name in names):
        tensors = engines.tensors(model.get("model"))
        version = llm.update_weights({name: tensor * 1.5 for name, tensor in tensors.items()})
        llm.generate(prompts, plain[0], use_tqdm=False, lora_request=None if adapter is None else adapters)
        assert llm.update_weights(tensors) == version + 1
    before = llm.get_metrics()
    outputs = llm.generate(prompts, asked, use_tqdm=False, lora_request=None if adapter is None else adapters)
    after = llm.get_metrics()
    check_nothing_is_left(llm)
    if "trace" in names:
        assert all("of output" in llm.explain(output.request_id) for output in outputs), "the trace has all of them"
    for name in names:
        feature = FEATURES[name]
        assert feature.shows(outputs[:2]), f"{name} was not in use"
        assert not feature.counts or after[feature.counts] > before[feature.counts], f"{name} did not happen"
        if feature.changes:
            others = set(names) - {name}
            other_adapter = adapter if any(FEATURES[other].has_adapter for other in others) else None
            other = engines.alone(PROMPTS[0], make_params(others, 0), model, other_adapter)
            assert tokens(other) != tokens(outputs[0]), f"{name} changed nothing"
    tolerance = max(TOLERANCES.get(name, TOLERANCE) for name in names)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.prompt_token_ids == wanted.prompt_token_ids
        for got, want in zip(output.outputs, wanted.outputs, strict=True):
            assert (got.index, got.token_ids, got.text) == (want.index, want.token_ids, want.text)
            assert (got.finish_reason, got.stop_reason) == (want.finish_reason, want.stop_reason)
            check_logprobs(got.logprobs, want.logprobs, tolerance)
        check_logprobs(output.prompt_logprobs, wanted.prompt_logprobs, tolerance)


def check_logprobs(got: Any, want: Any, tolerance: float) -> None:
    assert (got is None) == (want is None)
    for entry, wanted in zip(got or (), want or (), strict=True):
        assert (entry is None) == (wanted is None)
        for token_id, logprob in (entry or {}).items():
            assert token_id in wanted and logprob.logprob == pytest.approx(wanted[token_id].logprob, abs=tolerance)


MARKED = [
    pytest.param(names, marks=pytest.mark.slow if {"tensor parallel 2", "gguf"} & {*names} else ()) for names in PAIRS
]


@pytest.mark.parametrize("names", MARKED, ids=[" and ".join(names) for names in PAIRS])
def test_a_pair_together_gives_what_it_gives_alone(engines: Engines, names: tuple[str, str]) -> None:
    check_pair(engines, names)


def make_table() -> str:
    """The lower triangle of all pairs; a mark stands for a pair that has just passed."""
    engines = Engines()
    passed = set()
    for names in PAIRS:
        check_pair(engines, names)
        passed.add(frozenset(names))
    engines.close()
    return format_table(passed)


def format_table(passed: set[frozenset[str]]) -> str:
    names = list(FEATURES)
    lines = ["| | " + " | ".join(names[:-1]) + " |", "| --- " * len(names) + "|"]
    for row, name in enumerate(names[1:], 1):
        marks = ["✓" if frozenset((name, other)) in passed else "" for other in names[:row]]
        lines.append(f"| {name} | " + " | ".join(marks + [""] * (len(names) - 1 - row)) + " |")
    return "\n".join(lines)


def test_the_documentation_shows_the_pairs_that_are_tested() -> None:
    assert format_table({frozenset(names) for names in PAIRS}) in DOCS.read_text(), (
        "docs/features.md is out of date: python -m tests.test_features_pairwise"
    )


if __name__ == "__main__":
    head = DOCS.read_text().partition("| | n ")[0] if DOCS.exists() else ""
    DOCS.write_text(head + make_table() + "\n")
    print(DOCS, "written", file=sys.stderr)
