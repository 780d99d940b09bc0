"""Memory that sleeps as on a GPU, with regions of this process's memory in the place of the device's: what is given
back, what it holds when it comes again, and whole engines on it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanovllm import LLM, SamplingParams
from nanovllm.runner import sleeping, virtual_memory
from nanovllm.runner.sleeping import GpuSleeper
from tests.lora.random_adapters import make_tensors, request
from tests.test_llm_eagle3 import save_head
from tests.tiny_models import (
    EOS,
    VOCAB_WITH_TOKENIZER,
    inner_model,
    load_hugging_face,
    random_prompts,
    save_random,
    save_tokenizer,
)

JUNK = 255  # a NaN in every dtype
CPU = torch.device("cpu")


class Device:
    """num_free: regions that can be mapped beside those that are."""

    def __init__(self) -> None:
        self.regions: list[Any] = []
        self.num_free = 1000

    @property
    def mapped(self) -> list[bool]:
        return [region.is_mapped for region in self.regions]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()

    class FakeRegion:
        def __init__(self, num_bytes: int, _: torch.device) -> None:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
            self.is_mapped = False
            device.regions.append(self)
            self.map()

        def map(self) -> None:
            if not self.is_mapped:
                if not device.num_free:
                    raise torch.OutOfMemoryError("none is left")
                device.num_free -= 1
                self.is_mapped = True
                self._bytes.fill_(JUNK)

        def unmap(self) -> None:
            device.num_free += self.is_mapped
            self.is_mapped = False
            self._bytes.fill_(JUNK)

        def tensor(self) -> Tensor:
            assert self.is_mapped, "a device would fault"
            return self._bytes

    monkeypatch.setattr(virtual_memory, "Region", FakeRegion)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(sleeping, "_saved", Tensor.clone)
    yield device


def make_sleeper() -> tuple[GpuSleeper, list[Tensor]]:
    """With weights, a draft's weights, slots of adapters and a cache, whose regions come in this order."""
    sleeper, stack = GpuSleeper(CPU), torch.ones(4)
    model, draft = (nn.Linear(3, 2).requires_grad_(False) for _ in range(2))
    sleeper.hold_weights(model)
    sleeper.hold_weights(draft, are_updated=False)
    sleeper.hold_slots([stack])
    cache = sleeper.zeros((2, 3), torch.bfloat16, CPU)
    for tensor, value in zip((model.weight, draft.weight, stack, cache), range(5, 9), strict=True):
        tensor.data.fill_(value)
    return sleeper, [model.weight, draft.weight, stack, cache]


def values(tensors: list[Tensor]) -> list[float]:
    """One of each; all of a tensor's are equal."""
    assert all((tensor == tensor.flatten()[0]).all() for tensor in tensors)
    return [float(tensor.flatten()[0]) for tensor in tensors]


@pytest.mark.parametrize(("keeps_weights", "expected"), [(True, [5, 6, 0, 0]), (False, [0, 6, 0, 0])])
def test_what_comes_again_is_what_was_saved_or_zero(device: Device, keeps_weights: bool, expected: list[int]) -> None:
    sleeper, tensors = make_sleeper()
    for _ in range(2):
        sleeper.sleep(keeps_weights)
        assert device.mapped == [False] * 4
        sleeper.wake(["weights"])
        assert device.mapped == [True, True, True, False]
        sleeper.wake(["kv_cache"])
        assert values(tensors) == expected


def test_a_cache_that_woke_alone_is_given_back_again(device: Device) -> None:
    sleeper, tensors = make_sleeper()
    sleeper.sleep(keeps_weights=True)
    sleeper.wake(["kv_cache"])
    assert device.mapped == [False, False, False, True]
    sleeper.sleep(keeps_weights=True)
    assert device.mapped == [False] * 4
    sleeper.wake(["weights", "kv_cache"])
    assert values(tensors) == [5, 6, 0, 0], "what was saved was saved once, from what was there"


def test_a_device_that_is_too_full_is_left_as_it_is(device: Device) -> None:
    sleeper, tensors = make_sleeper()
    sleeper.sleep(keeps_weights=True)
    device.num_free = 1
    with pytest.raises(torch.OutOfMemoryError):
        sleeper.wake(["weights"])
    assert device.mapped == [False] * 4 and device.num_free == 1
    sleeper.sleep(keeps_weights=True)
    device.num_free = 4
    sleeper.wake(["weights", "kv_cache"])
    assert values(tensors) == [5, 6, 0, 0]


PROMPTS = random_prompts([40, 5, 23], vocab_size=128)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 8, "compilation": "none"}


def check_sleeps(device: Device, folder: Path, lora_request: Any = None, **options: Any) -> None:
    """The same tokens behind each level, be the weights read or given again."""
    with LLM(str(folder), **{**OPTIONS, "num_gpu_blocks_override": 24, **options}) as llm:

        def tokens() -> list[list[int]]:
            outputs = llm.generate(PROMPTS * 2, GREEDY, use_tqdm=False, lora_request=lora_request)
            return [output.outputs[0].token_ids for output in outputs]

        expected, weights = tokens(), load_hugging_face(folder).state_dict()
        parameters = [parameter.clone() for parameter in inner_model(llm).parameters()]
        for level in (1, 2, 2):
            llm.sleep(level)
            assert not any(device.mapped)
            llm.wake_up(["kv_cache"])
            assert any(device.mapped) and not all(device.mapped)
            llm.sleep(level)
            assert not any(device.mapped)
            llm.wake_up(["weights"])
            if level == 2:
                llm.update_weights(weights)
            assert tokens() == expected and all(device.mapped)
            assert all(map(torch.equal, inner_model(llm).parameters(), parameters)), "also what no update fills"


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch, device: Device) -> Device:
    monkeypatch.setattr("nanovllm.executor.worker.choose_sleeper", lambda *_: GpuSleeper(CPU))
    return device


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Lfm2MoeForCausalLM", "Qwen3_5ForCausalLM"])
def test_all_that_a_model_keeps_sleeps(on_device: Device, tmp_path: Path, architecture: str) -> None:
    check_sleeps(on_device, save_random(tmp_path, architecture), skip_tokenizer_init=True)


def test_slots_of_adapters_are_filled_again(on_device: Device, tmp_path: Path) -> None:
    folder = save_random(tmp_path)
    hf = load_hugging_face(folder)
    adapters = [request(str(seed), make_tensors(hf, seed=seed)) for seed in range(2)]
    given = [*adapters, None] * 2
    check_sleeps(on_device, folder, given, enable_lora=True, max_loras=2, skip_tokenizer_init=True)


@pytest.mark.parametrize("tier", ["kv_offload_gb", "prefix_store"])
def test_what_lies_below_the_cache_is_not_confused(on_device: Device, tmp_path: Path, tier: str) -> None:
    options: dict[str, Any] = {"kv_offload_gb": 0.001} if tier == "kv_offload_gb" else {tier: tmp_path / "store"}
    folder = save_random(tmp_path / "model", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    check_sleeps(on_device, folder, **options)


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_a_draft_sleeps_too(on_device: Device, tmp_path: Path, method: str) -> None:
    sizes = {"vocab_size": VOCAB_WITH_TOKENIZER, "eos_token_id": EOS, "head_dim": 8}
    folder = save_random(tmp_path / "model", **sizes)
    draft = save_head(tmp_path / "head") if method == "eagle3" else save_random(tmp_path / "draft", seed=1, **sizes)
    guesses = {"method": method, "model": str(draft), "num_speculative_tokens": 3}
    check_sleeps(on_device, folder, skip_tokenizer_init=True, speculative_config=guesses)
