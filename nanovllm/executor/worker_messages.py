"""What passes between `executor/mp.py` and its workers beside plans and tokens.

Owns nothing but fields. Invariant: everything here can be pickled.
"""

from dataclasses import dataclass

from nanovllm.config import ResolvedConfig
from nanovllm.executor.worker import RunnerTimes
from nanovllm.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """config: resolved; its model is a path. store_port: of the TCPStore on this host where several ranks meet.

    first_device: the CUDA device of rank 0. num_threads: for a CPU.
    """

    config: ResolvedConfig
    model_config: ModelConfig
    device_type: str
    first_device: int
    num_threads: int
    store_port: int


@dataclass(frozen=True)
class Ready:
    """A worker's answer to its set-up."""

    num_blocks: int
    times: RunnerTimes
