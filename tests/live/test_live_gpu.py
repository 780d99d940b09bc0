"""On a GPU: new weights, sleep and tensors of other processes; graphs captured before go on. Run: pytest -m gpu"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from tests.live.new_weights import generate, save_two, tensors_of
from tests.lora.random_adapters import make_tensors, request
from tests.tiny_models import load_hugging_face

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "skip_tokenizer_init": True, "num_gpu_blocks_override": 64}
SENDER = """
import json, sys, torch
from nanovllm.live.shared_tensors import handle_of
generator = torch.Generator("cuda").manual_seed(5)
tensors = [torch.randn(1000, 333, generator=generator, device="cuda"), torch.randn(70, 9, device="cuda").bfloat16()[3:]]
print(json.dumps([[handle_of(tensor), tensor.double().sum().item()] for tensor in tensors]), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return save_two(tmp_path_factory.mktemp("two"), "Qwen3ForCausalLM", head_dim=64, **sizes)


@pytest.mark.parametrize("options", [{}, {"quantization": "fp8"}, {"enable_sleep_mode": True}], ids=str)
def test_captured_graphs_compute_with_the_new_weights(folders: list[Path], options: dict[str, Any]) -> None:
    on_card = {name: tensor.cuda() for name, tensor in tensors_of(folders[1]).items()}
    with (
        LLM(str(folders[0]), **OPTIONS, **options) as llm,
        LLM(str(folders[1]), **OPTIONS, **options) as fresh,
    ):
        assert generate(llm).token_ids != generate(fresh).token_ids
        llm.update_weights(on_card)
        assert generate(llm).token_ids == generate(fresh).token_ids
        llm.update_weights(tensors_of(folders[0]))
        llm.update_weights(tensors_of(folders[1]))
        assert generate(llm).token_ids == generate(fresh).token_ids


def test_memory_goes_back_to_the_device_and_graphs_stay(folders: list[Path]) -> None:
    options = {**OPTIONS, "num_gpu_blocks_override": 4000}
    with LLM(str(folders[0]), **options, enable_sleep_mode=True) as llm:
        expected = generate(llm)
        awake = torch.cuda.mem_get_info()[0]
        cache = 4000 * 64 * 2 * 2 * 2 * 64 * 2
        for level in (1, 2, 2):
            llm.sleep(level)
            assert torch.cuda.mem_get_info()[0] - awake > 0.9 * cache
            llm.wake_up(["kv_cache"])
            assert torch.cuda.mem_get_info()[0] - awake < 0.5 * cache
            llm.sleep(level)
            assert torch.cuda.mem_get_info()[0] - awake > 0.9 * cache
            llm.wake_up()
            assert generate(llm).token_ids == expected.token_ids
        assert abs(torch.cuda.mem_get_info()[0] - awake) < 0.1 * cache
    with LLM(str(folders[0]), **OPTIONS) as llm, pytest.raises(ValueError, match="enable_sleep_mode=True"):
        llm.sleep()


def test_what_lies_beside_weights_and_cache_sleeps_too(folders: list[Path]) -> None:
    """Slots of adapters, a draft with its cache, buffers of a tier: graphs that read them go on."""
    draft = {"method": "draft_model", "model": str(folders[1]), "num_speculative_tokens": 2}
    adapter = request("a", make_tensors(load_hugging_face(folders[0])))
    for options, given in (
        ({"enable_lora": True}, [adapter, None] * 2),
        ({"speculative_config": draft, "kv_offload_gb": 0.01}, None),
    ):
        with LLM(str(folders[0]), **OPTIONS, **options, enable_sleep_mode=True) as llm:
            expected = generate(llm, lora_request=given)
            for level in (1, 2):
                llm.sleep(level)
                llm.wake_up()
                assert generate(llm, lora_request=given).token_ids == expected.token_ids


def test_another_process_lends_its_tensors() -> None:
    from nanovllm.live.shared_tensors import open_handle

    sender = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert sender.stdin is not None and sender.stdout is not None
    for handle, total in json.loads(sender.stdout.readline()):
        assert open_handle(handle).double().sum().item() == total
    sender.stdin.write("\n")
    sender.stdin.close()
    assert sender.wait(60) == 0


@pytest.mark.multigpu
@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}], ids=str)
def test_processes_read_tensors_from_this_ones_card(folders: list[Path], options: dict[str, Any]) -> None:
    on_card = {name: tensor.cuda() for name, tensor in tensors_of(folders[1]).items()}
    with LLM(str(folders[0]), **OPTIONS, **options) as llm, LLM(str(folders[1]), **OPTIONS) as fresh:
        before, expected = generate(llm).token_ids, generate(fresh).token_ids
        llm.update_weights(on_card)
        after = generate(llm).token_ids
        assert before != after
        assert sum(map(list.__eq__, after, expected)) >= len(expected) - 1, "up to the rounding of sums over ranks"
