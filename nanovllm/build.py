"""The composition root: from EngineConfig to a running Engine, in the order in which things must exist.

Owns that order and the choice of parts for a device. Invariant: every user-facing check of model and options comes
before the weights are read.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.cpu_paged import CpuPagedBackend
from nanovllm.config import DTYPES, EngineConfig, ModelConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.engine import Engine
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.scheduler import Scheduler
from nanovllm.executor.inline import InlineExecutor
from nanovllm.kernels.native import load_native
from nanovllm.kernels.ops import choose_ops
from nanovllm.models.registry import model_class, read_model_config
from nanovllm.runner.kv_cache import KVCacheSpec, choose_num_blocks, useful_num_blocks
from nanovllm.runner.memory import measure_free_bytes
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.tokenizer import Tokenizer, load_tokenizer
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint
from nanovllm.weights.loader import fill_random, load_weights


@dataclass(frozen=True)
class StartTimes:
    """Seconds of each part of a start, in their order.

    config_seconds: finding (and fetching) the checkpoint, reading its config. weights_seconds: building the model and
    filling it. memory_seconds: choosing the size of the KV cache; on a GPU this runs, so compiles, the largest step.
    runner_seconds: allocating the cache and the rows; on a GPU, capturing the largest decode step.
    """

    config_seconds: float
    tokenizer_seconds: float
    weights_seconds: float
    memory_seconds: float
    runner_seconds: float


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What `LLM` works with. config: resolved. generation_config: the model's generation_config.json."""

    config: EngineConfig
    model_config: ModelConfig
    engine: Engine
    input_processor: InputProcessor
    tokenizer: Tokenizer | None
    generation_config: Mapping[str, Any]
    start_times: StartTimes


def build_engine(config: EngineConfig) -> EngineParts:
    """Raises ValueError or ImportError for what cannot run here, ConnectionError if a download fails."""
    times = [perf_counter()]
    device = _choose_device(config.device)
    checkpoint = open_checkpoint(config.model, load_format=config.load_format, revision=config.revision)
    model_config = read_model_config(checkpoint.config, _choose_dtype(config.dtype, checkpoint.config, device))
    config = config.resolve(model_config, device.type)
    times.append(perf_counter())
    tokenizer = None
    if not config.skip_tokenizer_init:
        if config.tokenizer is None:
            tokenizer = load_tokenizer(config.model, revision=config.revision)
        else:
            tokenizer = load_tokenizer(config.tokenizer, revision=None)
    times.append(perf_counter())
    model = _load_model(config, model_config, checkpoint, device)
    times.append(perf_counter())
    spec = KVCacheSpec(
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=_known(config.block_size),
        dtype=getattr(torch, model_config.dtype),
    )
    backend = _choose_backend(device, config.compilation)

    def make_runner(config: EngineConfig, num_blocks: int) -> ModelRunner:
        return ModelRunner(config, model_config, model, spec.allocate(num_blocks, device), backend, device)

    num_blocks = _plan_num_blocks(config, model_config, spec, device, make_runner)
    times.append(perf_counter())
    runner = make_runner(config, num_blocks)
    times.append(perf_counter())
    return EngineParts(
        config=config,
        model_config=model_config,
        engine=Engine(
            Scheduler(
                num_blocks=runner.num_blocks,
                block_size=spec.block_size,
                max_num_seqs=_known(config.max_num_seqs),
                max_num_batched_tokens=_known(config.max_num_batched_tokens),
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            InlineExecutor(runner),
            OutputProcessor(tokenizer),
            _known(config.overlap_depth),
        ),
        input_processor=InputProcessor(
            encode=tokenizer.encode if tokenizer else None,
            vocab_size=model_config.vocab_size,
            max_model_len=_known(config.max_model_len),
            num_cache_tokens=runner.num_blocks * spec.block_size,
            eos_token_ids=_eos_token_ids(checkpoint, tokenizer),
            seed=config.seed,
            length_dependent_from=model_config.rope.length_dependent_from,
        ),
        tokenizer=tokenizer,
        generation_config=checkpoint.generation_config,
        start_times=StartTimes(*(end - start for start, end in zip(times, times[1:], strict=False))),
    )


def _known(value: int | None) -> int:
    assert value is not None, "EngineConfig.resolve decides this"
    return value


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not here: {torch.cuda.device_count()} CUDA devices are visible; use 'cpu'"
        )
    return device


def _choose_dtype(name: str, hf: Mapping[str, Any], device: torch.device) -> str:
    """ "auto" is the checkpoint's dtype, where the device computes in it at speed."""
    if name != "auto":
        return name
    stored = hf.get("dtype") or hf.get("torch_dtype")
    if stored is not None and stored not in DTYPES:
        raise ValueError(f"the checkpoint's dtype {stored!r} is not supported; pass dtype={' or '.join(DTYPES)}")
    if device.type == "cuda":
        return stored or "bfloat16"
    if stored == "float16" or not _cpu_multiplies_bfloat16():
        return "float32"
    return stored or "bfloat16"


def _cpu_multiplies_bfloat16() -> bool:
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def _choose_backend(device: torch.device, compilation: str) -> AttentionBackend:
    if device.type == "cuda":
        from nanovllm.attention.triton_paged import TritonBackend

        return TritonBackend()
    return CpuPagedBackend(load_native() if compilation != "none" else None)


def _load_model(config: EngineConfig, model_config: ModelConfig, checkpoint: Checkpoint, device: torch.device) -> Any:
    dtype = getattr(torch, model_config.dtype)
    with device:
        model = model_class(model_config.architecture)(
            model_config, _known(config.max_model_len), dtype, TensorParallel(), choose_ops(device, config.compilation)
        )
    if config.load_format == "dummy":
        fill_random(model, config.seed)
    else:
        total = sum(1 for _ in model.slots())
        load_weights(model, tqdm(checkpoint.tensors(), "Loading weights", total, unit=" tensors", disable=None))
    model.requires_grad_(False).eval()
    for module in model.modules():
        if hasattr(module, "optimize"):
            module.optimize()
    return model


def _plan_num_blocks(
    config: EngineConfig,
    model_config: ModelConfig,
    spec: KVCacheSpec,
    device: torch.device,
    make_runner: Callable[[EngineConfig, int], ModelRunner],
) -> int:
    assert config.gpu_memory_utilization is not None
    if device.type == "cpu":
        # Pages of host memory are taken when they are first written, so only what requests can use is worth reserving.
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        num_blocks = choose_num_blocks(config, spec, int(total * config.gpu_memory_utilization))
        is_set = config.num_gpu_blocks_override is not None or config.kv_cache_memory_bytes is not None
        return num_blocks if is_set else min(num_blocks, useful_num_blocks(config))
    if config.num_gpu_blocks_override is not None or config.kv_cache_memory_bytes is not None:
        return choose_num_blocks(config, spec, 0)
    return choose_num_blocks(config, spec, measure_free_bytes(config, model_config, spec, device, make_runner))


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> list[int]:
    """Every id that generation_config.json (or else config.json) or the tokenizer calls end of sequence."""
    stated = checkpoint.generation_config.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    ids = list(stated) if isinstance(stated, (list, tuple)) else [stated]
    if tokenizer is not None:
        ids.append(tokenizer.eos_token_id)
    return sorted({token_id for token_id in ids if token_id is not None})
