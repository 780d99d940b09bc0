"""Prediction heads of a model's own checkpoint: what they draft, beside transformers' layers, and the same tokens."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.heads import check_drafts, check_small, norm, run
from tests.runner.fake_graphs import fake_graphs
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, edit_json, save_random

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-token prediction")

GLM = {
    **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2},
}
# Latent attention in the target's layers and in the head's.
DEEPSEEK = {**GLM, "num_mtp_layers": 0, "num_key_value_heads": 4}


def save_glm(folder: Path, architecture: str = "Glm4MoeForCausalLM") -> Path:
    """Two layers, and a third that is the head's."""
    shape = {"vocab_size": VOCAB_WITH_TOKENIZER, "eos_token_id": EOS, "hidden_size": 32}
    save_random(folder, architecture, **shape, **(GLM if architecture == "Glm4MoeForCausalLM" else DEEPSEEK))
    edit_json(folder / "config.json", num_hidden_layers=2, num_nextn_predict_layers=1)
    generator, layer = torch.Generator().manual_seed(5), "model.layers.2"
    tensors = load_file(folder / "model.safetensors")
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{layer}.{name}.weight"] = 1 + 0.1 * torch.randn(32, generator=generator)
    tensors[f"{layer}.eh_proj.weight"] = torch.randn(32, 64, generator=generator) * 0.15
    tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class PlainHead:
    """The head's layer is the third of a model that transformers runs; the rest of it is written out."""

    def __init__(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        config = transformers.AutoConfig.from_pretrained(folder)
        self.target = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).float().eval()
        config.num_hidden_layers = 3
        self.whole = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).float().eval()
        self.weights = {
            name.removeprefix("model.layers.2.").removesuffix(".weight"): tensor for name, tensor in weights.items()
        }

    @torch.no_grad()
    def draft(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """Computed anew from the first token on; the states of the target end before the last token."""
        states = self.target.model(torch.tensor([token_ids])).last_hidden_state[0, :-1]
        following, draft = token_ids[1:], []
        for _ in range(num_tokens):
            hidden = self._layer(following, states)[-1]
            draft.append(int(self.target.lm_head(norm(hidden, self.weights["shared_head.norm"])).argmax()))
            following = [*following, draft[-1]]
            states = torch.cat((states, hidden[None]))
        return draft

    def _layer(self, following: list[int], states: Tensor) -> Tensor:
        embedded = self.target.model.embed_tokens(torch.tensor(following))
        embedded[0] = 0
        both = torch.cat((norm(embedded, self.weights["enorm"]), norm(states, self.weights["hnorm"])), -1)
        x, n = (both @ self.weights["eh_proj"].T)[None], len(following)
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
        positions = torch.arange(n)[None]
        rotation = self.whole.model.rotary_emb(x, positions)
        result = self.whole.model.layers[2](
            x, attention_mask=mask, position_ids=positions, position_embeddings=rotation
        )
        return (result if torch.is_tensor(result) else result[0])[0]


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_glm(tmp_path_factory.mktemp("glm"))


def test_drafts_of_a_head_with_latent_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_glm(tmp_path, "DeepseekV3ForCausalLM")
    check_drafts(folder, ("mtp", None), run(folder), PlainHead(folder).draft, monkeypatch, captured=False)


@pytest.mark.parametrize("captured", [False, True])
def test_drafts_are_those_of_the_plain_head_and_tokens_those_without_it(
    glm: Path, monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    expected = run(glm)
    if captured:
        fake_graphs(monkeypatch)
    check_drafts(glm, ("mtp", None), expected, PlainHead(glm).draft, monkeypatch, captured)


def test_in_chunks_and_after_a_preemption_tokens_are_the_same(glm: Path) -> None:
    check_small(glm, ("mtp", None))


def test_what_has_no_head_is_said_before_weights_are_read(tmp_path: Path) -> None:
    def refused(folder: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            run(folder, ("mtp", None))

    refused(save_random(tmp_path / "llama"), ValueError, "has no prediction head: its config.json names no")
    glm = save_glm(tmp_path / "glm")
    edit_json(glm / "config.json", num_nextn_predict_layers=2)
    refused(glm, NotImplementedError, "has 2 prediction heads, one behind the other")
    bare = save_random(tmp_path / "bare", "Glm4MoeForCausalLM", **{**GLM, "num_hidden_layers": 2})
    edit_json(bare / "config.json", num_nextn_predict_layers=1)
    refused(bare, ValueError, "has no tensors of a prediction head; use another method")
