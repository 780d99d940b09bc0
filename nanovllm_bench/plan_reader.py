"""A worker without a model: reads plans, and as rank 0 answers each with as many tokens. For `bench/parallel.py`.

Owns nothing. Invariant: it imports no torch, so that a measurement of messages starts at once.
"""

import pickle
import sys

from nanovllm.engine.scheduler_output import ModelRunnerOutput
from nanovllm.executor.children import connect_to_parent
from nanovllm.executor.ring import RingReader


def main(arguments: list[str]) -> None:
    connection, (rank, num_ranks, memory_fd, doorbell) = connect_to_parent(arguments)
    ring = RingReader(memory_fd, doorbell, rank, num_ranks)
    while True:
        _, number, plan = pickle.loads(ring.read())
        if rank == 0:
            output = ModelRunnerOutput(token_ids=[[7]] * len(plan.rows))
            connection.send_bytes(pickle.dumps((number, output), pickle.HIGHEST_PROTOCOL))


if __name__ == "__main__":
    main(sys.argv[1:])
