"""Prediction heads of a model's own checkpoint: what they draft, beside transformers' layers, and the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.weights.checkpoint import SafetensorsCheckpoint
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

QWEN: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "num_key_value_heads": 2,
}
SHAPE = {"vocab_size": VOCAB_WITH_TOKENIZER, "eos_token_id": EOS, "hidden_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("Glm4MoeForCausalLM", GLM),
    "deepseek": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "qwen3.5": ("Qwen3_5ForCausalLM", QWEN),
}
OF_GLM = {"embedding": "enorm", "states": "hnorm", "projection": "eh_proj", "norm": "shared_head.norm"}
OF_QWEN = {
    **{"embedding": "pre_fc_norm_embedding", "states": "pre_fc_norm_hidden", "projection": "fc", "norm": "norm"},
}


def save_with_head(folder: Path, family: str) -> Path:
    """Two layers, and a third that is the head's."""
    architecture, config = FAMILIES[family]
    is_glm = family != "qwen3.5"
    save_random(folder, architecture, **SHAPE, **config)
    more = {"layer_types": QWEN["layer_types"][:2], "mtp_num_hidden_layers": 1}
    if is_glm:
        more = {"num_nextn_predict_layers": 1}
    edit_json(folder / "config.json", num_hidden_layers=2, **more)
    generator, tensors = torch.Generator().manual_seed(5), load_file(folder / "model.safetensors")
    behind, names = ("model.layers.2", OF_GLM) if is_glm else ("mtp", OF_QWEN)
    if not is_glm:  # of which the third layer is called another way
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            tensors[name.replace("model.layers.2.", "mtp.layers.0.")] = tensors.pop(name)
    for part in ("embedding", "states", "norm"):
        tensors[f"{behind}.{names[part]}.weight"] = is_glm + 0.1 * torch.randn(32, generator=generator)
    tensors[f"{behind}.{names['projection']}.weight"] = torch.randn(32, 64, generator=generator) * 0.15
    if is_glm:
        tensors[f"{behind}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{behind}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class PlainHead:
    """The head's layer is the third of a model that transformers runs; the rest of it is written out."""

    def __init__(self, folder: Path, family: str) -> None:
        self.is_glm = family != "qwen3.5"
        weights = load_file(folder / "model.safetensors")
        config = transformers.AutoConfig.from_pretrained(folder)
        self.target = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).float().eval()
        config.num_hidden_layers = 3
        if not self.is_glm:
            config.layer_types = QWEN["layer_types"]
        self.whole = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).float().eval()
        behind, names = ("model.layers.2", OF_GLM) if self.is_glm else ("mtp", OF_QWEN)
        self.weights = {part: weights[f"{behind}.{name}.weight"] for part, name in names.items()}
        layer = {n.removeprefix("mtp.layers.0."): w for n, w in weights.items() if n.startswith("mtp.layers.0.")}
        if layer:
            self.whole.model.layers[2].load_state_dict(layer)

    @torch.no_grad()
    def draft(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """Computed anew from the first token on; the states of the target end before the last token."""
        states = self.target.model(torch.tensor([token_ids])).last_hidden_state[0, :-1]
        following, draft = token_ids[1:], []
        for _ in range(num_tokens):
            hidden = self._layer(following, states)[-1]
            normed = self._norm(hidden, "norm")
            draft.append(int(self.target.lm_head(normed).argmax()))
            following = [*following, draft[-1]]
            states = torch.cat((states, (hidden if self.is_glm else normed)[None]))
        return draft

    def _norm(self, x: Tensor, part: str) -> Tensor:
        return norm(x, self.weights[part] + (not self.is_glm))  # Qwen's are apart from 1

    def _layer(self, following: list[int], states: Tensor) -> Tensor:
        embedded = self.target.model.embed_tokens(torch.tensor(following))
        if self.is_glm:
            embedded[0] = 0
        both = torch.cat((self._norm(embedded, "embedding"), self._norm(states, "states")), -1)
        x, n = (both @ self.weights["projection"].T)[None], len(following)
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
        positions = torch.arange(n)[None]
        # Qwen3.5's positions have three axes, which releases of transformers do not all make of one.
        rotation = self.whole.model.rotary_emb(x, positions if self.is_glm else positions.expand(3, 1, n))
        result = self.whole.model.layers[2](
            x, attention_mask=mask, position_ids=positions, position_embeddings=rotation
        )
        return (result if torch.is_tensor(result) else result[0])[0]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    return save_with_head(tmp_path_factory.mktemp("model"), family)


@pytest.mark.parametrize("captured", [False, True])
def test_drafts_are_those_of_the_plain_head_and_tokens_those_without_it(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    expected = run(folder)
    if captured:
        fake_graphs(monkeypatch)
    check_drafts(folder, ("mtp", None), expected, PlainHead(folder, family).draft, monkeypatch, captured)


def test_in_chunks_and_after_a_preemption_tokens_are_the_same(folder: Path) -> None:
    check_small(folder, ("mtp", None))


def test_the_checkpoint_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, init = [], SafetensorsCheckpoint.__init__

    def noted(checkpoint: SafetensorsCheckpoint, path: Path, files: list[Path]) -> None:
        opened.append(path)
        init(checkpoint, path, files)

    monkeypatch.setattr(SafetensorsCheckpoint, "__init__", noted)
    folder = save_with_head(tmp_path / "glm", "glm")
    run(folder, ("mtp", None))
    assert opened == [folder]


def test_what_has_no_head_is_said_before_weights_are_read(tmp_path: Path) -> None:
    def refused(folder: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            run(folder, ("mtp", None))

    refused(save_random(tmp_path / "llama"), ValueError, "has no prediction head: its config.json names no")
    glm = save_with_head(tmp_path / "glm", "glm")
    edit_json(glm / "config.json", num_nextn_predict_layers=2)
    refused(glm, NotImplementedError, "has 2 prediction heads, one behind the other")
    bare = save_random(tmp_path / "bare", "Glm4MoeForCausalLM", **{**GLM, "num_hidden_layers": 2})
    edit_json(bare / "config.json", num_nextn_predict_layers=1)
    refused(bare, ValueError, "has no tensors of a prediction head; use another method")
