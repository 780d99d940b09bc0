"""The composition root: from EngineConfig to a running Engine, in the order in which things must exist.

Owns that order and the choice of parts for a device. Invariant: every user-facing check of model and options comes
before the weights are read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from nanovllm.config import DTYPES, EngineConfig, NamedModule, ResolvedConfig
from nanovllm.data_parallel import DataParallelEngine, ReplicaSetup
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.cache_manager import CacheManager
from nanovllm.engine.engine import Engine
from nanovllm.engine.features.adapters import AdapterSlots
from nanovllm.engine.features.remote_functions import check_importable
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.interfaces import Executor, TokenConstraint
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.shared_prefixes import SharedPrefixes
from nanovllm.engine.state_cache import StateCache
from nanovllm.executor.external import join_launched_ranks, num_ranks_here
from nanovllm.executor.inline import InlineExecutor
from nanovllm.executor.mp import MultiprocessExecutor
from nanovllm.executor.worker import RunnerTimes, build_runner, captures_steps, num_host_slots, with_quantization
from nanovllm.kernels.cascade import TILE
from nanovllm.kernels.delta_net import CHUNK
from nanovllm.layers.ops import PLAIN
from nanovllm.model_config import ModelConfig
from nanovllm.model_files.tokenizer_files import load_tokenizer
from nanovllm.models.hf_config import read_eos_token_ids
from nanovllm.models.registry import model_class, read_model_config
from nanovllm.speculative_config import MODEL_METHODS, most_drafting
from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.tokenizer import Tokenizer
from nanovllm.weights.checkpoint import Checkpoint, open_checkpoint
from nanovllm.weights.loader import load_weights


@dataclass(frozen=True)
class StartTimes:
    """Seconds of each part of a start, in their order; the last three as in `RunnerTimes`.

    config_seconds: finding (and fetching) the checkpoint, reading its config.
    """

    config_seconds: float
    tokenizer_seconds: float
    weights_seconds: float
    memory_seconds: float
    runner_seconds: float


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What `LLM` works with. config: resolved. hf_config, generation_config: the model's JSON files of these names."""

    config: ResolvedConfig
    model_config: ModelConfig
    engine: Engine | DataParallelEngine
    num_blocks: int  # of the smallest KV cache
    num_cache_tokens: int  # that it holds, in requests as long as they may be
    input_processor: InputProcessor
    tokenizer: Tokenizer | None
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    start_times: StartTimes


def build_engine(config: EngineConfig) -> EngineParts:
    """Raises ValueError or ImportError for what cannot run here, ConnectionError if a download fails."""
    times = [perf_counter()]
    if isinstance(config.model, NamedModule) and config.device == "auto":
        config = replace(config, device=str(config.model.module.device))
    device = choose_device(config.device)
    is_packed = config.quantization == "gguf"
    checkpoint = open_checkpoint(
        config.model, load_format=config.load_format, revision=config.revision, is_packed=is_packed
    )
    model_config = read_model_config(checkpoint.config, choose_dtype(config.dtype, checkpoint.config, device))
    config = config.resolve(model_config, device.type)
    times.append(perf_counter())
    tokenizer = None
    if not config.skip_tokenizer_init:
        if config.tokenizer is None:
            tokenizer = load_tokenizer(config.model, revision=config.revision)
        else:
            tokenizer = load_tokenizer(config.tokenizer, revision=None)
    times.append(perf_counter())
    eos_token_ids = _eos_token_ids(checkpoint, tokenizer, model_config.vocab_size)
    is_remote = config.has_replicas or config.distributed_executor_backend == "mp"
    if is_remote and isinstance(config.model, NamedModule):
        raise NotImplementedError("a model in this process is run in this process: on one device, without replicas")
    if is_remote:
        check_importable(config.logits_processors, "logits_processors")
    if config.has_replicas and config.speculative_config is not None:  # else this process plans
        check_importable([config.speculative_config.proposer], "speculative_config.proposer")
    engine, num_blocks, runner_times = _start_engine(config, model_config, checkpoint, device, tokenizer)
    groups = model_config.cache_groups(config.max_model_len)
    sizes = config.block_size, config.max_model_len, config.max_num_batched_tokens
    return EngineParts(
        config=config,
        model_config=model_config,
        engine=engine,
        num_blocks=num_blocks,
        num_cache_tokens=groups.num_tokens_in(num_blocks, *sizes),
        input_processor=InputProcessor(
            encode=tokenizer.encode if tokenizer else None,
            special_tokens=tokenizer.special_tokens if tokenizer else {},
            vocab_size=model_config.vocab_size,
            num_layers=model_config.num_layers,
            max_model_len=config.max_model_len,
            eos_token_ids=eos_token_ids,
            num_cache_tokens=groups.longest_request(num_blocks, *sizes),
            seed=config.seed,
            max_logprobs=config.max_logprobs,
            length_dependent_from=model_config.length_dependent_from,
            long_from=model_config.long_from,
            has_logits_processors=bool(config.logits_processors),
            is_remote=is_remote,
            compile_constraint=_constraint_compiler(tokenizer, model_config.vocab_size, eos_token_ids),
            masks_come_late=not is_remote and config.speculative_config is None,
        ),
        tokenizer=tokenizer,
        hf_config=checkpoint.config,
        generation_config=checkpoint.generation_config,
        start_times=StartTimes(times[1] - times[0], times[2] - times[1], *runner_times),
    )


