"""What is captured as CUDA graphs computes what the eager path computes: checked without capturing anything, on a CPU
in Triton's interpreter.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler_output import SchedulerOutput, SharedPrefix
from nanovllm.engine.shared_prefixes import SharedPrefixes
from nanovllm.runner.cascade_items import CascadeItems
from nanovllm.runner.graphs.layouts import CascadeLayout, DecodeLayout, PromptLayout
from tests.kernels.twins import load_twin
from tests.runner.fake_graphs import fake_graphs
from tests.tiny_models import random_prompts, save_random

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")


def make_plan(lens: list[int], computed: list[int], num_samples: list[int], **options: Any) -> SchedulerOutput:
    fields: dict[str, Any] = {
        "new_rows": [],
        "new_blocks": [],
        "rows": list(range(3, 3 + len(lens))),
        "num_scheduled_tokens": lens,
        "num_computed_tokens": computed,
        "num_samples": num_samples,
        "token_ids": list(range(100, 100 + sum(lens))),
        "num_decodes": sum(length == 1 for length in lens),
    }
    return SchedulerOutput(**{**fields, **options})


def test_a_decode_fills_the_next_size_and_padding_changes_nothing() -> None:
    layout = DecodeLayout(max_num_seqs=12)
    assert layout.sizes == [1, 2, 4, 8, 12]
    plan = make_plan([1, 1, 1], [5, 32, 7], [1] * 3, new_blocks=[(4, 2, 77)], token_ids=[-1, 9, -1])
    assert layout.size(plan) == 4
    words = np.empty(layout.words(4), dtype=np.int32)
    layout.fill(words, 4, plan)
    rows, token_ids, blocks = (part.tolist() for part in layout.inputs(torch.from_numpy(words), 4))
    assert rows == [3, 4, 5, -1]
    assert token_ids == [-1, 9, -1, -1]
    assert blocks == [-1, 77, -1, -1]


def test_decodes_that_share_prefixes_bring_their_items() -> None:
    """Padding shares nothing. Steps that share the same are cut once."""
    items = CascadeItems(num_kv_heads=2, group=3, num_programs=8)
    layout = CascadeLayout(DecodeLayout(max_num_seqs=12), items)
    prefixes = [SharedPrefix(0, 3, 0, 128)]
    plan = make_plan([1, 1, 1], [200, 201, 202], [1] * 3, token_ids=[-1, 9, -1], shared_prefixes=prefixes)
    words = np.empty(layout.words(4), dtype=np.int32)
    layout.fill(words, 4, plan)
    decodes, cascade = layout.inputs(torch.from_numpy(words), 4)
    assert decodes.rows.tolist() == [3, 4, 5, -1]
    assert cascade.shared_lens.tolist() == [128, 128, 128, 0]
    assert cascade.num_parts[3] == 0 and cascade.num_items > 0
    assert items.words(prefixes, 4) is items.words(list(prefixes), 4)
    layout.fill(words, 4, None)
    assert cascade.num_items == 0 and not cascade.shared_lens.any()


@pytest.mark.parametrize(
    ("plan", "size"),
    [
        (make_plan([5, 7], [0, 0], [1, 1]), (16, 8)),
        (make_plan([16], [0], [1]), (16, 8)),
        (make_plan([17], [64], [1]), (32, 8)),
        (make_plan([1, 1, 300], [9, 4095, 0], [1, 1, 0]), (384, 8)),
        (make_plan([2] * 7, [0] * 7, [1] * 7), (16, 8)),
        (make_plan([2] * 8, [0] * 8, [1] * 8), (16, 64)),
        (make_plan([2] * 64, [0] * 64, [1] * 64), None),  # no room for padding
        (make_plan([2049], [0], [1]), None),
        (make_plan([1, 5], [4096, 0], [1, 1]), None),  # a long context: the decode kernels
        (make_plan([100], [0], [0]), None),  # nothing to sample
    ],
)
def test_only_small_steps_with_prompts_are_captured(plan: SchedulerOutput, size: tuple[int, int] | None) -> None:
    assert PromptLayout().size(plan) == size


def test_sizes_of_prompts_that_are_captured_at_once_fit_into_a_step() -> None:
    assert [num_tokens for num_tokens, _ in PromptLayout().at_once(8192)] == [512, 384, 256, 192, 128, 96]
    assert [num_tokens for num_tokens, _ in PromptLayout().at_once(200)] == [192, 128, 96]
    assert PromptLayout().at_once(64) == []


def test_a_step_with_prompts_ends_in_one_padding_request() -> None:
    layout = PromptLayout()
    plan = make_plan([1, 4, 6], [5, 0, 0], [1, 0, 1])
    words = np.empty(layout.words((16, 8)), dtype=np.int32)
    layout.fill(words, (16, 8), plan)
    inputs = layout.inputs(torch.from_numpy(words), (16, 8))
    assert inputs.rows.tolist() == [3, 4, 5, -1, -1, -1, -1, -1]
    assert inputs.query_start_loc.tolist() == [0, 1, 5, 11, 11, 11, 11, 11, 16]
    assert inputs.token_ids.tolist() == [*range(100, 111), 0, 0, 0, 0, 0]
    assert inputs.sampled_rows.tolist() == [3, 5, -1, -1, -1, -1, -1, -1]
    assert inputs.sampled_positions.tolist() == [6, 6, 0, 0, 0, 0, 0, 0]
    assert inputs.sampled_from.tolist() == [0, 10, 0, 0, 0, 0, 0, 0]


@interpreted
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 20, "num_gpu_blocks_override": 9}])
def test_captured_steps_give_the_tokens_of_the_eager_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    for operation in ("attention.paged_attention", "sample"):
        load_twin(operation)
    from nanovllm.attention.triton_paged import TritonBackend

    folder = save_random(tmp_path, "Qwen3ForCausalLM", num_hidden_layers=2, head_dim=16)
    prompts = random_prompts([5, 33, 1, 20, 48, 16])
    prompts[3] = prompts[1][:20]
    params = [
        SamplingParams(temperature=(0, 0.8)[i % 2], top_k=(0, 9)[i // 2 % 2], seed=i, max_tokens=6, ignore_eos=True)
        for i in range(len(prompts))
    ]

    def run() -> list[list[int]]:
        defaults: dict[str, Any] = {"max_num_seqs": 5, "max_model_len": 64, "num_gpu_blocks_override": 40}
        with LLM(
            str(folder),
            device="cpu",
            dtype="float32",
            compilation="none",
            skip_tokenizer_init=True,
            block_size=16,
            **{**defaults, **options},
        ) as llm:
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    expected = run()
    fake = fake_graphs(monkeypatch, TritonBackend())
    assert run() == expected
    assert len(fake.replayed) > 8


@interpreted
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_decodes_that_share_prefixes_give_the_tokens_they_have_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
) -> None:
    """Siblings, and others behind the same beginning, some of them beside prompts; captured or not."""
    for operation in ("attention.paged_attention", "sample"):
        load_twin(operation)
    from nanovllm.attention.triton_paged import TritonBackend

    folder = save_random(tmp_path, "Qwen3ForCausalLM", num_hidden_layers=2, head_dim=16)
    start, *ends = random_prompts([70, 60, 3, 9, 20])
    prompts = [start + end for end in ends]
    params = [
        SamplingParams(n=(1, 3)[i == 0], temperature=0.8, seed=i, max_tokens=4, ignore_eos=True) for i in range(4)
    ]
    options: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "compilation": "none", "skip_tokenizer_init": True, "block_size": 16,
        "max_num_seqs": 7, "max_model_len": 192, "max_num_batched_tokens": 100, "num_gpu_blocks_override": 90,
    }  # fmt: skip

    def run() -> tuple[list[list[int]], list[int]]:
        with LLM(str(folder), enforce_eager=enforce_eager, **options) as llm:
            num_shared: list[int] = []
            execute = llm._engine.executor.execute
            monkeypatch.setattr(
                llm._engine.executor,
                "execute",
                lambda plan: num_shared.append(len(plan.shared_prefixes)) or execute(plan),
            )
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [part.token_ids for output in outputs for part in output.outputs], num_shared

    expected, num_shared = run()
    assert not any(num_shared)
    monkeypatch.setattr("nanovllm.build._shared_prefixes", lambda *_: SharedPrefixes(64, 16, min_tokens_saved=1))
    fake_graphs(monkeypatch, TritonBackend())
    got, num_shared = run()
    assert max(num_shared) == 2  # the beginning of all, and the siblings' prompt behind it
    assert got == expected
