"""One, two and four ranks give the same tokens, in real processes, for every architecture and every way of running."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.models.dense_families import DENSE_FAMILIES
from nanovllm.models.latent_families import LATENT_FAMILIES
from nanovllm.models.mamba_families import MAMBA_FAMILIES
from nanovllm.models.registry import ARCHITECTURES
from nanovllm.models.state_families import STATE_FAMILIES
from nanovllm.weights.checkpoint import SafetensorsCheckpoint
from tests.executor.rank_process import OPTIONS, Ranks, generate
from tests.models.wrapped import CASES as WRAPPED
from tests.models.wrapped import save_wrapped
from tests.tiny_models import random_prompts, save_random

PROMPTS = random_prompts([1, 9, 30, 16])
PROMPTS.append(PROMPTS[2][:24] + PROMPTS[1])  # shares a prefix
GREEDY = SamplingParams(temperature=0, max_tokens=8)
MIXED = [SamplingParams(seed=i, max_tokens=8, top_k=20 * (i % 2), top_p=0.9) for i in range(len(PROMPTS))]
GREEDY_ROUND, SAMPLED_ROUND = (PROMPTS, GREEDY), (PROMPTS, MIXED)
TIGHT_ROUND = (PROMPTS[2:4], GREEDY)
TIGHT = {"num_gpu_blocks_override": 7, "max_num_batched_tokens": 11, "max_num_seqs": 8, "overlap_depth": 2}

# Short windows would leave nothing to preempt for.
FIELDS: dict[str, dict[str, Any]] = {
    "MinistralForCausalLM": {"sliding_window": 256},
    "Gemma3ForConditionalGeneration": {"sliding_window": 256},
}


@pytest.fixture(scope="module")
def started() -> Iterator[dict[int, Ranks]]:
    """By their number: a fixture with parameters would start them anew for each list of parameters that has one."""
    started: dict[int, Ranks] = {}
    yield started
    for ranks in started.values():
        ranks.close()


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, started: dict[int, Ranks]) -> Ranks:
    if request.param not in started:
        started[request.param] = Ranks(request.param)
    return started[request.param]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of an architecture: a folder with random weights, and the tokens of one rank. Made once for all rank counts."""
    known: dict[str, Any] = {}

    def make(architecture: str) -> Any:
        if architecture not in known:
            folder = tmp_path_factory.mktemp(architecture)
            if architecture in WRAPPED:
                save_wrapped(folder, architecture, **FIELDS.get(architecture, {}))
            else:
                save_random(folder, architecture, **FIELDS.get(architecture, {}))
            known[architecture] = folder, generate(folder, {}, [GREEDY_ROUND, SAMPLED_ROUND])[:-1]
        return known[architecture]

    return make


