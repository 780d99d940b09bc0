"""A rank that builds one engine after the other, so that many tests share the seconds its start takes.

The ranks are such as torchrun would start: each runs the same engines on the same prompts ("external_launcher").
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM
from nanovllm.distributed.process_group import join_group, open_store
from nanovllm.executor.children import Children, connect_to_parent, start_child

OPTIONS = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "block_size": 8}


def generate(folder: Path, options: dict[str, Any], rounds: Sequence[tuple[Any, Any]]) -> list[Any]:
    """The tokens of each round of (prompts, sampling parameters), all in one engine, and then its metrics."""
    with LLM(str(folder), **{**OPTIONS, **options}) as llm:
        tokens = [
            [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
            for prompts, params in rounds
        ]
        return [*tokens, llm.get_metrics()]


class Ranks:
    """`size` processes that each call the same function at the same time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._store = open_store(size)
        self._children = Children()
        for rank in range(size):
            arguments = (rank, size, self._store.port)
            self._children.add(start_child(f"rank {rank}", "tests.executor.rank_process", arguments))

    def call(self, function: Any, *arguments: Any) -> list[Any]:
        """What function(*arguments) returns on each rank."""
        for child in self._children.members:
            child.send((function, arguments))
        results: dict[str, Any] = {}
        while len(results) < self.size:
            assert self._children.wait(time.monotonic() + 120)
            results.update((child.name, message) for child, message in self._children.receive())
        return [results[f"rank {rank}"] for rank in range(self.size)]

    def generate(self, folder: Path, options: dict[str, Any], rounds: Sequence[tuple[Any, Any]]) -> list[Any]:
        """As `generate`, by an engine over all ranks; checks that they agree."""
        mine = {"tensor_parallel_size": self.size, "distributed_executor_backend": "external_launcher"}
        results = self.call(generate, folder, {**options, **mine}, rounds)
        for result in results:
            assert result[:-1] == results[0][:-1], "the ranks' tokens differ"
        return results[0]

    def close(self) -> None:
        self._children.kill()


def main(arguments: list[str]) -> None:
    connection, (rank, size, port) = connect_to_parent(arguments)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    join_group(rank, size, torch.device("cpu"), timeout=60, store_port=port)
    while True:
        function, function_arguments = connection.recv()
        connection.send(function(*function_arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
