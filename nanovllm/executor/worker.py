"""build_runner: from a resolved config to a ModelRunner with weights and KV cache, on one rank's device.

Owns the order of it: model, weights, memory, cache. Every process that computes runs this, be it the engine's own or a
worker's. Invariant: ranks that share a model get KV caches of equally many blocks, as many as fit the least memory,
since one plan is for all of them.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.batch_invariant import BatchInvariantBackend, cpp_or_reference
from nanovllm.attention.cpu_paged import CpuPagedBackend
from nanovllm.config import NamedModule, ResolvedConfig
from nanovllm.distributed.shared_memory import can_share_memory, share_memory
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.engine.interfaces import PendingStep
from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.kernels.all_gather import InPlaceAllGather
from nanovllm.kernels.all_reduce import OneShotAllReduce
from nanovllm.kernels.cache_codes import cache_dtype
from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from nanovllm.kernels.sum_norm import SumNorm, can_sum_norm
from nanovllm.layers.experts import Experts
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.ops import Ops, choose_ops
from nanovllm.model_config import ModelConfig
from nanovllm.models.registry import model_class
from nanovllm.runner.host_memory import host_memory
from nanovllm.runner.kv_cache import KVCacheSpec, MakeZeros, choose_num_blocks, useful_num_blocks, zeros
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.runner.sleeping import choose_sleeper
from nanovllm.speculative_config import MODEL_METHODS, num_draft_slots
from nanovllm.weights.checkpoint import Checkpoint
from nanovllm.weights.loader import fill_random, load_weights, places


class Runner(Protocol):
    """What runs steps, one after the other, with or without CUDA graphs."""

    model: Any
    device: torch.device
    num_blocks: int

    def execute(self, plan: SchedulerOutput) -> PendingStep: ...


class RunnerTimes(NamedTuple):
    """Seconds of each part of `build_runner`, in their order.

    weights_seconds: building the model and filling it. memory_seconds: choosing the size of the KV cache; on a GPU this
    runs, so compiles, the largest step. runner_seconds: allocating the cache and the rows; on a GPU, capturing the
    largest decode step.
    """

    weights_seconds: float
    memory_seconds: float
    runner_seconds: float


def build_runner(
    config: ResolvedConfig, model_config: ModelConfig, checkpoint: Checkpoint, device: torch.device, tp: TensorParallel
) -> tuple[Runner, RunnerTimes]:
    """config is resolved. Raises ValueError for a checkpoint that does not fit, or memory that does not suffice."""
    times = [perf_counter()]
    # Ranks of a launcher have nobody who ends them when one is missing, as NCCL does: a kernel would wait for ever.
    if device.type == "cuda" and config.distributed_executor_backend == "mp" and not config.disable_custom_all_reduce:
        tp = _with_kernels(tp, device, config, model_config)
    model = _load_model(config, config.max_model_len, model_config, checkpoint, device, tp)
    model.sleeper = sleeper = choose_sleeper(device, config.enable_sleep_mode)
    if isinstance(config.model, NamedModule):
        from nanovllm.weights.module import share  # a leaf: most models are files

        share(config.model.module, dict(model.weights()))
    elif sleeper is not None:
        sleeper.hold_weights(model)
    adapters = None
    if config.enable_lora:
        from nanovllm.runner.adapter_runner import Adapters  # a room: most engines have none

        adapters = Adapters(config, model, device, tp)
        if sleeper is not None:
            sleeper.hold_slots(adapters.store.stacks)
    draft = None
    if config.speculative_config is not None and config.speculative_config.method in MODEL_METHODS:
        from nanovllm.runner.drafting import DraftModel, HeadDraft  # a room, too

        def load(model_config: ModelConfig, checkpoint: Checkpoint) -> Any:
            return _load_model(config, config.max_model_len, model_config, checkpoint, device, tp)

        kind = DraftModel if config.speculative_config.method == "draft_model" else HeadDraft
        draft = kind(config, model_config, model, checkpoint, device, tp, load)
        if sleeper is not None:
            sleeper.hold_weights(draft.model, are_updated=False)
    times.append(perf_counter())
    spec = cache_spec(config, model_config, tp, 0 if draft is None else draft.bytes_per_block)
    backend = choose_backend(config, model_config, device)

    def make_runner(config: ResolvedConfig, num_blocks: int, make: MakeZeros = zeros) -> ModelRunner:
        caches = spec.allocate(num_blocks, device, make)
        given = config, model_config, model, caches, backend, device, tp, spec.groups, make
        return ModelRunner(*given) if adapters is None else adapters.runner(*given)

    num_blocks = tp.smallest(plan_num_blocks(config, model_config, spec, device, tp, make_runner), device)
    times.append(perf_counter())
    make = zeros if sleeper is None else sleeper.zeros
    eager = make_runner(config, num_blocks, make)
    if draft is not None:  # before steps of `eager` are captured
        drafter: Any = draft.runner(eager, choose_backend(config, draft.model_config, device), make)
    runner: Runner = eager
    graphs = None
    if captures_steps(config, model_config, device):
        from nanovllm.runner.graphs.graph_runner import GraphRunner

        runner = graphs = (GraphRunner if adapters is None else adapters.graph_runner)(eager, config, model_config)
    if draft is not None:
        from nanovllm.runner.drafting import DraftingRunner, chained_steps

        chain = None
        if graphs is not None:
            chain = chained_steps(config, draft, drafter, eager, graphs)
            if not draft.in_one_pass:
                drafter = GraphRunner(drafter, draft.config, draft.model_config, splits_prompts=draft.head is None)
        runner = DraftingRunner(runner, drafter, draft, chain)
    if config.has_tiers:
        from nanovllm.tiers.mover import with_tiers  # a room

        num_slots = num_host_slots(config, model_config)
        runner = with_tiers(runner, eager.kv_caches, config, checkpoint.path, num_slots, tp.rank, make)
    times.append(perf_counter())
    return runner, RunnerTimes(*(end - start for start, end in pairwise(times)))


def cache_spec(
    config: ResolvedConfig, model_config: ModelConfig, tp: TensorParallel, bytes_beside: int = 0
) -> KVCacheSpec:
    """bytes_beside: that another model keeps for each block."""
    return KVCacheSpec(
        groups=model_config.cache_groups(config.max_model_len),
        num_kv_heads=len(tp.kv_heads(model_config.num_kv_heads)),
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype=cache_dtype(config.kv_cache_dtype, model_config.dtype),
        states=model_config.state_memory(config.kv_cache_dtype, config.block_size),
        num_ranks=tp.size,
        bytes_beside=bytes_beside,
        num_planes=model_config.num_cache_planes,
        layer_heads=tuple((len(tp.kv_heads(count)), dim) for count, dim in model_config.layer_heads),
    )


def num_host_slots(config: ResolvedConfig, model_config: ModelConfig) -> int:
    """Blocks that `kv_offload_gb` has room for, all ranks' parts of them; the same number for planner and workers."""
    size = config.tensor_parallel_size
    num_bytes = cache_spec(config, model_config, TensorParallel(0, size)).bytes_per_block * size
    return int(config.kv_offload_gb * 2**30) // num_bytes


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def captures_steps(config: ResolvedConfig, model_config: ModelConfig, device: torch.device) -> bool:
    """Do steps run as CUDA graphs, wherever one fits?"""
    return can_capture(device) and not config.enforce_eager and model_config.length_dependent_from is None


