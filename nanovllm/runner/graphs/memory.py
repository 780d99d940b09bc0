"""How much of a GPU is left for the KV cache once weights, activations and captured graphs have their share.

Owns the measurement: the largest step the scheduler may ever plan is run once, and its peak is what activations need.
Invariant: the engine stays inside gpu_memory_utilization of the card, other processes' memory counted in.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from nanovllm.config import ResolvedConfig
from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.model_config import ModelConfig
from nanovllm.runner.graphs.captured_steps import warm_up_kernels
from nanovllm.runner.graphs.graph_runner import can_capture_prompts
from nanovllm.runner.graphs.layouts import PromptLayout
from nanovllm.runner.kv_cache import KVCacheSpec
from nanovllm.runner.model_runner import ModelRunner
from nanovllm.sampling_params import SamplingParams

_GRAPH_OVERHEAD = 256 * 2**20  # what the driver and the graphs' own pool take beyond the logits


def largest_step(config: ResolvedConfig) -> SchedulerOutput:
    """max_num_seqs requests that fill the token budget and are all sampled, with every stage on; all in KV block 0."""
    num_reqs = config.max_num_seqs
    length = max(1, min(config.max_num_batched_tokens // num_reqs, config.max_model_len))
    params = SamplingParams(
        temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logit_bias={0: 1}, logprobs=20
    )
    block_ids = [0] * -(-length // config.block_size)
    return SchedulerOutput(
        new_rows=[
            NewRow(
                row=row,
                num_computed_tokens=0,
                num_prompt_tokens=length,
                rope_len=length,
                block_ids=block_ids,
                params=params,
                seed=row,
                stop_token_ids=(),
                token_ids=[0] * length,
            )
            for row in range(num_reqs)
        ],
        new_blocks=[],
        rows=list(range(num_reqs)),
        num_scheduled_tokens=[length] * num_reqs,
        num_computed_tokens=[0] * num_reqs,
        num_samples=[1] * num_reqs,
        token_ids=[0] * (num_reqs * length),
        num_decodes=num_reqs if length == 1 else 0,
    )


def measure_free_bytes(
    config: ResolvedConfig,
    model_config: ModelConfig,
    spec: KVCacheSpec,
    device: torch.device,
    make_runner: Callable[[ResolvedConfig, int], ModelRunner],
) -> int:
    """Bytes for the KV cache on this CUDA device. make_runner(config, num_blocks): a runner with its own cache."""
    weights = torch.cuda.memory_allocated(device)
    runner = make_runner(replace(config, enforce_eager=True, logits_processors=()), 1)
    if model_config.length_dependent_from is None:
        warm_up_kernels(runner, config, can_capture_prompts(model_config))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    runner.execute(largest_step(config)).result()
    del runner
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - spec.bytes_per_block
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    elsewhere = total - free - torch.cuda.memory_reserved(device)  # the CUDA context, and other processes
    graphs = 0
    if not config.enforce_eager:
        most_tokens, _ = PromptLayout().largest
        work_space = (peak - weights) * min(1.0, most_tokens / config.max_num_batched_tokens)
        logits = config.max_num_seqs * model_config.vocab_size * spec.dtype.itemsize
        graphs = int(work_space) + logits + _GRAPH_OVERHEAD
    return int(total * config.gpu_memory_utilization) - elsewhere - peak - graphs
