#!/usr/bin/env bash
# llama.cpp computes gpt-oss with another rotation than the model was made with.
#
# Expected: a GGUF file of gpt-oss, which keeps its experts bit by bit, gives the logits of the checkpoint.
# Seen: YaRN stretches the frequencies between two dimensions of a head, of which config.json says "truncate": false: they
# stay fractions. A GGUF file has no key for it, and llama.cpp rounds them to whole dimensions, as it does for all models.
# The logits of a small model are 0.4 off; with "truncate": true for transformers, too, 6e-6 is left.
# Source: llama.cpp of llama-cpp-python 0.3.36, ggml.c, ggml_rope_yarn_corr_dims (floorf, ceilf); its converter,
# conversion/base.py, reads no "truncate"; transformers 5.24.0, modeling_rope_utils.py, find_correction_range. Whoever reads
# the file has to know the architecture's own value. Building the binding takes some minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.4.6 gguf==0.19.0 llama-cpp-python==0.3.36
"$folder/venv/bin/pip" download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$folder"
tar -xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder"
cat >"$folder/look.py" <<'PYTHON'
import sys
from pathlib import Path

import llama_cpp
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

folder = Path(sys.argv[1])
sources = folder / "llama_cpp_python-0.3.36/vendor/llama.cpp"
config = GptOssConfig(
    vocab_size=128, hidden_size=64, intermediate_size=32, head_dim=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=3, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
torch.manual_seed(0)
model = GptOssForCausalLM(config).float()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5)
model.save_pretrained(folder / "model")


def logits(truncate: bool) -> torch.Tensor:
    config.rope_parameters["truncate"] = truncate
    again = AutoModelForCausalLM.from_pretrained(folder / "model", config=config, dtype=torch.float32)
    with torch.no_grad():
        return again(torch.tensor([tokens])).logits[0]


tokens = torch.randint(128, (30,)).tolist()
assert config.rope_parameters["truncate"] is False
theirs = {truncate: logits(truncate) for truncate in (False, True)}

# llama.cpp's converter, without a vocabulary.
sys.path[:0] = [str(sources), str(sources / "gguf-py")]
import convert_hf_to_gguf  # noqa: E402
from conversion.gpt_oss import GptOssModel  # noqa: E402


def set_vocab(self) -> None:
    self.gguf_writer.add_tokenizer_model("no_vocab")
    self.gguf_writer.add_vocab_size(128)


GptOssModel.set_vocab = set_vocab
sys.argv[1:] = [str(folder / "model"), "--outfile", str(folder / "model.gguf"), "--outtype", "f32"]
convert_hf_to_gguf.main()

llama = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)
llama.eval(tokens)
found = torch.from_numpy(llama.scores[: len(tokens)].copy())
apart = {truncate: (found - logits).abs().max().item() for truncate, logits in theirs.items()}
print(f"largest difference to transformers: {apart[False]:.2g} as the model is, {apart[True]:.2g} with truncate: true")
assert apart[False] > 0.01 and apart[True] < 1e-3
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>"$folder/errors" || { tail -20 "$folder/errors" && exit 1; }
