"""join_launched_ranks: become a rank of a group that another program started, say `torchrun --nproc-per-node N`.

Every process runs the same script on the same prompts, plans for itself, and computes its part of the model. Owns the
reading of torchrun's environment variables, on one host or on several. Invariant: planning is deterministic and every
rank samples the same tokens, so all processes make the same calls without a word about plans.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from nanovllm.config import ResolvedConfig
from nanovllm.distributed.process_group import join_group, leave_group
from nanovllm.distributed.tensor_parallel import TensorParallel

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def num_ranks_here(config: ResolvedConfig) -> int:
    """How many of the model's ranks this host's devices hold: of a launcher's, those that it started here."""
    size = config.tensor_parallel_size * config.data_parallel_size
    is_launched = config.distributed_executor_backend == "external_launcher"
    return int(os.environ.get("LOCAL_WORLD_SIZE", size)) if is_launched else size


def join_launched_ranks(
    config: ResolvedConfig, device: torch.device
) -> tuple[TensorParallel, torch.device, Callable[[], None]]:
    """This rank's place, its device, and how to leave. Raises ValueError if the launcher's ranks are not the config's.

    A process group that the script has made already is used and left alone.
    """
    size = config.tensor_parallel_size
    missing = [name for name in _VARIABLES if name not in os.environ]
    if len(missing) == len(_VARIABLES) and size == 1:
        return TensorParallel(), device, lambda: None  # no launcher, and none is needed
    if missing:
        raise ValueError(
            f"distributed_executor_backend='external_launcher' needs the environment variable {missing[0]}: start the "
            f"script with `torchrun --nproc-per-node {size}`, or leave the option out"
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in _VARIABLES)
    if world_size != size:
        raise ValueError(f"tensor_parallel_size is {size}, but the launcher started {world_size} processes")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return TensorParallel(rank, size, dist.group.WORLD), device, lambda: None
    tp = join_group(rank, size, device, timeout=config.distributed_timeout_seconds)
    return tp, device, leave_group
