"""Tiny checkpoints that transformers itself saves, and what Hugging Face computes with them.

`save_random` makes a model whose every parameter matters (biases and norms are random too). `save_scripted` makes one
that recites a given text, so that tests of stop strings and streaming know every token in advance. `save_tokenizer`
adds a byte-level tokenizer in which each byte is a token.
"""

import gc
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm import LLM

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
VOCAB_WITH_TOKENIZER = 272  # 256 bytes, the special tokens, and some rows that no token uses
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_DELTA_NET: dict[str, Any] = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    **{"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
}
_LATENT: dict[str, Any] = {
    **{"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 1},
}
# What an architecture's config has no default for, or one that does not fit a model as small.
_OWN_FIELDS: dict[str, dict[str, Any]] = {
    "MinistralForCausalLM": {"head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8, "num_experts": 8, "moe_topk": 2},
    "Ernie4_5_MoeForCausalLM": {"moe_num_experts": 8, "moe_k": 2},
    "Dots1ForCausalLM": {"first_k_dense_replace": 1},
    "GlmForCausalLM": {"head_dim": 16, "eos_token_id": 127},
    "Glm4ForCausalLM": {"head_dim": 16, "eos_token_id": 127},
    "Gemma4ForCausalLM": {
        **{"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
        **{"num_hidden_layers": 3, "num_kv_shared_layers": 1, "use_double_wide_mlp": True},
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    **dict.fromkeys(("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"), _DELTA_NET),
    "NemotronHForCausalLM": {
        **{"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"], "head_dim": 16},
        **{"mamba_num_heads": 4, "mamba_head_dim": 12, "ssm_state_size": 8, "n_groups": 2},
    },
    "KimiLinearForCausalLM": {
        **{name: _LATENT[name] for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")},
        **{"num_experts": 8, "num_experts_per_token": 2, "num_key_value_heads": 4, "linear_head_dim": 8},
        **{"linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    },
    "DeepseekV2ForCausalLM": _LATENT,
    "DeepseekV3ForCausalLM": {**_LATENT, "n_group": 4, "topk_group": 2},
    "Glm4MoeLiteForCausalLM": {name: value for name, value in _LATENT.items() if name != "first_k_dense_replace"},
    "GraniteMoeHybridForCausalLM": {
        **{"num_local_experts": 0, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_state": 12},
        **{"position_embedding_type": "rope", "shared_intermediate_size": 48, "attention_multiplier": 0.3},
    },
}
_EXPERT_SIZES = {
    **{"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "shared_expert_intermediate_size": 28},
    "shared_intermediate_size": 20,
}


def save_random(folder: Path, architecture: str = "LlamaForCausalLM", *, seed: int = 0, **config: Any) -> Path:
    """A random float32 checkpoint; `config` goes to the architecture's transformers config."""
    model = _new_model(architecture, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:  # three: the matrices of all experts
                parameter.copy_(noise * (1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5))
            else:
                parameter.copy_(0.2 * noise + usual_value(architecture, name))
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # of a router, which is no parameter
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("layer_scalar"):
                buffer.copy_(0.8 + 0.4 * torch.rand(buffer.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def usual_value(architecture: str, name: str) -> float:
    """About what a vector of a trained model holds: so states last, and norms that add 1 add it to something small."""
    if name.endswith("A_log"):
        return -3.0
    if name.endswith("dt_bias"):
        return -1.0
    adds_one = architecture.startswith(("Qwen3_5", "Qwen3Next")) and "linear_attn.norm" not in name
    return 0.0 if name.endswith("bias") or adds_one else 1.0


def save_scripted(folder: Path, text: str, *, ends: bool) -> Path:
    """A model that, after any byte of `text`, says the next one; at the end EOS, or (ends=False) the text again.

    No byte may stand in `text` twice. Any other token, so the prompt's last one, is followed by the first byte.
    """
    script = list(text.encode())
    assert len(set(script)) == len(script), "a byte that repeats has no single successor"
    model = _new_model(
        "LlamaForCausalLM",
        vocab_size=VOCAB_WITH_TOKENIZER,
        hidden_size=VOCAB_WITH_TOKENIZER,
        num_attention_heads=8,
        eos_token_id=EOS,
        num_hidden_layers=1,
    )
    following = [script[0]] * VOCAB_WITH_TOKENIZER
    for token_id, next_id in zip(script, [*script[1:], EOS if ends else script[0]], strict=True):
        following[token_id] = next_id
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_WITH_TOKENIZER))
        for token_id, next_id in enumerate(following):
            model.lm_head.weight[next_id, token_id] = 1.0
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _new_model(architecture: str, **config: Any) -> Any:
    import transformers

    model_class = getattr(transformers, architecture)
    config_class = model_class.config_class
    expert_sizes = {name: size for name, size in _EXPERT_SIZES.items() if hasattr(config_class, name)}
    fields = {**_SIZES, **expert_sizes, **_OWN_FIELDS.get(architecture, {}), **config}
    model = model_class(config_class(**fields, attn_implementation="eager"))
    _freeze_imports()
    return model.float().eval()


@cache
def _freeze_imports() -> None:
    """What transformers imports for its first model is not looked at by the collection in each engine's close()."""
    gc.collect()
    gc.freeze()


def save_tokenizer(folder: Path) -> None:
    """One token a byte, BOS before every prompt, four special tokens, a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = _characters_of_bytes()
    backend = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    assert backend.token_to_id("<|im_end|>") == IM_END
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)


def _characters_of_bytes() -> list[str]:
    """GPT-2's printable stand-in for each byte, asked of the tokenizers package."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [character for character in alphabet if ord(character) < 256]
    others = iter(character for character in alphabet if ord(character) >= 256)
    return [chr(byte) if chr(byte) in printable else next(others) for byte in range(256)]


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file that holds an object (created if missing)."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


# -- what Hugging Face says --


def load_hugging_face(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def hugging_face_logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """[len(token_ids), vocab_size], all positions in one pass."""
    return model(torch.tensor([list(token_ids)])).logits[0]


@torch.no_grad()
def hugging_face_greedy(model: Any, prompt: Sequence[int], num_tokens: int, **options: Any) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return out[0, len(prompt) :].tolist()


# -- looking into an engine --


def inner_model(llm: LLM) -> Any:
    """The nn.Module that an LLM on this process runs."""
    return llm.apply_model(lambda model: model)[0]


def record_logits(llm: LLM) -> Callable[[], Tensor]:
    """From now on keep the logits of every token that a single request at a time computes; call the result to get them.

    Returns [positions, vocab_size]; a position that is computed twice (after a preemption) keeps the later one.
    """
    by_position: dict[int, Tensor] = {}
    model = inner_model(llm)

    def keep(_: Any, arguments: tuple[Any, ...], hidden: Tensor) -> None:
        logits = model.compute_logits(hidden)
        by_position.update(zip(arguments[1].tolist(), logits.clone(), strict=True))

    model.register_forward_hook(keep)
    return lambda: torch.stack([by_position[position] for position in sorted(by_position)])


def random_prompts(lengths: Sequence[int], vocab_size: int = 128, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
