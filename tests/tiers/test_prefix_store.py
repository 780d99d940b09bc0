"""The folder of blocks: files that are harmed, other versions, several writers, and engines that come later."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler_output import BlockMoves
from nanovllm.kernels.attention_types import LayerCache
from nanovllm.tiers import block_files, host_memory, mover
from nanovllm.tiers.block_file import is_good, read_block, write_block
from nanovllm.tiers.block_files import BlockFiles
from nanovllm.tiers.mover import TierMover
from nanovllm.tiers.store import PrefixStore, newest, path_of
from nanovllm.tiers.tiered_cache import TieredCache, TieredExecutor
from tests.tiny_models import EOS, VOCAB_WITH_TOKENIZER, load_hugging_face, save_random, save_tokenizer

ABOUT = {"block": "00"}
SYSTEM = "You are a careful assistant who answers in one short sentence. "
NUM_BLOCKS = 8  # of 8 tokens, which it fills with the one that begins every text
PARAMS = SamplingParams(max_tokens=8, temperature=0.9, seed=3, ignore_eos=True)


def random_bytes(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


# -- a file --


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150_000), st.data())
def test_any_harm_is_seen_and_the_file_is_taken_away(tmp_path_factory: Any, size: int, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "block.kv"
    block = random_bytes(size)
    write_block(path, block, ABOUT)
    assert is_good(path, ABOUT)
    read = np.zeros_like(block)
    read_block(path, read)
    assert (read == block).all()
    content = bytearray(path.read_bytes())
    harm = data.draw(st.sampled_from(["a bit", "two words", "cut", "longer", "nothing"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if harm == "a bit":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif harm == "two words" and size > 600:
        block_at = 512 + 8 * ((size - 32) // 16)
        first, second = content[512:520], content[block_at : block_at + 8]
        content[512:520], content[block_at : block_at + 8] = bytes(reversed(second)), bytes(reversed(first))
    elif harm == "cut":
        del content[at:]
    elif harm == "longer":
        content.append(0)
    is_harmed = bytes(content) != path.read_bytes()
    path.write_bytes(content)
    assert is_good(path, ABOUT) is not is_harmed
    assert path.exists() is not is_harmed


def test_a_file_of_another_block_or_none_is_not_good(tmp_path: Path) -> None:
    path = tmp_path / "block.kv"
    assert not is_good(path, ABOUT)
    write_block(path, random_bytes(100), {"block": "01"})
    assert not is_good(path, ABOUT) and not path.exists()


def test_two_writers_and_one_that_is_killed_leave_whole_files(tmp_path: Path) -> None:
    script = (
        "import sys, numpy as np; from pathlib import Path; from nanovllm.tiers.block_file import write_block\n"
        "data = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8)\n"
        "print('ready', flush=True)\n"
        "for number in range(10**9): write_block(Path(sys.argv[1]), data, {'block': '00'})"
    )
    path = tmp_path / "block.kv"
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline
        for _ in range(20):
            assert is_good(path, ABOUT)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
    assert is_good(path, ABOUT), "also after the end in the middle of one"


# -- the folder --


def test_the_folder_keeps_its_size_and_loses_what_was_used_longest_ago(tmp_path: Path) -> None:
    now = time.time()
    for number in range(6):
        write_block(path_of(tmp_path, bytes([number])), random_bytes(1000), ABOUT)
        os.utime(path_of(tmp_path, bytes([number])), (now - 1000 + number,) * 2)
    half_written = tmp_path / "left.kv.1.new"
    half_written.write_bytes(b"x")
    os.utime(half_written, (now - 5000,) * 2)
    files = BlockFiles(tmp_path, max_bytes=5000)
    files.write([b"new"], torch.zeros(1, 1000, dtype=torch.uint8), None)
    files.close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {path_of(tmp_path, name).name for name in (b"new", b"\x05", b"\x04")}


def test_a_full_disk_ends_the_writing_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_files, "write_block", fail)
    files = BlockFiles(tmp_path, 10**9)
    with pytest.warns(RuntimeWarning, match="nothing more is written into prefix_store: .*No space left"):
        files.write([b"a", b"b"], torch.zeros(2, 10, dtype=torch.uint8), None)
        files.close()


def test_a_harmed_file_is_not_found(tmp_path: Path) -> None:
    for name in (b"good", b"bad"):
        write_block(path_of(tmp_path, name), random_bytes(1000), {"block": name.hex()})
    bad = path_of(tmp_path, b"bad")
    bad.write_bytes(bad.read_bytes()[:-1] + b"?")
    store = PrefixStore([tmp_path])
    while store.begin_checks([b"good", b"bad", b"none"]) and not store.await_checks():
        pass
    assert store.find(b"good") and not store.find(b"bad") and not bad.exists()
    os.utime(path_of(tmp_path, b"good"), (1, 1))
    store.use(b"good")
    assert path_of(tmp_path, b"good").stat().st_mtime > 1, "it counts as used now"
    assert not store.wants(b"good") and store.wants(b"bad") and not store.wants(b"bad")
    store.close()


@pytest.mark.filterwarnings("error")  # of a thread that ends with an exception
def test_a_folder_that_is_gone_has_no_blocks(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert newest(gone) == []
    store = PrefixStore([gone])
    assert not store.begin_checks([b"any"]) and not store.find(b"any")
    store.close()
    cache = LayerCache(torch.zeros(2, 6, 2, 4, 8), None)
    moving = TierMover([cache], 0, gone, 10**9, 10**6, torch.device("cpu"))
    assert moving._warm is not None and moving._warm.find(b"any") is None
    moving.close()


# -- the worker's part --


def test_blocks_travel_whole_between_the_cache_the_host_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a buffer holds two blocks, and a layer has scales beside its codes."""
    cpu = torch.device("cpu")
    caches = []
    for _ in range(3):
        codes = torch.randint(0, 120, (2, 8, 2, 4, 8), dtype=torch.uint8).view(torch.float8_e4m3fn)
        caches.append(LayerCache(codes, torch.randn(8, 2, 4, 2, dtype=torch.bfloat16)))
    before = [[tensor.clone().float() for tensor in cache] for cache in caches]
    num_bytes = 3 * (2 * 2 * 4 * 8 + 2 * 4 * 2 * 2)
    monkeypatch.setattr(mover, "_BUFFER_BYTES", 2 * num_bytes)
    moving = TierMover(caches, 5, tmp_path, 10**9, 0, cpu)
    moving.move(BlockMoves(saves=[(block, 4 - block) for block in range(5)], keeps=[(6, b"six"), (7, b"seven")]))
    moving.close()
    for cache in caches:
        for tensor in cache:
            tensor.zero_()
    moving = TierMover(caches, 5, tmp_path, 10**9, 0, cpu)
    moving.move(BlockMoves(fetches=[(0, b"seven"), (3, b"six")]))
    for (data, scales), (old_data, old_scales) in zip(caches, before, strict=True):
        data = data.float()
        assert (data[:, 0] == old_data[:, 7]).all() and (data[:, 3] == old_data[:, 6]).all()
        assert (scales[0] == old_scales[7]).all() and (scales[3] == old_scales[6]).all()
        assert not data[:, [1, 2, 4, 5, 6, 7]].any()
    for slot in moving._slots:
        slot.zero_()
    moving.move(BlockMoves(saves=[(0, 0), (3, 1)]))
    moving.move(BlockMoves(loads=[(4, 1), (5, 0), (6, 1)]))
    for (data, scales), (old_data, old_scales) in zip(caches, before, strict=True):
        assert (data.float()[:, 4] == old_data[:, 6]).all() and (data.float()[:, 5] == old_data[:, 7]).all()
        assert (scales[6] == old_scales[6]).all()
    moving.close()


