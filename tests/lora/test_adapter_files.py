"""PEFT's files and names, what they mean, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.lora.adapter_files import read_adapter
from nanovllm.lora.request import LoRARequest
from tests.lora.random_adapters import save

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {"r": 2, "lora_alpha": 6}


def tensors(**more: Tensor) -> dict[str, Tensor]:
    return {
        f"{PREFIX}.lora_A.weight": torch.arange(6.0).reshape(2, 3),
        f"{PREFIX}.lora_B.weight": torch.ones(4, 2),
        **{f"{PREFIX}.{name}": tensor for name, tensor in more.items()},
    }


def read(given: dict[str, Tensor], config: Any = CONFIG) -> Any:
    return read_adapter(LoRARequest("one", given, config))


def test_names_fields_and_scale() -> None:
    found = read(tensors(**{"lora_B.bias": torch.ones(4), "base_layer.bias": torch.full((4,), 5.0)}))
    (module,) = found.modules.values()
    assert list(found.modules) == [MODULE] and found.rank == 2
    assert module.scale == 3 and torch.equal(module.b, torch.ones(4, 2)) and torch.equal(module.bias, torch.ones(4))
    assert torch.equal(module.base_bias, torch.full((4,), 5.0)) and module.a.shape == (2, 3)
    assert read(tensors(), {**CONFIG, "use_rslora": True}).modules[MODULE].scale == pytest.approx(6 / 2**0.5)


def test_names_of_a_living_model_and_of_multimodal_ones() -> None:
    """`state_dict()` has the adapter's name in its names."""
    living, wrapped = {}, {}
    for name, tensor in tensors().items():
        living[name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")] = tensor
        wrapped[name.replace("model.layers", "model.language_model.layers")] = tensor
    for given in (living, wrapped):
        assert list(read(given).modules) == [MODULE]
    table = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(3, 2),
    }
    assert read(table).modules["model.embed_tokens"].a.shape == (2, 9)


def test_the_key_is_of_the_content(tmp_path: Path) -> None:
    same = read(tensors()).key
    assert read_adapter(LoRARequest("other", 3, save(tmp_path, tensors(), 2, 6))).key == same
    assert read({name: tensor + 1 for name, tensor in tensors().items()}).key != same
    assert read(tensors(), {**CONFIG, "lora_alpha": 7}).key != same


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora=True: DoRA is not supported; merge it"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base model as well; save it as a plain adapter"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base model"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*whole modules are no adapter"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters.*experts"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"something_new": 3}, "something_new=3: what it changes is not supported"),
    ],
)
def test_what_means_more_than_lora_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=f"adapter 'one': .*{words}"):
        read(tensors(), {**CONFIG, **config})


def test_what_peft_writes_by_default_is_taken() -> None:
    defaults = {"peft_type": "LORA", "qalora_group_size": 16, "megatron_core": "megatron.core", "lora_dropout": 0.1,
                "target_modules": ["q_proj"], "bias": "none", "init_lora_weights": "eva", "loftq_config": {},
                "task_type": "CAUSAL_LM", "base_model_name_or_path": "m", "use_dora": False}  # fmt: skip
    assert read(tensors(), {**CONFIG, **defaults}).rank == 2


@pytest.mark.parametrize(
    ("given", "config", "error", "words"),
    [
        (tensors(lora_magnitude_vector=torch.ones(4)), CONFIG, NotImplementedError, "DoRA is not supported"),
        (tensors(hada_w1_a=torch.ones(4)), CONFIG, NotImplementedError, "it is none of LoRA's"),
        ({**tensors(), f"{PREFIX}.lora_B.weight": torch.ones(4, 3)}, CONFIG, ValueError, "are of no rank"),
        (tensors(), {**CONFIG, "r": 4}, ValueError, "has rank 2, and the config says 4: the scale is unknown"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(2, 3)}, CONFIG, ValueError, "only one of lora_A and lora_B"),
        ({**tensors(), f"{PREFIX}.lora_A.weight": torch.full((2, 3), torch.nan)}, CONFIG, ValueError, "holds NaN"),
        ({**tensors(), f"{PREFIX}.lora_A.weight": torch.ones(2, 3).int()}, CONFIG, TypeError, "floating-point"),
        ({}, CONFIG, ValueError, "holds no tensors"),
        (tensors(), {"lora_alpha": 3}, ValueError, "r must be a number above 0, got None"),
        (tensors(), {"r": 2, "lora_alpha": 0}, ValueError, "lora_alpha must be a number above 0"),
        (tensors(), 7, TypeError, "peft_config must be a mapping"),
    ],
)
def test_bad_tensors_and_configs_are_named(given: Any, config: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read(given, config)


def test_bad_folders_are_named(tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            read_adapter(LoRARequest("one", tmp_path / "adapter"))

    refused(FileNotFoundError, "there is no folder")
    path = save(tmp_path / "adapter", tensors(), 2, 6)
    config = (path / "adapter_config.json").read_text()
    (path / "adapter_config.json").write_text("[]")
    refused(ValueError, "must hold an object")
    (path / "adapter_config.json").write_text("{")
    refused(ValueError, "cannot be read")
    (path / "adapter_config.json").write_text(config)
    (path / "adapter_model.safetensors").write_bytes(b"no")
    refused(ValueError, "cannot be read")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    refused(FileNotFoundError, "a pickle, adapter_model.bin, is never read")
    (path / "adapter_config.json").unlink()
    refused(FileNotFoundError, "so it is no PEFT adapter")


def test_requests_in_the_shapes_of_vllm_and_of_this_engine() -> None:
    by_id, by_path = LoRARequest("a", 3, "folder"), LoRARequest("a", Path("folder"))
    assert (by_id.lora_int_id, by_id.lora_path, by_path.lora_path) == (3, "folder", "folder")
    assert (by_id.name, by_id.adapter_id, by_id.path) == ("a", 3, "folder")
    assert by_path.lora_int_id == LoRARequest("a", "other").lora_int_id != LoRARequest("b", "other").lora_int_id
    assert LoRARequest(lora_name="a", lora_int_id=1, lora_path="p").has_source_of(LoRARequest("a", 1, "p"))
    given = tensors()
    for request in (LoRARequest("a", given, CONFIG), LoRARequest("a", 5, tensors=given, peft_config=CONFIG)):
        assert request.tensors is given and request.peft_config == CONFIG
    for arguments, error, words in [
        ((), TypeError, "lora_name"),
        (("",), ValueError, "lora_name must be a text"),
        (("a",), ValueError, "needs a lora_path or tensors"),
        (("a", 1.5, "p"), TypeError, "lora_int_id must be an integer"),
        (("a", 0, "p"), ValueError, "at least 1"),
        (("a", 1, 2), TypeError, "lora_path must be a path"),
        (("a", given), ValueError, "need a peft_config"),
    ]:
        with pytest.raises(error, match=words):
            LoRARequest(*arguments)
