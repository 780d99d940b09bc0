"""DFlash heads: what they draft, against the head written out in plain PyTorch, and the same tokens with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.heads import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYER,
    SIZE,
    PlainTarget,
    check_drafts,
    check_small,
    layer_shapes,
    norm,
    rotated,
    run,
    save_target,
)
from tests.runner.fake_graphs import fake_graphs
from tests.tiny_models import VOCAB_WITH_TOKENIZER

NUM_LAYERS, MASK = 2, 270


def save_head(folder: Path, vocab_size: int = VOCAB_WITH_TOKENIZER, **config: Any) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    shapes = {"fc": (HIDDEN, 2 * HIDDEN)}
    norms = {"norm": HIDDEN, "hidden_norm": HIDDEN}
    for i in range(NUM_LAYERS):
        shapes |= layer_shapes(i)
        norms |= dict.fromkeys((f"layers.{i}.input_layernorm", f"layers.{i}.post_attention_layernorm"), HIDDEN)
        norms |= dict.fromkeys((f"layers.{i}.self_attn.q_norm", f"layers.{i}.self_attn.k_norm"), SIZE)
    if vocab_size != VOCAB_WITH_TOKENIZER:
        shapes["lm_head"] = (vocab_size, HIDDEN)
    tensors = {f"{n}.weight": torch.randn(s, generator=generator) * s[-1] ** -0.5 for n, s in shapes.items()}
    for name, size in norms.items():
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
    if vocab_size != VOCAB_WITH_TOKENIZER:
        ids = torch.randperm(VOCAB_WITH_TOKENIZER, generator=generator)[:vocab_size].sort().values
        tensors["d2t"] = ids - torch.arange(vocab_size)
    save_file(tensors, folder / "model.safetensors")
    layers = {**LAYER, "model_type": "qwen3", "num_hidden_layers": NUM_LAYERS}
    given = {
        **{"architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash", "draft_vocab_size": vocab_size},
        **{"block_size": 8, "mask_token_id": MASK, "aux_hidden_state_layer_ids": [1, 2]},
        "transformer_layer_config": layers,
    }
    (folder / "config.json").write_text(json.dumps({**given, **config}))
    return folder


class PlainHead:
    def __init__(self, target: Path, head: Path) -> None:
        self.target = PlainTarget(target)
        self.weights = {name.removesuffix(".weight"): w for name, w in load_file(head / "model.safetensors").items()}

    @torch.no_grad()
    def draft(self, token_ids: list[int], num_tokens: int) -> list[int]:
        states = torch.cat(self.target.states(token_ids)[1:], -1)
        known = norm(states @ self.weights["fc"].T, self.weights["hidden_norm"])
        x = self.target.embed([token_ids[-1], *[MASK] * num_tokens])
        for i in range(NUM_LAYERS):
            x = self._layer(i, known, x)
        head = self.weights.get("lm_head", self.target.model.lm_head.weight)
        ids = (norm(x[1:], self.weights["norm"]) @ head.T).argmax(-1)
        return (ids + self.weights.get("d2t", torch.zeros(VOCAB_WITH_TOKENIZER, dtype=torch.long))[ids]).tolist()

    def _layer(self, i: int, known: Tensor, x: Tensor) -> Tensor:
        prefix = f"layers.{i}."
        w = {name.removeprefix(prefix): t for name, t in self.weights.items() if name.startswith(prefix)}
        both = torch.cat((known, norm(x, w["input_layernorm"])))
        n = len(both)
        q, k, v = (both @ w[f"self_attn.{name}_proj"].T for name in "qkv")
        q = rotated(norm(q.view(n, HEADS, SIZE), w["self_attn.q_norm"]))[len(known) :]
        k, v = rotated(norm(k.view(n, KV_HEADS, SIZE), w["self_attn.k_norm"])), v.view(n, KV_HEADS, SIZE)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * SIZE**-0.5).softmax(-1)  # in both directions
        x = x + torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ w["self_attn.o_proj"].T
        y = norm(x, w["post_attention_layernorm"])
        gated = torch.nn.functional.silu(y @ w["mlp.gate_proj"].T) * (y @ w["mlp.up_proj"].T)
        return x + gated @ w["mlp.down_proj"].T


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize(("vocab_size", "captured"), [(VOCAB_WITH_TOKENIZER, False), (90, True)])
def test_drafts_are_those_of_the_plain_head_and_tokens_those_without_it(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, captured: bool
) -> None:
    head = save_head(tmp_path / "head", vocab_size)
    expected = run(target)
    if captured:
        fake_graphs(monkeypatch)
    check_drafts(target, ("dflash", head), expected, PlainHead(target, head).draft, monkeypatch, captured)


def test_in_chunks_and_after_a_preemption_tokens_are_the_same(target: Path, tmp_path: Path) -> None:
    check_small(target, ("dflash", save_head(tmp_path / "head")))


def test_what_is_no_head_for_the_model_is_said_before_weights_are_read(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no DFlash head .* is 'eagle3'"):
        run(target, ("dflash", save_head(tmp_path / "kind", speculators_model_type="eagle3")))
    with pytest.raises(ValueError, match="names no mask_token_id"):
        run(target, ("dflash", save_head(tmp_path / "mask", mask_token_id=None)))
    with pytest.raises(ValueError, match="guesses at most 7 tokens, and num_speculative_tokens is 8"):
        run(target, ("dflash", save_head(tmp_path / "size")), num_tokens=8)
