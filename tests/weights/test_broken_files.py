"""Checkpoints broken at random: each is refused by file and field, or is as good as it was; nothing else comes out.

`--broken-files N` makes N of each kind; a few by default.
"""

import json
import random
import resource
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

from nanovllm import build
from nanovllm.config import EngineConfig
from nanovllm.models.registry import read_model_config
from nanovllm.weights.checkpoint import open_checkpoint
from tests.gguf_files import Quantization, byte_level_keys, convert, metadata, tiny_tensors, write_gguf
from tests.tiny_models import save_random

REFUSALS = (ValueError, TypeError, NotImplementedError)
HANG_SECONDS = 20  # for a machine that does much else; they take some milliseconds
MOST_BYTES = 200 * 2**20
ARCHITECTURES = [
    ("LlamaForCausalLM", {}),
    ("Gemma3ForCausalLM", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    ("SmolLM3ForCausalLM", {"num_hidden_layers": 4}),
    ("Phi3ForCausalLM", {"hidden_size": 64}),
    ("Qwen3MoeForCausalLM", {"head_dim": 16, "num_experts": 4}),
    ("GraniteForCausalLM", {}),
    ("Glm4MoeForCausalLM", {"n_group": 2}),
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, 1.5, -0.5, 1e-300, 1e308, 10**30, 2**31, 2**40, 2**63, 10**400),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "64", "yarn", [], [1], [None], ["x"] * 3, [[[]]], {}),
    *({"x": 1}, {"rope_type": "linear"}, {"rope_type": "yarn", "factor": 0}, {"rope_type": "longrope"}),
    *({"type": "dynamic", "factor": 1e300}, {"full_attention": 3}, {"rope_type": ["x"]}, "\ud800"),
]


def open_all(path: Path) -> None:
    """All that a start does before memory is taken, and then each tensor."""
    config = EngineConfig(model=str(path), device="cpu", skip_tokenizer_init=True)
    checkpoint = open_checkpoint(config.model, load_format=config.load_format, revision=None)
    dtype = build.choose_dtype("auto", checkpoint.config, torch.device("cpu"))
    model_config = read_model_config(checkpoint.config, dtype)
    build._eos_token_ids(checkpoint, None, model_config.vocab_size)
    build._rehearse_loading(config.resolve(model_config, "cpu"), model_config, checkpoint)
    for _ in checkpoint.tensors(torch.float32):
        pass


def attempt(path: Path, what: str, *names: str) -> bool:
    """Whether it was refused. names: of which the message must have one."""
    start = perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_all(path)
        refused = False
    except REFUSALS as error:
        message = str(error)
        assert any(name in message for name in (str(path), *names)), f"{what}: names nothing: {message}"
        assert len(message) < 5000, f"{what}: {len(message)} characters"
        refused = True
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert perf_counter() - start < HANG_SECONDS, what
    return refused


@contextmanager
def bounded_memory(path: Path) -> Iterator[None]:
    """path: a model that is whole, to have all imported that reading imports."""
    open_all(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MOST_BYTES


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--broken-files"))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, fields = request.param
    return save_random(tmp_path_factory.mktemp("model"), architecture, **fields)


def break_bytes(content: bytes, rng: random.Random, end: int) -> bytes:
    """One to four changes in the first `end` bytes: bits, bytes, numbers, pieces left out or doubled, or cut off."""
    broken = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not broken:
            break
        place = rng.randrange(max(1, min(end, len(broken) - 8)))
        kind = rng.randrange(6)
        if kind == 0:
            broken[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            broken[place] = rng.randrange(256)
        elif kind == 2:
            number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, rng.randrange(2**64)))
            broken[place : place + 8] = struct.pack("<Q", number)
        elif kind == 3:
            del broken[place : place + rng.randint(1, 16)]
        elif kind == 4:
            broken[place:place] = broken[place : place + rng.randint(1, 16)]
        else:
            del broken[max(9, place) :]
    return bytes(broken)


def test_config_values(folder: Path, tmp_path: Path, count: int) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    rope = [f"rope_parameters.{name}" for name in ("rope_theta", "rope_type", "factor", "partial_rotary_factor")]
    others = ["rope_scaling", "rope_theta", "layer_types", "sliding_window", "torch_dtype", "quantization_config"]
    fields = [*config, *rope, *others]
    rng = random.Random(0)
    with bounded_memory(folder):
        for number in range(count):
            broken = json.loads(json.dumps(config))
            field = fields[number % len(fields)]
            value = rng.choice(ODD_VALUES)
            owner, _, inner = field.partition(".")
            if inner:
                broken[owner] = {**broken.get(owner, {}), inner: value}
            else:
                broken[field] = value
            (tmp_path / "config.json").write_text(json.dumps(broken), encoding="utf-8", errors="surrogatepass")
            names = (inner or field, "config.json", "dtype", "architecture", "head")
            attempt(tmp_path, f"{field}={value!r}"[:200], *names)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "index"])
def test_bytes_of_a_folder(tmp_path: Path, name: str, count: int) -> None:
    folder = save_random(tmp_path, **ARCHITECTURES[0][1])
    if name == "index":
        weights = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        header = json.loads(weights.read_bytes()[8 : 8 + struct.unpack("<Q", weights.read_bytes()[:8])[0]])
        weight_map = {tensor: weights.name for tensor in header if tensor != "__metadata__"}
        name = "model.safetensors.index.json"
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if name == "generation_config.json":
        (folder / name).write_text('{"eos_token_id": [1, 2], "bos_token_id": 1, "top_p": 0.9, "do_sample": true}')
    content, rng = (folder / name).read_bytes(), random.Random(1)
    end = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith(".safetensors") else len(content)
    with bounded_memory(folder):
        for number in range(count):
            (folder / name).write_bytes(break_bytes(content, rng, end))
            attempt(
                folder,
                f"{name} {number}",
                name,
                "config.json",
                "model.",
                "lm_head",
                "dtype",
                "architecture",
                "eos_token",
            )


def _gguf_files() -> dict[str, Callable[[Path], Path]]:
    tokens = byte_level_keys(eos_token_id=3, bos_token_id=2)
    return {
        "llama": lambda path: write_gguf(path, "llama", metadata("llama") | tokens, tiny_tensors()),
        "llama-Q8_0": lambda path: write_gguf(path, "llama", metadata("llama"), tiny_tensors(), Quantization.Q8_0),
        **{
            architecture: lambda path, architecture=architecture, fields=fields: convert(
                save_random(path.parent / architecture, architecture, **fields), path
            )
            for architecture, fields in ARCHITECTURES[1:]
        },
    }


@pytest.mark.parametrize("kind", _gguf_files())
def test_gguf_headers(tmp_path: Path, kind: str, count: int) -> None:
    path = _gguf_files()[kind](tmp_path / "m.gguf")
    content, rng = path.read_bytes(), random.Random(2)
    end = len(content) - sum(info.num_bytes for info in build_tensor_infos(path))
    with bounded_memory(path):
        for number in range(count):
            path.write_bytes(break_bytes(content, rng, end))
            attempt(
                path,
                f"{kind} {number}",
                "m.gguf",
                "config.json",
                "model.",
                "num_attention_heads",
                "layers",
                "head_dim",
                "eos_token",
            )


def build_tensor_infos(path: Path) -> Any:
    from nanovllm.model_files.gguf_file import GGUFFile

    return GGUFFile(path).tensors.values()
