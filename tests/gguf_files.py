"""Small GGUF files for tests, written with the `gguf` package as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Quantization = gguf.GGMLQuantizationType

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, VOCABULARY = 64, 4, 2, 16, 96, 2, 32

_HF_OF_GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """GGUF name -> float32 array, rows as Hugging Face has them."""
    random = np.random.default_rng(seed)
    shapes = {
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (INTERMEDIATE, HIDDEN),
        "ffn_up": (INTERMEDIATE, HIDDEN),
        "ffn_down": (HIDDEN, INTERMEDIATE),
        "attn_norm": (HIDDEN,),
        "ffn_norm": (HIDDEN,),
    }
    tensors = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    tensors |= {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in tensors.items()}


def hf_name(name: str) -> str:
    """Hugging Face name of a tensor of `tiny_tensors`."""
    if name in ("token_embd.weight", "output_norm.weight", "output.weight"):
        return {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[
            name[:-7]
        ] + ".weight"
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{_HF_OF_GGUF[module]}.{kind}"


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves to interleaved pairs: what llama.cpp's converter does to queries and keys."""
    order = []
    head_dim = len(rows) // num_heads
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return rows[order]


def metadata(architecture: str, **extra: Any) -> dict[str, Any]:
    """Metadata of `tiny_tensors`; a value of None in `extra` removes a key, "." is written "__"."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    values |= {key.replace("__", "."): value for key, value in extra.items()}
    return {f"{architecture}.{key}": value for key, value in values.items() if value is not None}


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantization: Quantization | None = None,
) -> Path:
    """Write a file, matrices quantized as `quantization`, queries and keys of the llama architecture permuted."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        for module, num_heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            if architecture == "llama" and f".{module}." in name:
                tensor = permute(tensor, num_heads)
        if quantization is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_keys(pre: str = "gpt-2", **extra: Any) -> dict[str, Any]:
    """Tokenizer metadata of a byte-level vocabulary: 256 bytes, six merges, BOS 262, EOS 263, user-defined 264."""
    from nanovllm.tokenizer import _BYTE_OF_CHARACTER

    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    tokens = [*_BYTE_OF_CHARACTER, *(merge.replace(" ", "") for merge in merges), "<bos>", "<eos>", "<think>"]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * 262 + [3, 3, 4],
        "merges": merges,
        "bos_token_id": 262,
        "eos_token_id": 263,
        "padding_token_id": 263,
    }
    keys |= extra
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def sentencepiece_keys(**extra: Any) -> dict[str, Any]:
    """Tokenizer metadata of a sentencepiece vocabulary: <unk>, <s>, </s>, 256 bytes, some pieces with scores."""
    pieces = ["▁", "a", "b", "c", "ab", "▁ab", "abc", "▁abc", "é"]
    keys = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "scores": [0.0] * 259 + [-float(index) for index in range(len(pieces))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    keys |= extra
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
