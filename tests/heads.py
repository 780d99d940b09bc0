"""What the tests of heads (EAGLE-3, DFlash) share: a tiny target, runs with a head, and drafts beside a plain form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.engine.speculation.chained_scheduler import ChainedScheduler
from nanovllm.engine.speculation.draft_scheduler import DraftModelScheduler
from nanovllm.kernels.draft_places import Unseen
from nanovllm.runner.dflash import DFlashRunner
from nanovllm.runner.graphs.draft_passes import SequentialPasses
from tests.llm_checks import check_nothing_is_left
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, random_prompts, save_random

HIDDEN, INNER, HEADS, KV_HEADS, SIZE = 32, 48, 4, 2, 8
PROMPTS = random_prompts([5, 23, 1, 40], vocab_size=256)
PARAMS = [SamplingParams(temperature=[0.0, 1.0][i % 2], seed=i, max_tokens=14, ignore_eos=True) for i in range(4)]
LAYER = {
    **{"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS, "head_dim": SIZE},
    **{"num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6, "vocab_size": VOCAB_WITH_TOKENIZER},
    **{"max_position_embeddings": 256, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False},
}


def save_target(folder: Path) -> Path:
    return save_random(folder, vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS, head_dim=SIZE)


def layer_shapes(layer: int, inputs: int = HIDDEN) -> dict[str, tuple[int, int]]:
    """Of a head's layer whose attention reads so many numbers."""
    return {
        f"layers.{layer}.self_attn.q_proj": (HEADS * SIZE, inputs),
        f"layers.{layer}.self_attn.k_proj": (KV_HEADS * SIZE, inputs),
        f"layers.{layer}.self_attn.v_proj": (KV_HEADS * SIZE, inputs),
        f"layers.{layer}.self_attn.o_proj": (HIDDEN, HEADS * SIZE),
        f"layers.{layer}.mlp.gate_proj": (INNER, HIDDEN),
        f"layers.{layer}.mlp.up_proj": (INNER, HIDDEN),
        f"layers.{layer}.mlp.down_proj": (HIDDEN, INNER),
    }


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rotated(x: Tensor) -> Tensor:
    """x [n, heads, SIZE], of positions from 0 on."""
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class PlainTarget:
    """The target as transformers has it."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()

    def embed(self, token_ids: list[int]) -> Tensor:
        return self.model.model.embed_tokens(torch.tensor(token_ids))

    def states(self, token_ids: list[int]) -> list[Tensor]:
        """Of all tokens but the last [n - 1, HIDDEN]: before each layer, and behind the last one, before the norm."""
        last: list[Tensor] = []
        hook = self.model.model.layers[-1].register_forward_hook(
            lambda module, given, out: last.append(out if torch.is_tensor(out) else out[0])
        )
        found = self.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        hook.remove()
        return [states[0, :-1] for states in (*found[:-1], last[0])]


def run(
    target: Path, head: tuple[str, Path | None] | None = None, num_tokens: int = 4, **options: Any
) -> list[list[int]]:
    """Twice, the second time with prompts from the prefix cache. head: its method, and where it is, if not in
    the target's checkpoint."""
    if head is not None:
        fields = {"method": head[0], "num_speculative_tokens": num_tokens, "adaptive": False}
        model = {} if head[1] is None else {"model": str(head[1])}
        options["speculative_config"] = {**fields, **model}
    defaults = {"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 8, "skip_tokenizer_init": True}
    with LLM(str(target), **{**defaults, **options}) as llm:
        for _ in range(2):
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert head is None or llm.get_metrics()["spec_decode_num_drafts"] > 20
        check_nothing_is_left(llm)
    return [output.outputs[0].token_ids for output in outputs]


Seen = list[tuple[list[int], list[int]]]  # tokens so far, and what was drafted behind them


def check_drafts(
    target: Path,
    head: tuple[str, Path | None],
    expected: list[list[int]],
    draft: Callable[[list[int], int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    captured: bool,
) -> None:
    """Tokens are those expected, and drafts those of the plain form `draft`: (tokens so far, how many) -> tokens.

    captured: in chained steps as well, the next of which is planned before the host knows what one brought.
    """
    seen = note_drafts(monkeypatch)
    chained = note_chained(monkeypatch, dict(zip(map(tuple, PROMPTS), expected, strict=True)))
    assert run(target, head, overlap_depth=1 + captured) == expected
    assert len(chained if captured else seen) > 30
    for token_ids, drafted in [*seen[::4], *chained[::4]]:
        assert drafted == draft(token_ids, len(drafted))


def note_drafts(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen: Seen = []
    make_drafts = DraftModelScheduler._make_drafts

    def noted(scheduler: DraftModelScheduler) -> Any:
        drafts = make_drafts(scheduler)
        seen.extend((list(request.token_ids), list(draft)) for request, draft in drafts.items())
        return drafts

    monkeypatch.setattr(DraftModelScheduler, "_make_drafts", noted)
    return seen


def note_chained(monkeypatch: pytest.MonkeyPatch, outputs: dict[tuple[int, ...], list[int]]) -> Seen:
    """outputs: by prompt, since the host does not know where a chained step begins."""
    seen: Seen = []
    histories: dict[int, list[int]] = {}
    plan_chained = ChainedScheduler._plan_chained

    def noted_plan(scheduler: ChainedScheduler) -> Any:
        plan = plan_chained(scheduler)
        for request in scheduler.running:
            prompt = request.token_ids[: request.num_prompt_tokens]
            histories[request.row] = prompt + outputs[tuple(prompt)]
        return plan

    def noted(passes: type) -> Any:
        make = passes.draft  # type: ignore[attr-defined]

        def draft(self: Any, unseen: Unseen, num_computed: Tensor, length: int) -> Tensor:
            lengths = num_computed.tolist()
            drafted: Tensor = make(self, unseen, num_computed, length)
            targets = drafted if self.vocabulary is None else drafted + self.vocabulary[drafted]
            columns = unseen.rows.tolist(), unseen.limits.tolist(), targets.T.tolist()
            for row, limit, tokens in zip(*columns, strict=True):
                if row >= 0 and limit == length:
                    seen.append((histories[row][: lengths[row] + 1], tokens))
            return drafted

        return draft

    monkeypatch.setattr(ChainedScheduler, "_plan_chained", noted_plan)
    for passes in (SequentialPasses, DFlashRunner):
        monkeypatch.setattr(passes, "draft", noted(passes))
    return seen


def check_small(target: Path, head: tuple[str, Path | None]) -> None:
    """In chunks, with overlap and preemption the tokens are the same."""
    small = {"max_num_batched_tokens": 11, "num_gpu_blocks_override": 11, "max_model_len": 80}
    assert run(target, head, overlap_depth=2, **small) == run(target)
