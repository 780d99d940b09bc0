"""Strict loading: every tensor used once, every parameter written; the message names what is at fault."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.ops import PLAIN
from nanovllm.models.registry import model_class, read_model_config
from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm.weights.loader import fill_random, load_weights
from tests.tiny_models import edit_json, save_random

# Every kind of tensor: biases everywhere, norms of heads, a head of its own.
EVERYTHING: dict[str, Any] = {"attention_bias": True, "head_dim": 16}
NAN = float("nan")


def new_model(folder: Path, tp: TensorParallel | None = None) -> tuple[Any, dict[str, Tensor]]:
    """An unfilled model, all NaN, and its checkpoint's tensors."""
    checkpoint = open_checkpoint(str(folder), load_format="auto", revision=None)
    config = read_model_config(checkpoint.config, "float32")
    model = model_class(config.architecture)(config, 64, torch.float32, tp or TensorParallel(), PLAIN)
    dict(model.weights())  # makes the weights
    for parameter in model.parameters():
        parameter.data.fill_(NAN)
    return model, dict(checkpoint.tensors(torch.float32))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("untied"), "Qwen3ForCausalLM", **EVERYTHING)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("tied"), "Qwen3ForCausalLM", **EVERYTHING, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_parameter_is_written_and_every_tensor_used(tmp_path: Path, architecture: str, is_tied: bool) -> None:
    """After loading nothing is left of what was there before; specs and checkpoint have the same names."""
    bias = {"attention_bias": True, "mlp_bias": True} if architecture == "LlamaForCausalLM" else {}
    model, tensors = new_model(save_random(tmp_path, architecture, tie_word_embeddings=is_tied, **bias))
    assert {name for name, spec in model.weights() if not spec.instead_of} == set(tensors)
    load_weights(model, tensors.items())
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_progress_ends_with_every_slot_filled(untied: Path) -> None:
    """Whatever the checkpoint calls its tensors, and where it holds several as one."""
    model, tensors = new_model(untied)
    qkv = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    joined = {name: tensor for name, tensor in tensors.items() if name not in qkv}
    joined["model.layers.0.self_attn.qkv_proj.weight"] = torch.cat([tensors[name] for name in qkv])
    for stored in (tensors, joined, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}):
        counts: list[int] = []
        load_weights(model, stored.items(), counts.append)
        assert sum(counts) == sum(1 for _, spec in model.weights() if not spec.instead_of) == len(tensors)


def test_each_missing_tensor_is_named(untied: Path) -> None:
    """All of them, one at a time."""
    model, tensors = new_model(untied)
    assert len(tensors) > 20
    for missing in tensors:
        with pytest.raises(ValueError, match=re.escape(f"no tensor {missing!r}")):
            load_weights(model, [(name, tensor) for name, tensor in tensors.items() if name != missing])


def test_many_missing_tensors_are_counted(untied: Path) -> None:
    """The message stays short."""
    model, tensors = new_model(untied)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight'.* and [0-9]+ more") as error:
        load_weights(model, [])
    assert len(str(error.value)) < 500
    assert int(str(error.value).split(" and ")[-1].split()[0]) == len(tensors) - 5


@pytest.mark.parametrize(
    "extra",
    ["model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight_scale", "visual.proj.weight"],
)
def test_an_unexpected_tensor_is_named(untied: Path, extra: str) -> None:
    model, tensors = new_model(untied)
    with pytest.raises(ValueError, match=re.escape(repr(extra))):
        load_weights(model, {**tensors, extra: torch.zeros(3)}.items())


def test_a_bias_that_the_config_denies_is_named(tmp_path: Path) -> None:
    """Dropping it would give wrong answers without an error."""
    model, tensors = new_model(save_random(tmp_path))
    name = "model.layers.1.self_attn.o_proj.bias"
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        load_weights(model, {**tensors, name: torch.zeros(32)}.items())


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t[None], lambda t: torch.cat((t, t))])
def test_a_misshapen_tensor_is_named_with_both_shapes(
    untied: Path, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    """Also where copying would have broadcast."""
    model, tensors = new_model(untied)
    wrong = change(tensors[name])
    with pytest.raises(ValueError, match=re.escape(repr(name))) as error:
        load_weights(model, {**tensors, name: wrong}.items())
    assert str(tuple(wrong.shape)) in str(error.value) and str(tuple(tensors[name].shape)) in str(error.value)


def test_a_tensor_that_comes_twice_is_named(untied: Path) -> None:
    model, tensors = new_model(untied)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' twice"):
        load_weights(model, [*tensors.items(), ("model.norm.weight", tensors["model.norm.weight"])])


def test_an_old_rotary_table_is_passed_over(untied: Path) -> None:
    model, tensors = new_model(untied)
    load_weights(model, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}.items())


