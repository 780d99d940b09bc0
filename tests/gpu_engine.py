"""Engines of tiny models as the tests on a GPU make them, with `device="cpu"` for the reference."""

from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def make_llm(folder: Path, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256, "max_num_seqs": 16}
    return LLM(str(folder), **{**defaults, "num_gpu_blocks_override": 200, **options})


def tokens(llm: LLM, prompts: list[list[int]], params: Any = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