def _start_engine(
    config: ResolvedConfig,
    model_config: ModelConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    tokenizer: Tokenizer | None,
) -> tuple[Engine | DataParallelEngine, int, RunnerTimes]:
    """The engine, or as many as config asks for; the blocks of the smallest KV cache; the times of the first."""
    size = num_ranks_here(config)
    if device.type == "cuda" and size > 1 and (device.index or 0) + size > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel_size {config.tensor_parallel_size} times data_parallel_size {config.data_parallel_size}, "
            f"from {device} on, needs more than the {torch.cuda.device_count()} CUDA devices that are visible"
        )
    keeps_all = model_config.cache_groups(config.max_model_len).keep_everything and not model_config.bytes_per_state
    if config.has_tiers and not keeps_all:
        raise NotImplementedError(
            "kv_offload_gb and prefix_store cover layers that keep the keys and values of all tokens, and not windows "
            f"or states, as {model_config.architecture} has them; leave both out"
        )
    _rehearse_loading(config, model_config, checkpoint)
    if config.has_replicas:
        setups = _replica_setups(replace(config, model=str(checkpoint.path)), device)
        replicas = DataParallelEngine(config, setups, OutputProcessor(tokenizer, config.deterministic))
        return replicas, replicas.num_blocks, replicas.runner_times
    make_scheduler, make_engine = _planner_and_loop(config, model_config, device)
    executor, times = _start_executor(_of_workers(config, model_config, checkpoint), model_config, checkpoint, device)
    cache = _cache_manager(config, model_config, executor.num_blocks, device)
    if config.has_tiers:
        executor, cache = _with_tiers(config, model_config, executor, checkpoint.path)
    scheduler = make_scheduler(
        cache,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=config.enable_chunked_prefill,
        shared_prefixes=_shared_prefixes(config, model_config, device),
        **({"admits": AdapterSlots(config.max_loras).admits} if config.enable_lora else {}),
    )
    if isinstance(cache, StateCache):
        cache.waiting = lambda: scheduler.waiting
    engine = make_engine(scheduler, executor, OutputProcessor(tokenizer, config.deterministic), config.overlap_depth)
    scheduler.catch_up = engine.catch_up
    return engine, executor.num_blocks, times


def _planner_and_loop(
    config: ResolvedConfig, model_config: ModelConfig, device: torch.device
) -> tuple[Callable[..., Scheduler], Callable[..., Engine]]:
    """The classes, or those that draft tokens, or write a trace of what they do; both are rooms.

    Raises ValueError or TypeError for a proposer that cannot be made.
    """
    planner: type[Scheduler] = Scheduler
    options: dict[str, Any] = {}
    if config.speculative_config is not None:
        from nanovllm.engine.speculation.build import speculative_planner

        is_one_of_many = config.distributed_executor_backend == "external_launcher"  # who must plan the same steps
        clock = None if is_one_of_many else perf_counter
        planner, options = speculative_planner(
            config.speculative_config,
            model_config.vocab_size,
            clock,
            captures_steps(config, model_config, device),
            most_drafting(config, model_config.state is not None),
        )
    if config.trace is None:
        return partial(planner, **options), Engine
    from nanovllm.tracing.device_clock import choose_clock
    from nanovllm.tracing.traced_engine import TracedEngine, open_recorder, traced

    device_clock = choose_clock(device.type, config.distributed_executor_backend)
    return (
        partial(traced(planner), recorder=open_recorder(config), **options),
        partial(TracedEngine, clock=device_clock),
    )


def _of_workers(config: ResolvedConfig, model_config: ModelConfig, checkpoint: Checkpoint) -> ResolvedConfig:
    """Workers are told of speculation if they have a part in it. Raises ValueError for a wrong draft model."""
    speculative = config.speculative_config
    if speculative is None or speculative.method not in MODEL_METHODS:
        has_states = model_config.state is not None
        return replace(config, speculative_config=speculative.sizes if speculative and has_states else None)
    from nanovllm.runner.drafting import check_draft

    check_draft(config, model_config, checkpoint)
    return config


def _cache_manager(
    config: ResolvedConfig, model_config: ModelConfig, num_blocks: int, device: torch.device
) -> CacheManager:
    groups = model_config.cache_groups(config.max_model_len)
    limits = {"max_model_len": config.max_model_len, "max_step_tokens": config.max_num_batched_tokens}
    if (memory := model_config.state_memory(config.kv_cache_dtype, config.block_size)) is not None:
        slots = memory.slots(config.max_num_seqs, num_blocks)
        limits["unit"] = CHUNK if device.type == "cuda" else 1
        return StateCache(num_blocks, config.block_size, config.enable_prefix_caching, slots=slots, **limits)
    if groups.keep_everything:
        return CacheManager(num_blocks, config.block_size, config.enable_prefix_caching)
    from nanovllm.engine.grouped_cache import GroupedCache  # a leaf: most models have no window

    return GroupedCache(num_blocks, config.block_size, config.enable_prefix_caching, groups.specs, **limits)


