"""Random checkpoints of models that hold a text model beside a vision tower, as small as they can be."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_models import usual_value

TEXT: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14, "num_channels": 3},
}
_QWEN_VISION = {
    **{"depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 4, "spatial_merge_size": 1},
    "image_size": None,
}
_DELTA_NET: dict[str, Any] = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    **{"layer_types": ["linear_attention", "full_attention"]},
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
}
# architecture: (text fields, vision fields, fields of the whole)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": (
        {
            **{
                "sliding_window": 9,
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
        {},
        {"mm_tokens_per_image": 4, "tie_word_embeddings": True},
    ),
    "Gemma4ForConditionalGeneration": (
        {
            **{"global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
            **{"num_kv_shared_layers": 1, "num_hidden_layers": 3, "sliding_window": 9, "pad_token_id": 0},
            "final_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        {"num_key_value_heads": 2, "head_dim": 8},
        {"tie_word_embeddings": True, "audio_config": None},
    ),
    "Mistral3ForConditionalGeneration": (
        {"sliding_window": None},
        {"head_dim": 8},
        {"tie_word_embeddings": False, "image_token_index": 5},
    ),
    "Qwen3VLForConditionalGeneration": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "mrope_section": [4, 2, 2]}},
        {
            **{"depth": 1, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
            **{"num_position_embeddings": 4, "spatial_merge_size": 1},
        },
        {"tie_word_embeddings": False},
    ),
    "Qwen3_5ForConditionalGeneration": (_DELTA_NET, _QWEN_VISION, {"tie_word_embeddings": False}),
    "Qwen3_5MoeForConditionalGeneration": (
        {**_DELTA_NET, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        _QWEN_VISION,
        {"tie_word_embeddings": False},
    ),
}


def save_wrapped(folder: Path, architecture: str, **more: Any) -> Path:
    """more: fields of the text model's config."""
    text, vision, whole = CASES[architecture]
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(text_config={**TEXT, **text, **more}, vision_config={**VISION, **vision}, **whole)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
            usual = usual_value(architecture, name)
            parameter.copy_(noise * scale if parameter.dim() >= 2 else 0.2 * noise + usual)
    model.save_pretrained(folder)
    return folder
