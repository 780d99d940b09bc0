"""`nanovllm memory`: what weights and KV cache of a model would take, from its config alone.

Owns the arithmetic and the table. Invariant: reads no weight and takes no memory of the device, so it runs where the
model itself would not. What it leaves out is the work space of a step and the framework itself.
"""

from argparse import Namespace
from math import prod

import torch

from nanovllm.config import DTYPES, GPU_MEMORY_UTILIZATION, HOST_MEMORY_UTILIZATION
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.executor.worker import with_quantization
from nanovllm.layers.ops import PLAIN
from nanovllm.lora.adapter_store import AdapterStore
from nanovllm.model_config import ModelConfig
from nanovllm.models.registry import model_class, read_model_config
from nanovllm.runner.host_memory import host_memory
from nanovllm.weights.checkpoint import open_checkpoint


def run(args: Namespace) -> int:
    for name in ("--max-num-seqs", "--max-model-len", "--max-loras", "--max-lora-rank"):
        value = vars(args)[name.removeprefix("--").replace("-", "_")]
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.gpu_memory_utilization is not None and not 0 < args.gpu_memory_utilization <= 1:
        raise ValueError(f"--gpu-memory-utilization must be in (0, 1], got {args.gpu_memory_utilization}")
    is_packed = args.quantization == "gguf"
    hf = open_checkpoint(args.model, load_format="dummy", revision=args.revision, is_packed=is_packed).config
    dtype = args.dtype if args.dtype != "auto" else hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"the checkpoint's dtype {dtype!r} is not supported; pass --dtype {' or '.join(DTYPES)}")
    config = read_model_config(hf, dtype)
    length = args.max_model_len or config.max_model_len
    if length > config.max_model_len:
        raise ValueError(f"--max-model-len {length} is more than the model's {config.max_model_len} positions")

    num_parameters, weight_bytes = count_parameters(config, args.quantization)
    bytes_per_request = kv_bytes_of(config, length, args.kv_cache_dtype)
    kv_bytes = bytes_per_request * args.max_num_seqs
    adapter_bytes = slot_bytes(config, args.max_loras, args.max_lora_rank) if args.max_loras else 0
    state_bytes = config.bytes_per_state * args.max_num_seqs
    needed = weight_bytes + adapter_bytes + kv_bytes + state_bytes
    print(f"{args.model}: {config.architecture}, {config.num_layers} layers, hidden size {config.hidden_size},")
    print(f"{_heads_note(config)}, {dtype}\n")
    _print_row("weights", weight_bytes, f"{num_parameters / 1e6:,.1f} million parameters")
    _print_row("loading", weight_bytes + largest_tensor(config), "at most, with one tensor beside its place")
    if adapter_bytes:
        _print_row("adapters", adapter_bytes, f"{args.max_loras} of rank {args.max_lora_rank}, of all layers")
    _print_row(
        "KV cache",
        kv_bytes,
        f"{args.max_num_seqs:,} x {length:,} tokens at {bytes_per_request / length / 1024:,.1f} KiB each"
        + _windows_note(config, length),
    )
    if state_bytes:
        each = f"{config.bytes_per_state / 1024**2:,.1f} MiB each, of any length; as much again for each snapshot"
        _print_row("states", state_bytes, f"{args.max_num_seqs:,} at {each}")
    _print_row("together", needed, "and the work space of a step")
    print()
    for place, free, share in _devices(args.gpu_memory_utilization):
        _print_row("free", free, place)
        _print_row("may use", share, "of its memory, by --gpu-memory-utilization")
        room = min(free, share)
        beside = room - weight_bytes - adapter_bytes - state_bytes
        _print_row("fits", "yes" if needed <= room else "no", _room(beside, bytes_per_request, length))
    return 0


def count_parameters(config: ModelConfig, quantization: str | None = None) -> tuple[int, int]:
    """Numbers that such a model has, and bytes that its weights take; tied weights count once."""
    models = []
    with torch.device("meta"):
        for ops in (PLAIN, with_quantization(PLAIN, config, quantization)):
            make_model = model_class(config.architecture)
            models.append(make_model(config, 1, getattr(torch, config.dtype), TensorParallel(), ops))
            dict(models[-1].weights())  # makes the weights
    dense, kept = models
    return sum(p.numel() for p in dense.parameters()), sum(p.nbytes for p in kept.parameters())


def slot_bytes(config: ModelConfig, num_slots: int, max_rank: int) -> int:
    """Of the room on the device that so many adapters have."""
    with torch.device("meta"):
        model = model_class(config.architecture)(config, 1, getattr(torch, config.dtype), TensorParallel(), PLAIN)
        dict(model.weights())
        return AdapterStore(model, num_slots, max_rank, TensorParallel()).num_bytes


def largest_tensor(config: ModelConfig) -> int:
    """Bytes of the largest tensor of the checkpoint in the model's dtype: loading has one at a time unpacked."""
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        model = model_class(config.architecture)(config, 1, dtype, TensorParallel(), PLAIN)
        return dtype.itemsize * max(prod(spec.shape) for _, spec in model.weights() if not spec.instead_of)


def kv_bytes_of(config: ModelConfig, length: int, kv_cache_dtype: str = "auto") -> int:
    """What the engine keeps of a request of so many tokens: layers with a window give back what has left it."""
    groups = config.cache_groups(length)
    num_tokens = groups.num_blocks(length, num_step_tokens=1, block_size=1)  # in all groups together
    return num_tokens * groups.num_places * config.kv_bytes_per_token(kv_cache_dtype) // groups.num_places_used


def _heads_note(config: ModelConfig) -> str:
    if config.latent is not None:
        return f"{config.num_heads} query heads over latents of {config.latent.rank} + {config.latent.rope_dim}"
    return f"{config.num_heads} query and {config.num_kv_heads} key/value heads of {config.head_dim}"


def _windows_note(config: ModelConfig, length: int) -> str:
    windows = [window for window in config.windows if window and window < length]
    if not windows:
        return ""
    spans = " or ".join(f"{window:,}" for window in sorted(set(windows)))
    return f"; {len(windows)} of {config.num_layers} layers keep the last {spans}"


def _room(num_bytes: int, bytes_per_request: int, length: int) -> str:
    num_tokens = num_bytes * length // bytes_per_request
    if num_tokens < 1:
        return "there is no room for a KV cache beside the weights"
    return f"beside the weights {num_tokens:,} tokens of KV cache, {num_tokens // length:,} x {length:,}"


def _devices(utilization: float | None) -> list[tuple[str, int, int]]:
    """(where, free bytes, bytes that an engine takes at most) of each GPU that is visible, or of the host."""
    if torch.cuda.is_available():
        share = utilization or GPU_MEMORY_UTILIZATION
        return [
            (f"on {torch.cuda.get_device_name(index)} (cuda:{index})", free, int(total * share))
            for index in range(torch.cuda.device_count())
            for free, total in [torch.cuda.mem_get_info(index)]
        ]
    memory = host_memory()
    share = utilization or HOST_MEMORY_UTILIZATION
    return [("in this machine, or in its container", memory.available, int(memory.total * share))]


def _print_row(name: str, value: int | str, note: str) -> None:
    amount = f"{value / 1024**3:,.2f} GiB" if isinstance(value, int) else value
    print(f"{name:<10}{amount:>14}   {note}")