def _with_tiers(
    config: ResolvedConfig, model_config: ModelConfig, executor: Executor, model: Path
) -> tuple[Executor, CacheManager]:
    from nanovllm.tiers.host_slots import HostSlots  # a room
    from nanovllm.tiers.store import PrefixStore, open_folders
    from nanovllm.tiers.tiered_cache import TieredCache, TieredExecutor

    host = HostSlots(num_host_slots(config, model_config)) if config.kv_offload_gb else None
    store = None if config.prefix_store is None else PrefixStore(open_folders(config, model))
    cache = TieredCache(executor.num_blocks, config.block_size, host, store)
    return TieredExecutor(executor, cache), cache


def _shared_prefixes(config: ResolvedConfig, model_config: ModelConfig, device: torch.device) -> SharedPrefixes | None:
    """Where a kernel reads at once what decodes share. Its sums have another order, so no bit would be promised.

    It reads one block table for all layers, and keys with values beside them.
    """
    if device.type == "cpu" or config.deterministic or config.disable_cascade_attn:
        return None
    keeps_all = model_config.cache_groups(config.max_model_len).keep_everything
    if not keeps_all or model_config.latent is not None:
        return None
    return SharedPrefixes(TILE, config.block_size)


def _rehearse_loading(config: ResolvedConfig, model_config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise ValueError for sizes that do not divide among the ranks, or that the checkpoint does not have.

    It is loading itself, of rank 0's part, with tensors that have no memory.
    """
    with torch.device("meta"):
        ops = with_quantization(PLAIN, model_config, config.quantization)
        make_model = model_class(model_config.architecture)
        model = make_model(model_config, 1, torch.float32, TensorParallel(0, config.tensor_parallel_size), ops)
        if config.load_format != "dummy":
            try:
                load_weights(model, checkpoint.headers())
            except ValueError as error:
                raise ValueError(f"{checkpoint.path}: {error}") from error


def _replica_setups(config: ResolvedConfig, device: torch.device) -> list[ReplicaSetup]:
    """One engine on each device, or on each group of tensor-parallel devices; on a CPU they share its memory."""
    size, tp_size = config.data_parallel_size, config.tensor_parallel_size
    num_threads = max(1, torch.get_num_threads() // size)
    config = replace(config, data_parallel_size=1, engine_process=False, revision=None)
    configs = [config] * size
    if config.trace is not None and size > 1:
        from nanovllm.tracing.traced_engine import numbered

        configs = [replace(config, trace=str(numbered(config.trace, i))) for i in range(size)]
    if device.type == "cpu":
        memory = config.gpu_memory_utilization / size
        return [ReplicaSetup(replace(one, gpu_memory_utilization=memory), num_threads) for one in configs]
    devices = [f"cuda:{(device.index or 0) + i * tp_size}" for i in range(size)]
    return [ReplicaSetup(replace(one, device=d), num_threads) for one, d in zip(configs, devices, strict=True)]


def _start_executor(
    config: ResolvedConfig, model_config: ModelConfig, checkpoint: Checkpoint, device: torch.device
) -> tuple[Executor, RunnerTimes]:
    """Who computes, with model and KV cache: this process, workers of its own, or this one of a launcher's ranks."""
    backend = config.distributed_executor_backend
    if backend == "external_launcher":
        tp, device, leave = join_launched_ranks(config, device)
        runner, times = build_runner(config, model_config, checkpoint, device, tp)
        return InlineExecutor(runner, leave), times
    if backend == "mp":
        executor = MultiprocessExecutor(replace(config, model=str(checkpoint.path)), model_config, device)
        return executor, executor.start_times
    runner, times = build_runner(config, model_config, checkpoint, device, TensorParallel())
    return InlineExecutor(runner), times


def choose_device(name: str) -> torch.device:
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


def choose_dtype(name: str, hf: Mapping[str, Any], device: torch.device) -> str:
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


def _constraint_compiler(
    tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: list[int]
) -> Callable[[StructuredOutputsParams, bool], TokenConstraint] | None:
    if tokenizer is None:
        return None

    @cache
    def compiler() -> Any:
        # A leaf: it needs a package of its own, and reads the whole vocabulary when it is made.
        from nanovllm.structured.llguidance_backend import GrammarCompiler

        return GrammarCompiler(tokenizer.to_json(), vocab_size, eos_token_ids)

    return lambda params, ignore_eos: compiler().compile(params, ignore_eos)


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Every id that generation_config.json (or else config.json) or the tokenizer calls end of sequence."""
    stated = checkpoint.generation_config if "eos_token_id" in checkpoint.generation_config else checkpoint.config
    ids = read_eos_token_ids(stated, vocab_size)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return sorted(set(ids))
