"""CapturedSteps: the steps that CUDA graphs are made of, from their inputs to tokens and logits, without the host.

Owns how such a step runs; it computes with the ModelRunner's model, cache and rows, and `layouts.py` says what it is
told. Invariant: every size comes from shapes, so that a replay does the same for any requests.
"""

import torch
from torch import Tensor

from nanovllm.config import ResolvedConfig
from nanovllm.kernels.attention_types import AttentionMetadata
from nanovllm.kernels.cascade import CascadeInputs
from nanovllm.kernels.gather_rows import gather_rows
from nanovllm.kernels.prepare_inputs import StepInputs
from nanovllm.kernels.triton.common.launch import dependent_launch
from nanovllm.layers.experts import Experts
from nanovllm.runner.graphs.cuda_graphs import compile_kernels, padding
from nanovllm.runner.graphs.layouts import CascadeLayout, DecodeInputs, DecodeLayout, PromptInputs, PromptLayout
from nanovllm.runner.model_runner import ModelRunner

# For some of the kernels, sizes between two of these are as the greater one (`skinny_linear.py`).
KINDS_OF_DECODES = (1, 2, 8, 16, 32, 64)


class CapturedSteps:
    def __init__(self, runner: ModelRunner, max_num_seqs: int) -> None:
        self._runner = runner
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=runner.device)

    def decode(self, inputs: DecodeInputs, cascade: CascadeInputs | None = None) -> tuple[Tensor, Tensor]:
        """A whole decode step on the device, [size] tokens and logits."""
        size, max_blocks = inputs.rows.shape[0], self._runner.state.max_blocks
        starts = self._starts[: size + 1]
        step = self._runner.prepare(inputs.rows, starts, inputs.token_ids, max_blocks, inputs.new_blocks)
        hidden = self._forward(inputs.rows, step, starts, [1] * size, size, cascade)
        return self._sample(hidden, inputs.rows, step.seq_lens)

    def decode_cascade(self, inputs: tuple[DecodeInputs, CascadeInputs]) -> tuple[Tensor, Tensor]:
        """As `decode`, where some rows share prefixes."""
        return self.decode(*inputs)

    def prompts(self, inputs: PromptInputs, num_decodes: int = 0) -> tuple[Tensor, Tensor]:
        """A whole step with prompts, its new rows and blocks in place. num_decodes: requests that attention takes for
        such; a captured step does not know how many it will have."""
        step = self._runner.prepare(
            inputs.rows, inputs.query_start_loc, inputs.token_ids, self._runner.state.max_blocks
        )
        num_tokens, num_others = inputs.token_ids.shape[0] - num_decodes, inputs.rows.shape[0] - num_decodes - 1
        lens = [1] * num_decodes + [num_tokens] + [0] * num_others  # their sum is all that counts
        hidden = self._forward(inputs.rows, step, inputs.query_start_loc, lens, num_decodes, cascade=None)
        hidden = gather_rows(hidden, inputs.sampled_from)
        return self._sample(hidden, inputs.sampled_rows, inputs.sampled_positions)

    def _forward(
        self,
        rows: Tensor,
        inputs: StepInputs,
        query_start_loc: Tensor,
        query_lens: list[int],
        num_decodes: int,
        cascade: CascadeInputs | None,
    ) -> Tensor:
        """Hidden states [num_tokens, hidden_size], without the host: every size comes from shapes."""
        max_len = self._runner.state.max_blocks * self._runner.block_size
        meta = AttentionMetadata(
            query_start_loc=query_start_loc,
            seq_lens=inputs.seq_lens,
            block_table=inputs.block_table,
            slot_mapping=inputs.slot_mapping,
            num_decodes=num_decodes,
            num_reqs=len(query_lens),
            max_query_len=max(query_lens),
            query_lens_host=query_lens,
            seq_lens_host=[max_len] * len(query_lens),
            cascade=cascade,
        )
        return self._runner.run_model(rows, inputs, meta)

    def _sample(self, hidden: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._runner.compute_logits(hidden, rows)
        return self._runner.sampler.sample_captured(logits, rows, positions), logits


def runs_before_capture(config: ResolvedConfig) -> bool:
    """NCCL connects at the first sum, and torch.compile compiles what it is about to run."""
    return config.tensor_parallel_size > 1 or config.compilation == "inductor"


@torch.inference_mode()
def warm_up_kernels(runner: ModelRunner, config: ResolvedConfig, captures_prompts: bool) -> None:
    """Compile, side by side, the kernels of large steps, be they captured or not. No request must be there yet."""
    if runs_before_capture(config):
        return
    from nanovllm.sampling.stages.edits_on_gpu import warm_up_edits

    steps = CapturedSteps(runner, config.max_num_seqs)
    decode_layout, prompt_layout = DecodeLayout(config.max_num_seqs), PromptLayout()
    largest = decode_layout.sizes[-1]
    decodes = padding(decode_layout, largest, runner.device)
    prompts = padding(prompt_layout, prompt_layout.largest, runner.device)
    cascades = []
    if runner.cascade_items is not None:
        layout = CascadeLayout(decode_layout, runner.cascade_items)
        few = max(size for size in decode_layout.sizes if size <= 16)  # for these, kernels have another shape
        cascades = [padding(layout, size, runner.device) for size in sorted({few, largest})]

    prompt = padding(prompt_layout, (prompt_layout.largest[0], 1), runner.device)
    at_once = prompt_layout.at_once(config.max_num_batched_tokens)
    shorter = [padding(prompt_layout, size, runner.device) for size in {*at_once[:1], *at_once[-1:]}]

    def run() -> None:
        if captures_prompts:
            steps.prompts(prompt)  # first: Hopper's kernel for long ones takes the longest of all
            for short in shorter:
                steps.prompts(short)
        _, logits = steps.decode(decodes)
        warm_up_edits(runner.sampler, logits, decodes.rows)
        for inputs in cascades:
            steps.decode_cascade(inputs)
        if captures_prompts:
            steps.prompts(prompts)

    with dependent_launch(config.dependent_launch):
        compile_kernels(run, runner.device)


@torch.inference_mode()
def warm_up_behind(runner: ModelRunner, config: ResolvedConfig, captures_prompts: bool) -> None:
    """Note the kernels of all other kinds of steps, which are steps for which a kernel has a shape of its own, and
    compile them while the engine is at work already."""
    if runs_before_capture(config):
        return
    steps = CapturedSteps(runner, config.max_num_seqs)
    decode_layout, prompt_layout = DecodeLayout(config.max_num_seqs), PromptLayout()
    decodes = [padding(decode_layout, size, runner.device) for size in decode_layout.sizes if size in KINDS_OF_DECODES]
    num_tokens, num_reqs = prompt_layout.largest
    # Few short prompts, more than are captured, and prompts beside few decodes.
    kinds = [((16, 8), 0), ((num_tokens, 4 * num_reqs), 0), ((num_tokens, num_reqs), 8)]
    prompts = [(padding(prompt_layout, size, runner.device), num_decodes) for size, num_decodes in kinds]
    experts = next((module for module in runner.model.modules() if isinstance(module, Experts)), None)

    def run() -> None:
        for inputs in decodes:
            steps.decode(inputs)
        if experts is not None:  # which are put in order by a kernel for each power of two of their rows
            for size in sorted({*decode_layout.sizes, *(prompt_layout.num_tokens if captures_prompts else ())}):
                _mix(experts, size, runner.device)
        if captures_prompts:
            for prompt, num_decodes in prompts:
                steps.prompts(prompt, num_decodes)

    with dependent_launch(config.dependent_launch):
        compile_kernels(run, runner.device, is_behind=True)


def _mix(experts: Experts, num_tokens: int, device: torch.device) -> None:
    """Tokens of any values go through a layer's experts."""
    choice = num_tokens, experts.routing.top_k
    x = torch.empty(num_tokens, experts.spec.hidden_size, dtype=experts.spec.dtype, device=device)
    weights = torch.empty(choice, device=device)
    experts.method.mix(x, weights, torch.zeros(choice, dtype=torch.int32, device=device))
