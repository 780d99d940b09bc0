"""Vocabularies, chat templates, converter and reader of llama.cpp, which its Python binding has in its sources.

    bash scripts/test_integrations.sh       fetches them (76 MB) from the package index; nothing is built

Model hubs are not asked: what is read here are the files that llama.cpp tests itself with, of models that people use,
and what its converter makes of small models. Its reader is asked too where llama-cpp-python is installed.
"""

import json
import re
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.chat_template import render_chat
from nanovllm.model_files.gguf_file import GGUFFile
from nanovllm.model_files.gguf_tokenizer import build_tokenizer
from nanovllm.server.reply import TemplateReader, read_whole
from nanovllm.server.response_templates import find_response_template
from tests.models.test_gpt_oss import save as save_gpt_oss
from tests.tiny_models import (
    edit_json,
    hugging_face_logits,
    load_hugging_face,
    random_prompts,
    save_random,
    save_tokenizer,
)
from tests.weights.test_gguf_models import GEMMA4, GPT_OSS, run

pytestmark = pytest.mark.integrations
PACKAGE = "llama-cpp-python==0.3.36"


@pytest.fixture(scope="module")
def sources(may_fetch: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's folder."""
    folder = tmp_path_factory.mktemp("sources")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", PACKAGE]
    subprocess.run([*fetch, "-d", str(folder)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()
    (found,) = folder.glob("*/vendor/llama.cpp")
    return found


# --- vocabularies ------------------------------------------------------------------


VOCABULARIES = "gemma-4 qwen35 qwen2 deepseek-llm deepseek-coder command-r llama-bpe llama-spm phi-3 gpt-2".split()


@pytest.mark.parametrize("name", [*VOCABULARIES, "starcoder", "refact", "mpt"])
def test_vocabulary(sources: Path, name: str) -> None:
    """The tokens that the models' own tokenizers give to 46 texts and more, as llama.cpp keeps them."""
    path = sources / "models" / f"ggml-vocab-{name}.gguf"
    tokenizer, _ = build_tokenizer(path, GGUFFile(path).metadata)
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = path.with_suffix(".gguf.out").read_text().split("\n")
    num_read = 0
    for text, ids in zip(texts, expected, strict=False):
        if name == "qwen35" and unicodedata.normalize("NFC", text) != text:
            continue  # their tokenizer normalizes text, and llama.cpp, which wrote these three, does not
        assert tokenizer.encode(text, add_special_tokens=False).ids == [int(token) for token in ids.split()], text
        num_read += 1
    assert num_read >= 46


# --- chat templates ----------------------------------------------------------------

BRACES = {"command": 'mkdir {a,b} && echo "]}"', "n": 3}
_NO_ARGUMENTS = {"type": "object", "properties": {}}
_ARGUMENTS = {
    "type": "object",
    "properties": {"command": {"type": "string", "description": "c"}, "n": {"type": "integer", "description": "n"}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "Does.", "parameters": parameters}}
    for name, parameters in (("run", _ARGUMENTS), ("now", _NO_ARGUMENTS))
]
QUESTION = {"role": "user", "content": "Do it."}
# (reasoning, text, number of calls) that a template writes down of an answer that has all three.
ALL, NO_THOUGHT = ("Well.", "I look.", 2), ("", "I look.", 2)
TEMPLATES: dict[str, tuple[str, str, int]] = {
    "Qwen3.5-4B": ALL,
    "Qwen3-Coder": NO_THOUGHT,
    "Qwen-Qwen3-0.6B": ALL,
    "openai-gpt-oss-120b": ("Well.", "", 1),
    "google-gemma-4-31B-it": ALL,
    "ibm-granite-granite-4.0": NO_THOUGHT,
    "ibm-granite-granite-4.1": NO_THOUGHT,
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ALL,
    "deepseek-ai-DeepSeek-V3.1": NO_THOUGHT,
    "GLM-4.6": ALL,
    "GLM-4.7-Flash": ALL,
    "moonshotai-Kimi-K2": NO_THOUGHT,
    "LFM2.5-8B-A1B": ALL,
    "ByteDance-Seed-OSS": ALL,
}
_ENDS = re.compile(r"\s*(?:<\|im_end\|>|<\|end_of_text\|>|<\uff5cend\u2581of\u2581sentence\uff5c>|<seed:eos>)\s*$")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template(sources: Path, tokenizer: Any, name: str) -> None:
    """What it writes down of an answer with reasoning, text and two calls is what is read of such an answer."""
    text = (sources / "models" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    reasoning, content, num_calls = TEMPLATES[name]
    calls = [("run", BRACES), ("now", {})][:num_calls]
    written = [{"type": "function", "id": f"call_{n}", "function": {"name": n, "arguments": a}} for n, a in calls]
    thought = "thinking" if name.startswith("LFM2.5") else "reasoning_content"
    answer = {"role": "assistant", "content": content, thought: "Well.", "tool_calls": written}
    options = {"chat_template": text, "tools": TOOLS, "enable_thinking": True}
    prompt = render_chat(tokenizer, [QUESTION], **options)
    whole = render_chat(tokenizer, [QUESTION, answer], add_generation_prompt=False, **options)
    same = [a == b for a, b in zip(prompt, whole, strict=False)]
    said = _ENDS.sub("", whole[same.index(False) if False in same else len(prompt) :])
    template = find_response_template(object(), text, has_tools=True)
    reply = read_whole(TemplateReader(template, prompt, TOOLS, True), said)
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == calls
    assert (reply.reasoning.strip(), reply.content.strip()) == (reasoning, content)


def test_chat_template_of_nemotron_nano_2(sources: Path, tokenizer: Any) -> None:
    """Its calls are a list by themselves, behind an answer of their own, and no thought is written down."""
    text = (sources / "models" / "templates" / "NVIDIA-Nemotron-Nano-v2.jinja").read_text(encoding="utf-8")
    prompt = render_chat(tokenizer, [QUESTION], chat_template=text, tools=TOOLS)
    calls = [{"name": "run", "arguments": BRACES}, {"name": "now", "arguments": {}}]
    said = f"Well.\n</think>\n\nI look.\n<TOOLCALL>{json.dumps(calls)}</TOOLCALL>"
    reply = read_whole(TemplateReader(find_response_template(object(), text, True), prompt, TOOLS, True), said)
    assert (reply.reasoning, reply.content.strip()) == ("Well.", "I look.")
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == [("run", BRACES), ("now", {})]


# --- converter and reader ----------------------------------------------------------

LINEAR, FULL = "linear_attention", "full_attention"
_ROPE = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}
_QWEN: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": [LINEAR, LINEAR, FULL], "linear_value_head_dim": 8}
_MAMBA: dict[str, Any] = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16}


def saved(architecture: str, edits: dict[str, Any] | None = None, **config: Any) -> Callable[[Path], Any]:
    """edits: of its config.json, to what released checkpoints say where transformers says it otherwise."""

    def save(folder: Path) -> None:
        save_random(folder, architecture, **config)
        edit_json(folder / "config.json", **(edits or {}))

    return save


def save_kimi(folder: Path) -> None:
    types = [LINEAR, FULL, LINEAR]
    save_random(folder, "KimiLinearForCausalLM", num_hidden_layers=3, layer_types=types)
    attention = {"full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 8, "num_heads": 4}
    attention["short_conv_kernel_size"] = 4
    edits = {"first_k_dense_replace": 1, "moe_router_activation_func": "sigmoid", "linear_attn_config": attention}
    edit_json(folder / "config.json", **edits)
    tensors = load_file(folder / "model.safetensors")
    named = {re.sub(r"block_sparse_moe\.(\w+_proj)", r"mlp.\1", name): tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})


def save_gemma4(size: str) -> Callable[[Path], Any]:
    edits = {} if size == "26b-a4b" else {"num_experts": None, "top_k_experts": None}
    return saved("Gemma4ForCausalLM", edits, final_logit_softcapping=30.0, sliding_window=9, **GEMMA4[size])


_SIGMOID = {"scoring_func": "sigmoid", "first_k_dense_replace": 1}
# What to convert, and how far llama.cpp's own logits may be from transformers': it looks GELU up in float16. It rounds
# gpt-oss's YaRN, and the inputs of products with MXFP4.
CONVERTED: dict[str, tuple[Callable[[Path], Any], float | None]] = {
    "gpt-oss": (lambda folder: save_gpt_oss(folder, True, **GPT_OSS, swiglu_limit=7.0), None),
    **{f"gemma4-{size}": (save_gemma4(size), 0.1) for size in GEMMA4},
    "qwen3next": (saved("Qwen3NextForCausalLM", **_QWEN, rope_parameters=_ROPE), 1e-4),
    **{
        architecture: (saved(architecture, **_QWEN, rope_parameters={**_ROPE, "mrope_section": [2, 1, 1]}), 1e-4)
        for architecture in ("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
    },
    "nemotron_h_moe": (
        saved(
            **{"architecture": "NemotronHForCausalLM", "layers_block_type": [LINEAR, "moe", FULL, "moe"], **_MAMBA},
            **{"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 20, "n_group": 4, "topk_group": 2},
        ),
        1e-4,
    ),
    "kimi-linear": (save_kimi, 1e-4),
    "glm-4.7-flash": (saved("Glm4MoeLiteForCausalLM", _SIGMOID), 1e-4),
    "deepseek-v3": (saved("DeepseekV3ForCausalLM", _SIGMOID), 1e-4),
    "lfm2moe": (saved("Lfm2MoeForCausalLM"), 1e-4),
    "granitehybrid": (
        saved(
            "GraniteMoeHybridForCausalLM",
            {"layer_types": ["mamba", "attention"]},
            **{"num_local_experts": 4, "mamba_d_state": 16, "position_embedding_type": None},
        ),
        1e-4,
    ),
}
# The converter, asked for no vocabulary, and for no layers that predict further tokens.
_CONVERT = """
import sys
from pathlib import Path
sources, folder, file = sys.argv[1:]
sys.path[:0] = [sources, f"{sources}/gguf-py"]
import convert_hf_to_gguf as script
from conversion.gemma import Gemma3Model
from conversion.qwen import _QwenMtpMixin
_QwenMtpMixin.no_mtp = True
find = script.get_model_class
def set_vocab(self):
    self.gguf_writer.add_tokenizer_model("no_vocab")
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
def get_model_class(*args, **options):
    found = find(*args, **options)
    found.set_vocab = set_vocab
    if issubclass(found, Gemma3Model):  # counts the tokens of a vocabulary
        (Path(folder) / "tokenizer.model").touch()
        found._create_vocab_sentencepiece = lambda self: [range(self.hparams["vocab_size"])]
    return found
script.get_model_class = get_model_class
sys.argv[1:] = [folder, "--outfile", file, "--outtype", "f32"]
script.main()
"""
_READ = """
import sys
import llama_cpp, numpy
file, logits, *ids = sys.argv[1:]
llama = llama_cpp.Llama(file, n_ctx=256, logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0)
llama.eval([int(token) for token in ids])
numpy.save(logits, llama.scores[: len(ids)])
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CONVERTED)
def test_converted_models(sources: Path, tmp_path: Path, name: str) -> None:
    """llama.cpp's converter writes a file of transformers' model; the logits are transformers', and llama.cpp's."""
    save, most_apart = CONVERTED[name]
    folder, path = tmp_path / "hf", tmp_path / "m.gguf"
    save(folder)
    subprocess.run([sys.executable, "-c", _CONVERT, str(sources), str(folder), str(path)], check=True)
    (prompt,) = random_prompts([30])
    expected = hugging_face_logits(load_hugging_face(folder), prompt)
    logits, _ = run(path, prompt)
    torch.testing.assert_close(logits[: len(prompt)], expected, atol=1e-4, rtol=0)
    if most_apart is None:
        return
    pytest.importorskip("llama_cpp")
    found = tmp_path / "logits.npy"
    # Who reads a file wrongly may end its process.
    subprocess.run([sys.executable, "-c", _READ, str(path), str(found), *map(str, prompt)], check=True)
    torch.testing.assert_close(torch.from_numpy(np.load(found)), expected, atol=most_apart, rtol=0)