def _with_kernels(
    tp: TensorParallel, device: torch.device, config: ResolvedConfig, model_config: ModelConfig
) -> TensorParallel:
    """What few rows need goes straight from device to device, if all can. Every rank calls it."""
    if tp.size == 1 or not tp.smallest(can_share_memory(tp.rank, tp.size, device), device):
        return tp
    dim, itemsize = model_config.hidden_size, getattr(torch, model_config.dtype).itemsize
    logits_bytes = config.max_num_seqs * model_config.vocab_size * itemsize
    sizes = [
        OneShotAllReduce.memory_bytes(tp.size),
        SumNorm.memory_bytes(tp.size, dim, itemsize) if can_sum_norm(dim, itemsize) else 0,
        InPlaceAllGather.memory_bytes(tp.size, logits_bytes),
    ]
    memory = None
    try:
        memory = share_memory(sum(sizes), device, tp.group)
    except RuntimeError as error:
        warnings.warn(f"the devices share no memory, so NCCL does all sums: {error}", RuntimeWarning, stacklevel=2)
    if not tp.smallest(memory is not None, device) or memory is None:
        return tp
    first, second, third = ([address + sum(sizes[:part]) for address in memory.addresses] for part in range(3))
    return replace(
        tp,
        sum_few=OneShotAllReduce(tp.rank, first, device, memory),
        sum_norm=SumNorm(tp.rank, second, dim, itemsize, device, memory) if sizes[1] else None,
        gather=InPlaceAllGather(tp.rank, third, memory.own[sum(sizes[:2]) :], memory),
    )


