"""torchrun starts the ranks, and each runs the same script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from tests.executor.rank_process import OPTIONS
from tests.tiny_models import random_prompts, save_random

SCRIPT = """
import json, os, sys
from nanovllm import LLM, SamplingParams
folder, prompts, options, results = (json.loads(argument) for argument in sys.argv[1:])
with LLM(folder, **options, tensor_parallel_size=2, distributed_executor_backend="external_launcher") as llm:
    outputs = llm.generate(prompts, SamplingParams(seed=5, max_tokens=8), use_tqdm=False)
with open(f"{results}/{os.environ['RANK']}.json", "w") as file:
    json.dump([output.outputs[0].token_ids for output in outputs], file)
"""


@pytest.mark.slow
def test_torchrun_gives_every_rank_the_tokens_of_one(tmp_path: Path) -> None:
    folder, prompts = save_random(tmp_path / "model"), random_prompts([3, 20])
    with LLM(str(folder), **OPTIONS) as llm:
        outputs = llm.generate(prompts, SamplingParams(seed=5, max_tokens=8), use_tqdm=False)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [json.dumps(argument) for argument in (str(folder), prompts, OPTIONS, str(tmp_path))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run(launch, check=True, timeout=120, env=environment)
    for rank in range(2):
        tokens = json.loads((tmp_path / f"{rank}.json").read_text())
        assert tokens == [output.outputs[0].token_ids for output in outputs]