ON_FOUR = ["LlamaForCausalLM", "Gemma3ForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"]
OF_TWO = [*DENSE_FAMILIES, *STATE_FAMILIES, *MAMBA_FAMILIES, *LATENT_FAMILIES]
OTHERS = [
    *OF_TWO,
    *("Gemma4ForConditionalGeneration", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
]


@pytest.mark.parametrize(
    ("ranks", "architecture"),
    [(2, name) for name in ARCHITECTURES if name not in OTHERS] + [(4, name) for name in ON_FOUR],
    indirect=["ranks"],
)
def test_ranks_give_the_tokens_of_one(ranks: Ranks, checkpoint: Any, architecture: str) -> None:
    """Cold and cached prefixes, chunks, preemption, overlap; two key/value heads for four ranks, each kind of model."""
    folder, (greedy, sampled) = checkpoint(architecture)
    *tokens, metrics = ranks.generate(folder, {}, [GREEDY_ROUND, SAMPLED_ROUND])
    assert tokens == [greedy, sampled]
    assert metrics["num_prompt_tokens_cached"] > 0 and metrics["num_preemptions"] == 0
    tokens, metrics = ranks.generate(folder, TIGHT, [TIGHT_ROUND])
    assert tokens == greedy[2:4]
    assert metrics["num_preemptions"] > 0


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("architecture", OF_TWO)
def test_two_ranks_of_the_other_families(ranks: Ranks, tmp_path: Path, architecture: str) -> None:
    """What they change, names, norms and blocks, does not depend on how many ranks there are."""
    folder = save_random(tmp_path, architecture)
    tokens, metrics = ranks.generate(folder, TIGHT, [TIGHT_ROUND])
    assert tokens == generate(folder, {}, [TIGHT_ROUND])[0]
    assert metrics["num_preemptions"] > 0


@pytest.mark.parametrize(
    "sizes",
    [
        {"vocab_size": 131},
        {"vocab_size": 131, "tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_sizes_that_ranks_share_unevenly(ranks: Ranks, tmp_path: Path, sizes: dict[str, Any]) -> None:
    """A vocabulary that ranks do not divide, tied or not; one key/value head for all; biases added once."""
    folder = save_random(tmp_path, **sizes)
    assert ranks.generate(folder, {}, [GREEDY_ROUND])[:-1] == generate(folder, {}, [GREEDY_ROUND])[:-1]


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_every_block_size(ranks: Ranks, checkpoint: Any, block_size: int) -> None:
    folder, (greedy, _) = checkpoint("Qwen3ForCausalLM")
    options = {"block_size": block_size, "max_num_batched_tokens": block_size - 1, "max_num_seqs": 4}
    assert ranks.generate(folder, options, [GREEDY_ROUND])[0] == greedy


def test_random_weights_are_those_of_one_rank(ranks: Ranks, checkpoint: Any) -> None:
    folder, _ = checkpoint("LlamaForCausalLM")
    options = {"load_format": "dummy", "seed": 3}
    assert ranks.generate(folder, options, [GREEDY_ROUND])[0] == generate(folder, options, [GREEDY_ROUND])[0]


def blocks_with_unequal_memory(folder: Path, size: int) -> int:
    budget = 20_000 + 7_000 * int(os.environ["RANK"])  # bytes
    own = {"tensor_parallel_size": size, "distributed_executor_backend": "external_launcher"}
    with LLM(str(folder), **{**OPTIONS, **own, "kv_cache_memory_bytes": budget}) as llm:
        return int(llm.get_metrics()["num_blocks"])


def test_all_ranks_use_the_smallest_cache(ranks: Ranks, checkpoint: Any) -> None:
    """The ranks with more memory hold one key/value head each, as rank 0 does, in as many blocks."""
    folder, _ = checkpoint("LlamaForCausalLM")
    bytes_per_block = 2 * 2 * 8 * 8 * 4  # layers, keys and values, tokens, head size, float32
    expected = 20_000 // bytes_per_block
    assert ranks.call(blocks_with_unequal_memory, folder, ranks.size) == [expected] * ranks.size


def growth_while_loading(folder: Path, size: int) -> int:
    """By how many bytes this rank's own memory grows at most while it loads. Pages of the file itself do not count."""

    def own_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))

    seen = [own_bytes()]
    tensors = SafetensorsCheckpoint.tensors

    def watched(self: SafetensorsCheckpoint, *arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for item in tensors(self, *arguments):
            yield item
            seen.append(own_bytes())

    own = {"tensor_parallel_size": size, "distributed_executor_backend": "external_launcher"}
    options = {**OPTIONS, **own, "num_gpu_blocks_override": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsCheckpoint, "tensors", watched)
        LLM(str(folder), **options).close()
    return max(seen) - seen[0]


def test_a_rank_reads_its_part_of_the_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    """The memory that loading takes at its peak is the rank's share of the model and one tensor."""
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 8192}
    folder = save_random(tmp_path, **sizes)
    total = (folder / "model.safetensors").stat().st_size
    largest = 4 * 8192 * 256
    for growth in ranks.call(growth_while_loading, folder, ranks.size):
        assert total / ranks.size / 2 < growth < total / ranks.size + largest