@pytest.mark.parametrize("comes_first", [False, True])
def test_a_tied_head_may_be_stored_again_but_not_differ(tied: Path, comes_first: bool) -> None:
    model, tensors = new_model(tied)
    head = tensors["model.embed_tokens.weight"].clone()

    def with_head(head: Tensor) -> list[tuple[str, Tensor]]:
        extra = [("lm_head.weight", head)]
        return extra + list(tensors.items()) if comes_first else list(tensors.items()) + extra

    load_weights(model, with_head(head))
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    for wrong in (head + 1e-3, head[:-1]):
        with pytest.raises(ValueError, match=r"'lm_head\.weight' differs"):
            load_weights(model, with_head(wrong))


@pytest.mark.parametrize("is_bare", [False, True])
def test_a_tied_matrix_may_have_the_name_of_the_head_alone(tied: Path, is_bare: bool) -> None:
    """Savers that drop one of two names of the same memory choose either; a model without a head has bare names."""
    model, tensors = new_model(tied)
    embedding = tensors.pop("model.embed_tokens.weight")
    if is_bare:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    load_weights(model, {**tensors, "lm_head.weight": embedding}.items())
    assert model.embed_tokens.equals(embedding)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"embed_tokens\.weight' has shape"):
        load_weights(model, {**tensors, "lm_head.weight": embedding[:-1]}.items())


def test_bare_names_need_a_head_where_it_is_not_tied(untied: Path) -> None:
    model, tensors = new_model(untied)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    load_weights(model, bare.items())
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight'"):
        load_weights(model, [(name, tensor) for name, tensor in bare.items() if name != "lm_head.weight"])
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' twice"):
        load_weights(model, [*bare.items(), ("model.norm.weight", bare["norm.weight"])])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "bool", "complex64", "float8_e4m3fn"])
def test_a_dtype_that_no_weight_has_is_named(untied: Path, dtype: str) -> None:
    model, tensors = new_model(untied)
    tensors["model.norm.weight"] = torch.ones(32).to(getattr(torch, dtype))
    with pytest.raises(ValueError, match=rf"'model\.norm\.weight' has dtype {dtype}"):
        load_weights(model, tensors.items())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_memory_beside_the_weights(tmp_path: Path) -> None:
    """Each tensor is copied once, from the mapped file to its place."""
    folder = save_random(tmp_path, vocab_size=4096, hidden_size=512, intermediate_size=1024)
    model, tensors = new_model(folder)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    before = own_memory()
    taken = []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for named in tensors.items():
            yield named
            taken.append(own_memory() - before)

    load_weights(model, watched())
    assert num_bytes > 30e6
    assert max(taken) < num_bytes / 20


def own_memory() -> int:
    """Bytes in use by this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_take_their_parts_of_the_same_checkpoint(untied: Path, rank: int) -> None:
    """Each parameter of a rank of two is written too, with its own part."""
    model, tensors = new_model(untied, TensorParallel(rank, 2))
    load_weights(model, tensors.items())
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    q, k, v = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"].chunk(2)[rank] for name in "qkv")
    attention = model.layers[0].self_attn
    assert torch.equal(attention.qkv_proj.method.weight, torch.cat((q, k, v)))
    assert torch.equal(
        attention.o_proj.method.weight, tensors["model.layers.0.self_attn.o_proj.weight"].chunk(2, dim=1)[rank]
    )
    o_bias = tensors["model.layers.0.self_attn.o_proj.bias"]
    assert torch.equal(attention.o_proj.bias, o_bias if rank == 0 else torch.zeros_like(o_bias))


def test_random_weights_fill_everything_and_follow_the_seed(untied: Path) -> None:
    filled = []
    for seed in (0, 0, 1):
        model, _ = new_model(untied)
        fill_random(model, seed)
        assert not any(parameter.isnan().any() for parameter in model.parameters())
        filled.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(filled[0], filled[1]) and not torch.equal(filled[0], filled[2])


# -- through LLM: the same errors reach the user --


def open_llm(folder: Path) -> None:
    LLM(str(folder), device="cpu", dtype="float32", skip_tokenizer_init=True).close()


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"),
            r"model\.layers\.1\.mlp\.down_proj\.weight",
        ),
        (lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}), r"extra\.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}), r"model\.norm\.weight"),
    ],
)
def test_a_bad_file_is_an_error_of_llm(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    folder = save_random(tmp_path)
    open_llm(folder)
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        open_llm(folder)


def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    folder = save_random(tmp_path)
    edit_json(folder / "config.json", hidden_size=2**22, intermediate_size=2**22)  # 256 TiB
    with pytest.raises(ValueError, match=r"\.weight' has shape .*4194304"):
        open_llm(folder)


def test_a_folder_without_weight_file_is_an_error(tmp_path: Path) -> None:
    folder = save_random(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        open_llm(folder)


def test_a_vocabulary_of_another_size_is_named(tmp_path: Path) -> None:
    """A config that does not belong to the weights."""
    folder = save_random(tmp_path)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 128', '"vocab_size": 130'))
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\.weight.*128.*130"):
        open_llm(folder)
