"""Workloads are what their definitions say, to the token."""

import random

import pytest

from nanovllm_bench.workload import named, shared_prefix, uniform


def test_offline_follows_its_published_definition() -> None:
    workload = named("offline")
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    assert workload.prompts == prompts
    assert workload.max_tokens == [rng.randint(100, 1024) for _ in range(256)]
    assert workload.num_output_tokens == 133_966
    assert workload.temperature == 0.6


def test_variants_keep_lengths_and_share_no_prefix() -> None:
    workload = uniform(4, 16, 8, mixed=True)
    assert workload.variant(0, 20_000) == workload
    other = workload.variant(3, 20_000)
    assert list(map(len, other.prompts)) == list(map(len, workload.prompts))
    assert other.max_tokens == workload.max_tokens
    assert all(a[0] != b[0] for a, b in zip(workload.prompts, other.prompts, strict=True))
    assert all(0 <= token < 50 for prompt in workload.variant(1, 50).prompts for token in prompt)


def test_mixed_lengths_stay_within_their_bounds() -> None:
    workload = uniform(200, 64, 128, mixed=True)
    assert {16, 64} <= set(map(len, workload.prompts)) <= set(range(16, 65))
    assert set(workload.max_tokens) <= set(range(32, 129))


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_nothing_to_do_is_an_error(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        uniform(*arguments)


def test_shared_prefix_is_shared_and_moves_with_its_variant() -> None:
    for workload in (shared_prefix(3, 10, 4, 5), shared_prefix(3, 10, 4, 5).variant(2, 50)):
        assert all(prompt[:10] == workload.prefix and len(prompt) == 14 for prompt in workload.prompts)
        assert len({tuple(prompt) for prompt in workload.prompts}) == 3
    with pytest.raises(ValueError, match="prefix-len must be at least 1, got 0"):
        shared_prefix(3, 0, 4, 5)


@pytest.mark.parametrize(
    ("name", "num_prompts", "prompt_len", "output_len"),
    [("shared_prefix", 512, 2112, 128), ("prefill", 32, 2048, 1), ("decode_64", 64, 128, 512), ("ttft", 1, 128, 1)],
)
def test_named_workloads_have_their_sizes(name: str, num_prompts: int, prompt_len: int, output_len: int) -> None:
    workload = named(name)
    assert workload.name == name
    assert [len(prompt) for prompt in workload.prompts] == [prompt_len] * num_prompts
    assert workload.max_tokens == [output_len] * num_prompts


def test_an_unknown_workload_is_refused() -> None:
    for name in ("offlin", "decode_", "decode_0", "decode_x"):
        with pytest.raises(ValueError, match=f"no workload '{name}'; there are offline"):
            named(name)


def test_named_workloads_that_ask_for_more() -> None:
    """Outputs of a prompt count each; what asks for more is not for engines that lack it."""
    groups, levels = named("groups"), named("two_levels")
    assert groups.num_output_tokens == 32 * 16 * 512 and not groups.is_plain
    assert {len(prompt) for prompt in levels.prompts} == {1024 + 2048 + 32} and levels.is_plain
    assert len({tuple(prompt[:1024]) for prompt in levels.prompts}) == 1
    assert len({tuple(prompt[: 1024 + 2048]) for prompt in levels.prompts}) == 16
    assert [len(named("context_8192").prompts[0]), named("context_8192").max_tokens] == [8192, [512]]
    plain = named("generate_256")
    for name in ("stream_256", "logprobs_256", "penalty_256", "bias_256", "grammar_256"):
        other = named(name)
        assert (other.prompts, other.max_tokens) == (plain.prompts, plain.max_tokens) and not other.is_plain
