#!/usr/bin/env bash
# transformers writes the dense layers of Kimi-Linear under the name of its layers of experts.
#
# Expected: save_pretrained gives back the names of the checkpoint that from_pretrained has read, as it does for the
# mixtures' other tensors: experts w1, w2 and w3 below block_sparse_moe, and an MLP without experts below mlp, where
# moonshotai/Kimi-Linear-48B-A3B-Instruct has its first layer's (modeling_kimi.py there: `self.mlp` or
# `self.block_sparse_moe`, by layer).
# Seen: model.layers.0.block_sparse_moe.gate_proj.weight. What reads the names of the released checkpoint finds no MLP in
# such a layer, and tensors that it does not know.
# Source: transformers 5.24.0, conversion_mapping.py: reading renames every ".block_sparse_moe." to ".mlp.", and writing
# turns that round for every ".mlp.". Readers do well to take both names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat >"$folder/look.py" <<'PYTHON'
import sys

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import KimiLinearConfig, KimiLinearForCausalLM

config = KimiLinearConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_token=2, kv_lora_rank=8,
    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, linear_head_dim=4, linear_num_heads=2,
    layer_types=["linear_attention", "full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
first, released, second = (f"{sys.argv[1]}/{name}" for name in ("first", "released", "second"))


def of_first_layer(folder):
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return sorted(n for n in file.keys() if n.startswith("model.layers.0.") and "_proj.weight" in n and "self_attn" not in n)


model = KimiLinearForCausalLM(config)
model.save_pretrained(first)
config.save_pretrained(released)
as_released = {
    name.replace("layers.0.block_sparse_moe.", "layers.0.mlp."): tensor
    for name, tensor in load_file(f"{first}/model.safetensors").items()
}
save_file(as_released, f"{released}/model.safetensors", metadata={"format": "pt"})
KimiLinearForCausalLM.from_pretrained(released).save_pretrained(second)
print("read:   ", of_first_layer(released))
print("written:", of_first_layer(second))
assert all(".mlp." in name for name in of_first_layer(released))
assert all(".block_sparse_moe." in name for name in of_first_layer(second))
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null
