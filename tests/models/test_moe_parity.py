"""Mixture-of-experts families beside Hugging Face, on tiny random checkpoints, and what is refused of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.parity import NUM_OUTPUT, ONE, check_greedy_tokens, check_logits, make_llm
from tests.tiny_models import (
    edit_json,
    hugging_face_greedy,
    load_hugging_face,
    random_prompts,
    record_logits,
    save_random,
)

QWEN: dict[str, Any] = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
DEEPSEEK: dict[str, Any] = {
    **{"n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "first_k_dense_replace": 1},
    **{"num_hidden_layers": 3, "routed_scaling_factor": 1.2},
}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**QWEN, "norm_topk_prob": True}),
    "qwen3-moe-some-layers-dense": (
        "Qwen3MoeForCausalLM",
        {
            **{**QWEN, "num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2},
            **{"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True},
        },
    ),
    "qwen3-moe-window": ("Qwen3MoeForCausalLM", {**QWEN, "use_sliding_window": True, "sliding_window": 7}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "mixtral-window-one-expert": (
        "MixtralForCausalLM",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5, "head_dim": 24},
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-renormalized-all-experts": (
        "OlmoeForCausalLM",
        {"num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": True, "num_key_value_heads": 4},
    ),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**QWEN, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen2-moe-some-layers-dense": (
        "Qwen2MoeForCausalLM",
        {**QWEN, "num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2, "qkv_bias": False},
    ),
    "glm4-moe": ("Glm4MoeForCausalLM", {**DEEPSEEK, "head_dim": 16, "attention_bias": True, "n_shared_experts": 2}),
    "glm4-moe-groups-qk-norm": (
        "Glm4MoeForCausalLM",
        {
            **{**DEEPSEEK, **GROUPS, "use_qk_norm": True, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
            **{"num_mtp_layers": 0, "first_k_dense_replace": 0, "num_key_value_heads": 4},
        },
    ),
    "dots1": ("Dots1ForCausalLM", {**DEEPSEEK, "norm_topk_prob": True, "n_shared_experts": 2}),
    "dots1-groups-window": (
        "Dots1ForCausalLM",
        {
            **{**DEEPSEEK, **GROUPS, "sliding_window": 7, "max_window_layers": 1, "routed_scaling_factor": 1.5},
            **{"attention_bias": True, "n_shared_experts": 1},
        },
    ),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 5.0, "attention_multiplier": 0.2},
    ),
    "ernie-moe": ("Ernie4_5_MoeForCausalLM", {"moe_num_experts": 8, "moe_k": 3, "num_hidden_layers": 3}),
    "ernie-moe-some-layers-dense": (
        "Ernie4_5_MoeForCausalLM",
        {
            **{"moe_num_experts": 6, "moe_k": 2, "num_hidden_layers": 5, "moe_layer_interval": 2},
            **{"moe_layer_start_index": 0, "moe_layer_end_index": 2, "moe_num_shared_experts": 0, "moe_norm_min": 0.3},
            "tie_word_embeddings": False,
        },
    ),
    "hunyuan-moe": ("HunYuanMoEV1ForCausalLM", {"num_experts": 6, "moe_topk": [3, 1], "head_dim": 16}),
    "granite-moe-shared": (
        "GraniteMoeSharedForCausalLM",
        {"attention_multiplier": 0.2, "tie_word_embeddings": True},
    ),
}


# Every way of running is shown by the first families and by one of each kind of shared experts; the others show theirs
# in the last, strictest way: logits in chunks, and tokens preempted, with a cold and a warm prefix cache.
IN_THE_STRICTEST_WAY = (
    *("qwen2-moe-some-layers-dense", "glm4-moe", "dots1", "dots1-groups-window", "granite-moe", "granite-moe-shared"),
    *("ernie-moe", "ernie-moe-some-layers-dense", "hunyuan-moe"),
)


def in_ways(ways: list[Any]) -> list[tuple[str, Any]]:
    return [(case, way) for case in CASES for way in (ways[-1:] if case in IN_THE_STRICTEST_WAY else ways)]


@pytest.fixture(scope="module")
def made() -> Callable[[Any, Callable[[], Any]], Any]:
    """Makes a thing once: a fixture with parameters would be made anew for each list of parameters that names it."""
    known: dict[Any, Any] = {}

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
        return known[key]

    return once


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, config = CASES[request.param]
    return made(request.param, lambda: save_random(tmp_path_factory.mktemp(request.param), architecture, **config))


@pytest.fixture
def hugging_face(checkpoint: Path, made: Any) -> Any:
    return made((checkpoint, "model"), lambda: load_hugging_face(checkpoint))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    prompts = random_prompts([1, 40, 3, 17, 32, 8])
    return [*prompts, prompts[1][:32] + prompts[2]]  # the last shares whole blocks with another one


@pytest.fixture
def expected(checkpoint: Path, hugging_face: Any, prompts: list[list[int]], made: Any) -> list[list[int]]:
    return made(
        (checkpoint, "tokens"), lambda: [hugging_face_greedy(hugging_face, prompt, NUM_OUTPUT) for prompt in prompts]
    )


@pytest.mark.parametrize(("checkpoint", "max_num_batched_tokens"), in_ways([256, 5]), indirect=["checkpoint"])
def test_logits_of_prompt_and_output_equal_hugging_face(
    checkpoint: Path, hugging_face: Any, max_num_batched_tokens: int
) -> None:
    check_logits(checkpoint, hugging_face, max_num_batched_tokens)


WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "chunks-overlap": {"max_num_seqs": 4, "max_num_batched_tokens": 7, "overlap_depth": 2},
    "preempting": {"num_gpu_blocks_override": 8, "block_size": 8, "enable_prefix_caching": False},
    "preempting-cached": {"num_gpu_blocks_override": 8, "block_size": 8},
}


@pytest.mark.parametrize(("checkpoint", "way"), in_ways(list(WAYS)), indirect=["checkpoint"])
def test_greedy_tokens_equal_hugging_face_in_every_way_of_running(
    checkpoint: Path, prompts: list[list[int]], expected: list[list[int]], way: str
) -> None:
    """As a batch, in small chunks, overlapped, preempted, and again with a warm prefix cache."""
    check_greedy_tokens(checkpoint, prompts, expected, preempts=way.startswith("preempting"), **WAYS[way])


@pytest.mark.parametrize("case", ["qwen3-moe-some-layers-dense", "mixtral", "olmoe", "granite-moe-shared"])
def test_experts_in_one_tensor_are_the_same_model(tmp_path: Path, case: str) -> None:
    """The layout that transformers 5 keeps in memory, beside that of the Hub."""
    architecture, config = CASES[case]
    apart = save_random(tmp_path / "apart", architecture, **config)
    together = tmp_path / "together"
    load_hugging_face(apart).save_pretrained(together, save_original_format=False)
    names = load_file(together / "model.safetensors").keys()
    assert any(name.endswith("experts.gate_up_proj") for name in names) and not any(".experts.0." in n for n in names)
    prompt = random_prompts([30])[0]
    outputs = []
    for folder in (apart, together):
        with make_llm(folder) as llm:
            logits = record_logits(llm)
            llm.generate([prompt], ONE, use_tqdm=False)
        outputs.append(logits())
    assert torch.equal(*outputs)


@pytest.mark.parametrize("case", ["qwen3-moe", "mixtral", "olmoe"])
def test_random_weights_run(tmp_path: Path, case: str) -> None:
    architecture, config = CASES[case]
    folder = save_random(tmp_path, architecture, **config)
    (folder / "model.safetensors").unlink()
    with make_llm(folder, load_format="dummy") as llm:
        logits = record_logits(llm)
        llm.generate([[1, 2, 3]], ONE, use_tqdm=False)
    assert logits().isfinite().all() and logits().std() > 0.1


# -- checkpoints that were tampered with --


Edit = Callable[[dict[str, Any]], None]


def change(name: str, new: Callable[[Tensor], Tensor] | None, to: str | None = None) -> Edit:
    """Replace a tensor by `new` of it, under another name if one is given; None removes it."""

    def edit(tensors: dict[str, Any]) -> None:
        tensor = tensors[name] if to else tensors.pop(name)
        if new is not None:
            tensors[to or name] = new(tensor).contiguous()

    return edit


QWEN_EXPERT, MIXTRAL_EXPERT = "model.layers.1.mlp.experts.5.", "model.layers.1.block_sparse_moe.experts.3."
TAMPERED: dict[str, tuple[str, Edit, str]] = {
    "an-expert-lacks-a-matrix": (
        "qwen3-moe", change(f"{QWEN_EXPERT}up_proj.weight", None), f"no tensor '{QWEN_EXPERT}up_proj.weight'"
    ),
    "no-router": ("olmoe", change("model.layers.1.mlp.gate.weight", None), "'model.layers.1.mlp.gate.weight'"),
    "an-expert-lacks-w2": (
        "mixtral", change(f"{MIXTRAL_EXPERT}w2.weight", None), f"no tensor '{MIXTRAL_EXPERT}w2.weight'"
    ),
    "one-expert-too-many": (
        "qwen3-moe",
        change(f"{QWEN_EXPERT}up_proj.weight", torch.clone, "model.layers.1.mlp.experts.6.up_proj.weight"),
        "'model.layers.1.mlp.experts.6.up_proj.weight', which this model does not have",
    ),
    "no-shared-expert": (
        "glm4-moe",
        change("model.layers.1.mlp.shared_experts.up_proj.weight", None),
        "no tensor 'model.layers.1.mlp.shared_experts.up_proj.weight'",
    ),
    "no-bias-of-the-router": (
        "glm4-moe",
        change("model.layers.2.mlp.gate.e_score_correction_bias", None),
        "no tensor 'model.layers.2.mlp.gate.e_score_correction_bias'",
    ),
    "a-shared-expert": (
        "qwen3-moe",
        change(f"{QWEN_EXPERT}up_proj.weight", torch.clone, "model.layers.1.mlp.shared_expert.up_proj.weight"),
        "'model.layers.1.mlp.shared_expert.up_proj.weight', which",
    ),
    "a-router-bias": (
        "qwen3-moe",
        change("model.layers.0.mlp.gate.weight", lambda t: t[:, 0], "model.layers.0.mlp.gate.e_score_correction_bias"),
        "'model.layers.0.mlp.gate.e_score_correction_bias', which",
    ),
    "a-misshapen-expert": (
        "mixtral", change(f"{MIXTRAL_EXPERT}w1.weight", lambda t: t[:-1]), f"'{MIXTRAL_EXPERT}w1.weight' has shape"
    ),
    "a-transposed-expert": (
        "olmoe",
        change("model.layers.0.mlp.experts.0.down_proj.weight", lambda t: t.T),
        "'model.layers.0.mlp.experts.0.down_proj.weight' has shape",
    ),
    "a-router-for-fewer-experts": (
        "qwen3-moe", change("model.layers.0.mlp.gate.weight", lambda t: t[:4]), "'model.layers.0.mlp.gate.weight' has"
    ),
    "both-layouts-at-once": (
        "qwen3-moe",
        change(
            f"{QWEN_EXPERT}down_proj.weight", lambda t: t.expand(6, *t.shape), "model.layers.1.mlp.experts.down_proj"
        ),
        "down_proj.weight' twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_tensors_are_named(tmp_path: Path, case: str) -> None:
    architecture, edit, message = TAMPERED[case]
    folder = save_random(tmp_path, CASES[architecture][0], **CASES[architecture][1])
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(message)):
        make_llm(folder)


def test_heads_for_further_tokens_are_left_out_and_said(tmp_path: Path) -> None:
    """As in GLM-4.5, which keeps them behind the last layer."""
    folder = save_random(tmp_path, *CASES["glm4-moe"][:1], **CASES["glm4-moe"][1])
    tensors = load_file(folder / "model.safetensors")
    for name in ("eh_proj.weight", "embed_tokens.weight", "mlp.experts.0.up_proj.weight", "shared_head.head.weight"):
        tensors[f"model.layers.3.{name}"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"4 tensors of multi-token prediction \(MTP\) are left out"):
        make_llm(folder).close()
    edit_json(folder / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"'model\.layers\.3\.eh_proj\.weight', which this model does not have"):
        make_llm(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = save_random(tmp_path, *CASES["mixtral"][:1], **CASES["mixtral"][1])
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) - 64])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        make_llm(folder)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen3-moe", {"architectures": ["JetMoeForCausalLM"]}, "JetMoeForCausalLM"),
        ("qwen3-moe", {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "'su'"),
        ("qwen3-moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
        ("qwen3-moe", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ("qwen3-moe", {"num_local_experts": 0}, "num_local_experts must be an integer from 1 to 2048, got 0"),
        ("qwen3-moe", {"num_experts_per_tok": 7}, "num_experts_per_tok=7 is more than num_local_experts=6"),
        ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer from 1 to 16777216, got 0"),
        (
            "qwen3-moe",
            {"moe_intermediate_size": None},
            "moe_intermediate_size must be an integer from 1 to 16777216, got None",
        ),
        ("qwen3-moe", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "max_window_layers=1"),
        ("qwen3-moe", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than num_local_experts=4"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("qwen2-moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be an integer"),
        ("glm4-moe", {"n_group": 5}, "n_group=5 with topk_group=1 does not fit n_routed_experts=12"),
        ("glm4-moe-groups-qk-norm", {"topk_group": 5}, "n_group=4 with topk_group=5 does not fit"),
        (
            "glm4-moe-groups-qk-norm",
            {"num_experts_per_tok": 7},
            "does not fit n_routed_experts=12 and num_experts_per_",
        ),
        ("glm4-moe", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ("glm4-moe", {"routed_scaling_factor": 0.0}, "routed_scaling_factor must be a finite number more than 0"),
        ("glm4-moe", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; only 1 is"),
        ("ernie-moe", {"use_bias": True}, "use_bias=True is not supported; only False is"),
        ("hunyuan-moe", {"moe_topk": [2]}, "moe_topk must be an integer from 1"),
        ("dots1", {"n_shared_experts": -1}, "n_shared_experts must be an integer from 0"),
        ("dots1", {"first_k_dense_replace": None}, "first_k_dense_replace must be an integer from 0"),
    ],
)
def test_configs_that_are_not_understood_are_refused_by_name(
    tmp_path: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    folder = save_random(tmp_path, CASES[case][0], **CASES[case][1])
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        make_llm(folder)


def test_the_older_spelling_of_the_number_of_experts_is_read(tmp_path: Path) -> None:
    """As in the config.json files on the Hub."""
    folder = save_random(tmp_path, CASES["qwen3-moe"][0], **CASES["qwen3-moe"][1])
    edit_json(folder / "config.json", num_local_experts=None, num_experts=6)
    make_llm(folder).close()
    edit_json(folder / "config.json", num_experts=5)
    with pytest.raises(ValueError, match=r"experts\.5\.down_proj\.weight', which this model does not have"):
        make_llm(folder)
