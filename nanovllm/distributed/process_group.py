"""join_group: this process becomes a rank of a tensor-parallel group.

Owns the process group of torch.distributed: NCCL between GPUs, gloo between CPUs. Invariant: a group of one rank is no
group: it opens no port.
"""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from nanovllm.distributed.tensor_parallel import TensorParallel

_LOCALHOST, _LOOPBACK = "127.0.0.1", "lo"


def open_store(size: int) -> TCPStore:
    """Where the ranks of one host meet: a server on a port that the system picks, reachable from this host alone."""
    listener = socket.create_server((_LOCALHOST, 0))
    port = listener.getsockname()[1]
    # The store takes the socket over. World size and waiting are left to the process group.
    return TCPStore(_LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def join_group(
    rank: int, size: int, device: torch.device, *, timeout: float, store_port: int | None = None
) -> TensorParallel:
    """Wait for all ranks. store_port: of `open_store` on this host; None goes by torchrun's environment variables.

    timeout: seconds that a collective may take.
    """
    if size == 1:
        return TensorParallel()
    if store_port is not None and _LOOPBACK in (name for _, name in socket.if_nameindex()):
        # gloo would look the host's own name up, which not every machine can.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
    store = None if store_port is None else TCPStore(_LOCALHOST, store_port, is_master=False)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    return TensorParallel(rank, size, dist.group.WORLD)


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