def test_blocks_used_last_are_in_memory_before_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is room for; the others, and one that has lost a part, are read from their files."""
    cpu = torch.device("cpu")
    cache = LayerCache(torch.zeros(2, 6, 2, 4, 8), None)
    num_bytes = 2 * 2 * 4 * 8 * 4
    names = [b"four", b"three", b"two", b"one"]
    for age, name in enumerate(names):
        block = torch.full((num_bytes // 4,), float(age + 1))
        write_block(path_of(tmp_path, name), block.numpy().view(np.uint8), {"block": name.hex()})
        os.utime(path_of(tmp_path, name), (1000 - age,) * 2)
    harmed = path_of(tmp_path, b"three")
    harmed.write_bytes(harmed.read_bytes()[:-1])
    os.utime(harmed, (999,) * 2)
    monkeypatch.setattr(host_memory, "_PIECE_BYTES", 2 * num_bytes)
    moving = TierMover([cache], 0, tmp_path, 10**9, 3 * num_bytes, cpu)
    assert moving._warm is not None
    assert [name for name in names if moving._warm.find(name) is not None] == [b"four", b"two"]
    path_of(tmp_path, b"four").unlink()
    moving.move(BlockMoves(fetches=[(1, b"four"), (3, b"one"), (2, b"two")]))
    assert cache.data[:, :, 0, 0, 0].tolist() == [[0, 1, 3, 4, 0, 0]] * 2
    moving.close()


# -- engines --


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("model"), vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS)
    save_tokenizer(folder)
    return folder


def answers(model: Path | str, prompts: list[str], **options: Any) -> tuple[list[list[int]], dict[str, float]]:
    """One prompt after the other, with blocks for little more than one of them."""
    defaults = {"device": "cpu", "dtype": "float32", "block_size": 8, "num_gpu_blocks_override": 16}
    with LLM(str(model), **{**defaults, **options}) as llm:
        tokens = [llm.generate(prompt, PARAMS, use_tqdm=False)[0].outputs[0].token_ids for prompt in prompts]
        return tokens, llm.get_metrics()


PROMPTS = [SYSTEM + "one", "x" * 90, SYSTEM + "two", "y" * 90, SYSTEM + "three"]


def test_host_memory_brings_back_what_was_evicted(model: Path) -> None:
    plain, without = answers(model, PROMPTS, deterministic=True)
    with_host, metrics = answers(model, PROMPTS, deterministic=True, kv_offload_gb=0.01)
    assert with_host == plain
    assert metrics["num_blocks_from_host"] > 0
    assert metrics["num_prompt_tokens_cached"] == 2 * 8 * NUM_BLOCKS > without["num_prompt_tokens_cached"]


def test_a_later_process_finds_the_prefix_and_another_model_does_not(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shared = [SYSTEM + word for word in ("one", "two", "three")]
    plain, _ = answers(model, shared, deterministic=True)
    first, metrics = answers(model, shared, deterministic=True, prefix_store=store)
    files = sorted(store.rglob("*.kv"))
    assert len(files) == NUM_BLOCKS and not metrics["num_blocks_from_store"]
    harmed = max(files, key=lambda path: path.stat().st_mtime_ns)  # the last block of the prefix
    harmed.write_bytes(harmed.read_bytes()[:-3] + b"???")
    later, metrics = answers(model, shared[:1], deterministic=True, prefix_store=store)
    assert first == plain and later == plain[:1]
    assert metrics["num_blocks_from_store"] == len(files) - 1 and not harmed.exists()
    other = save_random(tmp_path / "other", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS, seed=1)
    save_tokenizer(other)
    _, metrics = answers(other, shared[:1], prefix_store=store)
    assert not metrics["num_blocks_from_store"] and metrics["num_prompt_tokens_cached"] == 0
    assert len({json.loads(path.read_text())["model"] for path in store.glob("*/about.json")}) == 2


def test_models_are_told_apart_by_their_files_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name from the Hub, or a folder below the home directory, says nothing of what is in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for seed in range(2):
        folder = save_random(tmp_path / f"model{seed}", vocab_size=VOCAB_WITH_TOKENIZER, eos_token_id=EOS, seed=seed)
        save_tokenizer(folder)
    store = tmp_path / "store"
    for name in ("~/model0", "~/model1"):
        answers(name, [SYSTEM + word for word in ("one", "two")], prefix_store=store)
    assert len({json.loads(path.read_text())["model"] for path in store.glob("*/about.json")}) == 2


def test_a_sleep_takes_what_was_to_be_kept(model: Path) -> None:
    """Blocks are written a plan later than they are found to be of use, and hold nothing when they wake."""
    cache = TieredCache(8, 8, None, PrefixStore([model]))
    cache._found, cache._found_now = [(1, b"a")], [(2, b"b")]
    cache.pool.forget_cached()
    assert cache.take_moves() is None and cache.take_moves() is None


def test_the_stores_threads_end_also_where_the_executor_fails(tmp_path: Path) -> None:
    class Broken:
        num_blocks = 8

        def close(self) -> None:
            raise RuntimeError("the device is lost")

    store = PrefixStore([tmp_path])
    executor = TieredExecutor(Broken(), TieredCache(8, 8, None, store))
    with pytest.raises(RuntimeError, match="the device is lost"):
        executor.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        store._threads.submit(print)
    assert not store._ahead.is_alive()


def test_a_model_of_this_process_has_no_files(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": str(model), "device": "cpu", "prefix_store": tmp_path / "store"}
    with pytest.raises(ValueError, match="prefix_store knows a model by its files"):
        LLM(load_hugging_face(model), **options)


def test_what_cannot_have_a_tier_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="enable_prefix_caching is False"):
        LLM(str(model), device="cpu", enable_prefix_caching=False, kv_offload_gb=1)
    windows = save_random(
        tmp_path / "windows", "MistralForCausalLM", vocab_size=VOCAB_WITH_TOKENIZER, sliding_window=8, eos_token_id=EOS
    )
    with pytest.raises(NotImplementedError, match="not windows or states"):
        LLM(str(windows), device="cpu", skip_tokenizer_init=True, kv_offload_gb=1)
