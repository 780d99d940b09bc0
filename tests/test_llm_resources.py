"""What an engine takes from its process and its host, and that it gives everything back."""

import ctypes
import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.tiny_models import random_prompts, save_random

ROOT = Path(__file__).parent.parent
GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = random_prompts([5, 20, 1, 33])
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, **options})


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def run_python(code: str, *arguments: str, flags: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *flags, "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("model"))


# -- importing --


def test_importing_the_package_starts_nothing() -> None:
    """No torch, no Triton, no device; the options objects need none of them either."""
    out = run_python(
        """
        import sys, threading
        import nanovllm
        nanovllm.SamplingParams(temperature=0)
        nanovllm.EngineConfig(model="m")
        nanovllm.RequestOutput, nanovllm.CompletionOutput
        for module in ("torch", "triton", "transformers", "tokenizers", "numpy", "multiprocessing"):
            assert module not in sys.modules, module
        assert threading.active_count() == 1
        print("ok", dir(nanovllm))
        """
    )
    assert out.startswith("ok") and "LLM" in out


def test_importing_llm_needs_no_gpu_and_no_compiler() -> None:
    """With no device visible, no compiler on the path, and Triton and vLLM not installed."""
    run_python(
        """
        import os, sys
        os.environ.update(PATH="", CUDA_VISIBLE_DEVICES="", CC="/none")
        sys.modules["triton"] = None
        from nanovllm import LLM
        import torch
        assert not torch.cuda.is_initialized()
        assert "torch._inductor.compile_fx" not in sys.modules
        assert not torch.distributed.is_initialized()
        """
    )


def test_an_unknown_public_name_says_which_there_are() -> None:
    import nanovllm

    with pytest.raises(AttributeError, match=r"'Llm'.*LLM"):
        _ = nanovllm.Llm


def test_no_main_guard_is_needed(folder: Path) -> None:
    """A plain script, as vLLM's offline examples are, run once: nothing is started that imports it again."""
    out = run_python(
        """
        import sys
        from nanovllm import LLM, SamplingParams
        print("started")
        llm = LLM(model=sys.argv[1], dtype="float32", device="cpu", skip_tokenizer_init=True, enforce_eager=True)
        outputs = llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0, max_tokens=4))
        print(len(outputs[0].outputs[0].token_ids))
        """,
        str(folder),
    )
    assert out.split() == ["started", "4"]


def test_validation_through_llm_does_not_depend_on_assertions(folder: Path) -> None:
    """What a call refuses under plain `python` it refuses under `python -O`."""
    run_python(
        """
        import sys
        from nanovllm import LLM, SamplingParams
        assert False, "assertions are off, or this line would raise"
        llm = LLM(sys.argv[1], device="cpu", dtype="float32", skip_tokenizer_init=True, block_size=8,
                  num_gpu_blocks_override=4, max_model_len=64)
        one = SamplingParams(temperature=0, max_tokens=2)

        def refuses(*arguments):
            try:
                llm.generate(*arguments, use_tqdm=False)
            except (ValueError, TypeError):
                if llm.has_unfinished_requests():
                    raise SystemExit(f"left behind by {arguments}")
                return
            raise SystemExit(f"accepted: {arguments}")

        for prompt in ([], [128], [-1], [1.5], "text", None, [1] * 64, [1] * 65, [1] * 32):
            refuses([[1], prompt], one)
        refuses([[1], [2]], [one])
        refuses([[1]], SamplingParams(stop_token_ids=[128]))
        refuses([[1]], SamplingParams(stop="a"))
        for options in ({"max_tokens": 0}, {"temperature": float("nan")}, {"temperature": -1}):
            try:
                SamplingParams(**options)
            except ValueError:
                continue
            raise SystemExit(f"accepted: {options}")
        if len(llm.generate([[1]], one, use_tqdm=False)[0].outputs[0].token_ids) != 2:
            raise SystemExit("the engine does not run any more")
        """,
        str(folder),
        flags=("-O",),
    )


# -- host --


@needs_proc
def test_one_device_uses_no_port_no_process_and_no_shared_memory(folder: Path) -> None:

    def resources() -> tuple[set[str], set[str], set[str]]:
        sockets = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
        children = set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        shared = {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").exists() else set()
        return {name for name in sockets if name.startswith(("socket:", "/dev/shm"))}, children, shared

    before = resources()
    with make_llm(folder, overlap_depth=2) as llm:
        tokens(llm)
        now = resources()
        assert now[:2] == before[:2]
        own = {name for name in now[2] - before[2] if str(os.getpid()) in name or "nanovllm" in name}
        assert not own
        assert not torch.distributed.is_initialized()


def test_two_engines_at_once_in_one_process(folder: Path, tmp_path: Path) -> None:
    """Of different models and sizes, stepping by turns; closing one does not disturb the other."""
    other_folder = save_random(tmp_path, "Qwen2ForCausalLM", seed=5, vocab_size=160, num_hidden_layers=3)
    with make_llm(folder) as alone:
        expected = tokens(alone)
    with make_llm(other_folder, block_size=8) as alone:
        other_expected = tokens(alone)
    assert expected != other_expected
    one, two = make_llm(folder, max_num_seqs=2, overlap_depth=2), make_llm(other_folder, block_size=8)
    results: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for i, prompt in enumerate(PROMPTS):
        for llm in (one, two):
            llm.add_request(prompt, GREEDY, str(i))
    while one.has_unfinished_requests() or two.has_unfinished_requests():
        for llm, seen in zip((one, two), results, strict=True):
            seen.update({output.request_id: output.outputs[0].token_ids for output in llm.step()})
    assert [list(dict(sorted(seen.items())).values()) for seen in results] == [expected, other_expected]
    one.close()
    assert tokens(two) == other_expected
    two.close()


def test_two_engines_at_once_on_one_host(folder: Path) -> None:
    code = """
    import sys
    from nanovllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], device="cpu", dtype="float32", skip_tokenizer_init=True)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(3):
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        print(output.outputs[0].token_ids)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        with make_llm(folder) as llm:
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("go\n")
            child.stdin.flush()
            own = [tokens(llm, [[1, 2, 3]])[0] for _ in range(3)]
        out, _ = child.communicate(timeout=120)
    finally:
        child.kill()
    assert out.splitlines() == [str(output) for output in own]


# -- memory --


def tensor_bytes() -> int:
    """Of the tensors with memory of their own; torch.compile's fake ones, which may outlive their trace, have none."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, torch.nn.Parameter):  # by type: isinstance() would wake lazy modules
            continue
        if thing.device.type == "cpu" and thing.layout == torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    """Of this process, once the allocator has given back what nobody holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_proc
@pytest.mark.parametrize(("dtype", "overlap_depth"), [("float32", 1), ("bfloat16", 2)])
def test_loading_and_closing_twenty_times_returns_the_memory(tmp_path: Path, dtype: str, overlap_depth: int) -> None:
    """Tensors to the byte, and the process within one percent; a model is larger than that."""
    folder = save_random(tmp_path, vocab_size=8192, hidden_size=256)  # 17 MB

    def load_and_use(num_times: int) -> None:
        for i in range(num_times):
            llm = make_llm(folder, overlap_depth=overlap_depth, dtype=dtype, num_gpu_blocks_override=64)
            llm.add_request(PROMPTS[0], GREEDY)  # still unfinished when the engine closes
            llm.step()
            if i % 2:
                tokens(llm)
            llm.close()

    load_and_use(3)  # what is made once, by torch as well
    tensors, resident = tensor_bytes(), resident_bytes()
    load_and_use(20)
    assert tensor_bytes() == tensors
    assert resident_bytes() <= resident * 1.01


def test_a_load_that_fails_leaves_no_tensors(folder: Path, tmp_path: Path) -> None:
    save_random(tmp_path, hidden_size=256, num_attention_heads=8)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    before = tensor_bytes()
    for _ in range(3):
        with pytest.raises(ValueError, match=r"model\.layers\.2"):
            make_llm(tmp_path)
    assert tensor_bytes() == before


def test_a_closed_engine_holds_neither_weights_nor_cache(folder: Path) -> None:
    """Though the LLM object itself is still there."""
    before = tensor_bytes()
    llm = make_llm(folder, num_gpu_blocks_override=1000)
    tokens(llm)
    assert tensor_bytes() > before + 1_000_000
    llm.close()
    assert tensor_bytes() - before < 100_000
