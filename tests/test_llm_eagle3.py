"""EAGLE-3 heads: what they draft, against the head written out in plain PyTorch, and the same tokens with them.

The plain form drafted what the layer of speculators 0.9.0 itself did, when both were compared.
"""

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

VOCAB = 100


def save_head(folder: Path, kind: str = "llama", **config: Any) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    shapes = {"fc": (HIDDEN, 3 * HIDDEN), **layer_shapes(0, 2 * HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    norms = dict.fromkeys(("input_layernorm", "hidden_norm", "post_attention_layernorm"), HIDDEN)
    if kind == "qwen3":
        norms |= {"self_attn.q_norm": SIZE, "self_attn.k_norm": SIZE}
    tensors = {f"{n}.weight": torch.randn(s, generator=generator) * s[-1] ** -0.5 for n, s in shapes.items()}
    for name, size in {"norm": HIDDEN, **{f"layers.0.{name}": size for name, size in norms.items()}}.items():
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
    ids = torch.randperm(VOCAB_WITH_TOKENIZER, generator=generator)[:VOCAB].sort().values
    tensors["d2t"] = ids - torch.arange(VOCAB)
    tensors["t2d"] = torch.isin(torch.arange(VOCAB_WITH_TOKENIZER), ids)
    save_file(tensors, folder / "model.safetensors")
    layer = {**LAYER, "model_type": kind, "num_hidden_layers": 1}
    given = {
        **{"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "draft_vocab_size": VOCAB},
        **{"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "transformer_layer_config": layer},
    }
    (folder / "config.json").write_text(json.dumps({**given, **config}))
    return folder


class PlainHead:
    def __init__(self, target: Path, head: Path) -> None:
        self.target = PlainTarget(target)
        self.config = json.loads((head / "config.json").read_text())
        self.weights = {name.removesuffix(".weight"): w for name, w in load_file(head / "model.safetensors").items()}

    @torch.no_grad()
    def draft(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """Computed anew from the first token on; the states of the target end before the last token."""
        own = torch.cat(self.target.states(token_ids), -1) @ self.weights["fc"].T
        following, draft = token_ids[1:], []
        for _ in range(num_tokens):
            hidden = self._layer(self.target.embed(following), own)[-1]
            token_id = int((norm(hidden, self.weights["norm"]) @ self.weights["lm_head"].T).argmax())
            draft.append(token_id + int(self.weights["d2t"][token_id]))
            following = [*following, draft[-1]]
            own = torch.cat((own, hidden[None]))
        return draft

    def _layer(self, embedded: Tensor, states: Tensor) -> Tensor:
        w = {name.removeprefix("layers.0."): tensor for name, tensor in self.weights.items()}
        normed = norm(states, w["hidden_norm"])
        residual = normed if self.config.get("norm_before_residual") else states
        x, n = torch.cat((norm(embedded, w["input_layernorm"]), normed), -1), len(states)
        q, k, v = (x @ w[f"self_attn.{name}_proj"].T for name in "qkv")
        q, k, v = q.view(n, HEADS, SIZE), k.view(n, KV_HEADS, SIZE), v.view(n, KV_HEADS, SIZE)
        if "self_attn.q_norm" in w:
            q, k = norm(q, w["self_attn.q_norm"]), norm(k, w["self_attn.k_norm"])
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * SIZE**-0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        residual = residual + attended @ w["self_attn.o_proj"].T
        x = norm(residual, w["post_attention_layernorm"])
        gated = torch.nn.functional.silu(x @ w["mlp.gate_proj"].T) * (x @ w["mlp.up_proj"].T)
        return residual + gated @ w["mlp.down_proj"].T


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


HOW = [("llama", {}, False), ("qwen3", {"norm_before_residual": True}, True)]


@pytest.mark.parametrize(("kind", "config", "captured"), HOW)
def test_drafts_are_those_of_the_plain_head_and_tokens_those_without_it(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, config: dict[str, Any], captured: bool
) -> None:
    head = save_head(tmp_path / "head", kind, **config)
    expected = run(target)
    if captured:
        fake_graphs(monkeypatch)
    check_drafts(target, ("eagle3", head), expected, PlainHead(target, head).draft, monkeypatch, captured)


def test_in_chunks_and_after_a_preemption_tokens_are_the_same(target: Path, tmp_path: Path) -> None:
    check_small(target, ("eagle3", save_head(tmp_path / "head")))


def test_what_is_no_head_for_the_model_is_said_before_weights_are_read(target: Path, tmp_path: Path) -> None:
    wrong = [
        ({"speculators_model_type": "dspark"}, ValueError, "is no EAGLE-3 head .* is 'dspark'"),
        ({"fc_norm": True}, NotImplementedError, "fc_norm is not supported"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 9]}, ValueError, r"layers \[0, 1, 9\], and the model has 2"),
    ]
    for number, (config, error, message) in enumerate(wrong):
        with pytest.raises(error, match=message):
            run(target, ("eagle3", save_head(tmp_path / str(number), **config)))
