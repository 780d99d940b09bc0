"""llama.cpp, by its Python binding, on the GGUF file that is measured: the peer for models that are packed on a CPU.

Owns how its requests run: one after the other, as the binding has no batches, with as many threads as PyTorch has here.
Invariant: as in `engines.py`.
"""

import gc
from time import perf_counter
from typing import Any

import torch

from nanovllm.weights.checkpoint import open_checkpoint
from nanovllm_bench.workload import Workload, check_counts

_BATCH_TOKENS = 512  # of a prompt at a time


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        import llama_cpp  # not a dependency: only who compares with it has it

        self.version = llama_cpp.__version__
        path = open_checkpoint(model, load_format="auto", revision=options.get("revision")).path
        threads = torch.get_num_threads()
        if path.suffix != ".gguf":
            raise ValueError(f"--compare llama.cpp needs a GGUF file, and {path} is none")
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=options.get("max_model_len") or 4096, n_batch=_BATCH_TOKENS,
            n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False,
        )  # fmt: skip

    def run(self, workload: Workload) -> float:
        llama, counts = self._llama, []
        start = perf_counter()
        for prompt, wanted in zip(workload.prompts, workload.max_tokens, strict=True):
            llama.reset()
            llama.eval(prompt)
            token_ids = [llama.sample(temp=workload.temperature)]
            while len(token_ids) < wanted:
                llama.eval(token_ids[-1:])
                token_ids.append(llama.sample(temp=workload.temperature))
            counts.append(len(token_ids))
        seconds = perf_counter() - start
        check_counts(self.name, workload, counts)
        return seconds

    def close(self) -> None:
        self._llama.close()
        gc.collect()