def _load_model(
    config: ResolvedConfig,
    max_len: int,
    model_config: ModelConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    tp: TensorParallel,
) -> Any:
    dtype = getattr(torch, model_config.dtype)
    with device:
        ops = choose_ops(device, config.compilation, config.deterministic)
        ops = with_quantization(ops, model_config, config.quantization)
        model = model_class(model_config.architecture)(model_config, max_len, dtype, tp, ops)
        specs = dict(model.weights())  # this makes the weights
    if config.load_format == "dummy":
        fill_random(model, config.seed)
    else:
        num_tensors = sum(1 for spec in specs.values() if not spec.instead_of)
        is_shown = config.use_tqdm_on_load and tp.rank == 0
        with tqdm(  # None: shown on a terminal
            desc="Loading weights", total=num_tensors, unit=" tensors", disable=None if is_shown else True
        ) as progress:
            load_weights(model, checkpoint.tensors(dtype, places(specs)), progress.update)
    del specs  # they hold the weights, which `finish` may put into another form
    model.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.method.is_shared = isinstance(config.model, NamedModule)
            module.finish()
        elif isinstance(module, Experts):
            module.finish()
    if tp.sum_norm is not None:
        from nanovllm.layers.summing_norm import put_sums_into_norms

        put_sums_into_norms(model, tp)
    return model


def with_quantization(ops: Ops, model_config: ModelConfig, quantization: str | None) -> Ops:
    """ops for a model whose weights are quantized, in the checkpoint or, as the option `quantization` says, from it.

    Raises NotImplementedError for a form that is not known.
    """
    if model_config.quantization is None and quantization is None:
        return ops
    from nanovllm.quantization.experts import experts_by
    from nanovllm.quantization.online import OnlineScheme  # a room: most models are dense
    from nanovllm.quantization.scheme import quantized_by, read_scheme

    stored = model_config.quantization
    scheme = OnlineScheme(quantization or "") if stored is None else read_scheme(stored)
    linear_method = quantized_by(scheme, dense=ops.linear_method)
    return ops._replace(linear_method=linear_method, experts_method=partial(experts_by, scheme))


def choose_backend(config: ResolvedConfig, model_config: ModelConfig, device: torch.device) -> AttentionBackend:
    """For the layers of this model, which may be one that drafts."""
    if model_config.latent is not None and device.type == "cuda":
        from nanovllm.attention.triton_latent import TritonLatentBackend

        return TritonLatentBackend(config.deterministic)
    if config.deterministic and device.type == "cuda":
        from nanovllm.attention.triton_paged import BatchInvariantTritonBackend

        return BatchInvariantTritonBackend()
    if config.deterministic:
        return BatchInvariantBackend(cpp_or_reference(load_cpu_kernels()))
    if device.type == "cuda":
        from nanovllm.attention.triton_paged import TritonBackend

        return TritonBackend()
    native = load_cpu_kernels() if config.compilation != "none" else None
    if model_config.latent is not None:
        from nanovllm.attention.cpu_latent import CpuLatentBackend  # a leaf: most models cache keys and values

        return CpuLatentBackend(native)
    return CpuPagedBackend(native)


def plan_num_blocks(
    config: ResolvedConfig,
    model_config: ModelConfig,
    spec: KVCacheSpec,
    device: torch.device,
    tp: TensorParallel,
    make_runner: Callable[[ResolvedConfig, int], ModelRunner],
) -> int:
    """KV blocks that fit beside the model on this rank's device."""
    if device.type == "cpu":
        # Pages of host memory are taken when they are first written, so only what requests can use is worth reserving.
        total = host_memory().total // tp.size  # the ranks share the memory
        rows = (config.max_num_seqs + num_draft_slots(config)) * model_config.bytes_per_state // tp.size
        num_blocks = choose_num_blocks(config, spec, int(total * config.gpu_memory_utilization) - rows)
        is_set = config.num_gpu_blocks_override is not None or config.kv_cache_memory_bytes is not None
        return num_blocks if is_set else min(num_blocks, useful_num_blocks(config, spec.groups))
    if config.num_gpu_blocks_override is not None or config.kv_cache_memory_bytes is not None:
        return choose_num_blocks(config, spec, 0)
    from nanovllm.runner.graphs.memory import measure_free_bytes

    return choose_num_blocks(config, spec, measure_free_bytes(config, model_config, spec, device, make_runner))
