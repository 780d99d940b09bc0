"""DFlash heads: what they draft, against the head written out in plain PyTorch, and the same tokens with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM
from nanovllm.engine.speculation.draft_scheduler import DraftModelScheduler
from tests.runner.fake_graphs import fake_graphs
from tests.test_llm_eagle3 import HEADS, HIDDEN, INNER, KV_HEADS, PARAMS, PROMPTS, SIZE, norm, rotated
from tests.test_llm_outputs import check_nothing_is_left
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, save_random

NUM_LAYERS, MASK, NUM_TOKENS = 2, 270, 4


def save_head(folder: Path, vocab_size: int = VOCAB_WITH_TOKENIZER, **config: Any) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    shapes = {"fc": (HIDDEN, 2 * HIDDEN)}
    norms = {"norm": HIDDEN, "hidden_norm": HIDDEN}
    for i in range(NUM_LAYERS):
        shapes |= {
            f"layers.{i}.self_attn.q_proj": (HEADS * SIZE, HIDDEN),
            f"layers.{i}.self_attn.k_proj": (KV_HEADS * SIZE, HIDDEN),
            f"layers.{i}.self_attn.v_proj": (KV_HEADS * SIZE, HIDDEN),
            f"layers.{i}.self_attn.o_proj": (HIDDEN, HEADS * SIZE),
            f"layers.{i}.mlp.gate_proj": (INNER, HIDDEN),
            f"layers.{i}.mlp.up_proj": (INNER, HIDDEN),
            f"layers.{i}.mlp.down_proj": (HIDDEN, INNER),
        }
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
    layers = {
        **{"model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS},
        **{"num_key_value_heads": KV_HEADS, "head_dim": SIZE, "num_hidden_layers": NUM_LAYERS, "rms_norm_eps": 1e-6},
        **{"vocab_size": VOCAB_WITH_TOKENIZER, "max_position_embeddings": 256, "rope_theta": 10000.0},
        **{"hidden_act": "silu", "attention_bias": False},
    }
    given = {
        **{"architectures": ["DFlashSpeculator"], "speculators_model_type": "dflash", "draft_vocab_size": vocab_size},
        **{"block_size": 8, "mask_token_id": MASK, "aux_hidden_state_layer_ids": [1, 2]},
        "transformer_layer_config": layers,
    }
    (folder / "config.json").write_text(json.dumps({**given, **config}))
    return folder


class PlainHead:
    def __init__(self, target: Path, head: Path) -> None:
        import transformers

        self.target = transformers.AutoModelForCausalLM.from_pretrained(target).float().eval()
        self.weights = {name.removesuffix(".weight"): w for name, w in load_file(head / "model.safetensors").items()}

    @torch.no_grad()
    def draft(self, token_ids: list[int], num_tokens: int) -> list[int]:
        last: list[Tensor] = []
        hook = self.target.model.layers[-1].register_forward_hook(
            lambda module, given, out: last.append(out if torch.is_tensor(out) else out[0])
        )
        states = self.target(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        hook.remove()
        known = norm((torch.cat((states[1], last[0]), -1) @ self.weights["fc"].T)[0, :-1], self.weights["hidden_norm"])
        x = self.target.model.embed_tokens(torch.tensor([token_ids[-1], *[MASK] * num_tokens]))
        for i in range(NUM_LAYERS):
            x = self._layer(i, known, x)
        head = self.weights.get("lm_head", self.target.lm_head.weight)
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
    folder = tmp_path_factory.mktemp("target")
    return save_random(folder, vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS, head_dim=SIZE)


def run(target: Path, head: Path | None = None, num_tokens: int = NUM_TOKENS, **options: Any) -> list[list[int]]:
    """Twice, the second time with prompts from the prefix cache."""
    if head is not None:
        fields = {"method": "dflash", "model": str(head), "num_speculative_tokens": num_tokens, "adaptive": False}
        options["speculative_config"] = fields
    defaults = {"device": "cpu", "dtype": "float32", "block_size": 8, "max_num_seqs": 8, "skip_tokenizer_init": True}
    with LLM(str(target), **{**defaults, **options}) as llm:
        for _ in range(2):
            outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert head is None or llm.get_metrics()["spec_decode_num_drafts"] > 20
        check_nothing_is_left(llm)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("vocab_size", "captured"), [(VOCAB_WITH_TOKENIZER, False), (90, True)])
def test_drafts_are_those_of_the_plain_head_and_tokens_those_without_it(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, captured: bool
) -> None:
    head = save_head(tmp_path / "head", vocab_size)
    expected = run(target)
    if captured:
        fake_graphs(monkeypatch)
    seen: list[tuple[list[int], list[int]]] = []
    make_drafts = DraftModelScheduler._make_drafts

    def noted(scheduler: DraftModelScheduler) -> Any:
        drafts = make_drafts(scheduler)
        seen.extend((list(request.token_ids), list(draft)) for request, draft in drafts.items())
        return drafts

    monkeypatch.setattr(DraftModelScheduler, "_make_drafts", noted)
    assert run(target, head) == expected
    plain = PlainHead(target, head)
    assert len(seen) > 60
    for token_ids, draft in seen[::4]:
        assert draft == plain.draft(token_ids, len(draft))


def test_in_chunks_and_after_a_preemption_tokens_are_the_same(target: Path, tmp_path: Path) -> None:
    head = save_head(tmp_path / "head")
    expected = run(target)
    small = {"max_num_batched_tokens": 11, "num_gpu_blocks_override": 11, "max_model_len": 80}
    assert run(target, head, overlap_depth=2, **small) == expected


def test_what_is_no_head_for_the_model_is_said_before_weights_are_read(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no DFlash head .* is 'eagle3'"):
        run(target, save_head(tmp_path / "kind", speculators_model_type="eagle3"))
    with pytest.raises(ValueError, match="names no mask_token_id"):
        run(target, save_head(tmp_path / "mask", mask_token_id=None))
    with pytest.raises(ValueError, match="guesses at most 7 tokens, and num_speculative_tokens is 8"):
        run(target, save_head(tmp_path / "size"), num_tokens=8)
