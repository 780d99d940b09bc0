"""Runs workloads with an earlier build of this project: started by path, with that build first on the path.

Owns the loop: a model and its options as a JSON line in, then workloads in, and of each its seconds and token counts as
a JSON line out. Invariant: imports nothing of this checkout, and asks that build for no more than `LLM`,
`SamplingParams` and `StructuredOutputsParams`.
"""

import json
import sys
from collections import Counter
from importlib import import_module
from time import perf_counter
from typing import Any


def main() -> None:
    build = import_module("nanovllm")
    make = build.LLM  # imports what an engine needs
    options = json.loads(sys.stdin.readline() or "null")
    if options is None:  # it is not needed after all
        return
    llm = make(**options)
    print(json.dumps({"version": build.__version__}), flush=True)
    for line in sys.stdin:
        seconds, counts = run_job(build, llm, json.loads(line))
        print(json.dumps({"seconds": seconds, "counts": counts}), flush=True)
    llm.close()


def run_job(build: Any, llm: Any, job: dict[str, Any]) -> tuple[float, list[int]]:
    """As `engines.NanoVLLM.run`. job: the fields of a Workload."""
    asks = dict(job["asks"])
    if "structured_outputs" in asks:
        given = {name: value for name, value in asks["structured_outputs"].items() if value}
        asks["structured_outputs"] = build.StructuredOutputsParams(**given)
    if "logit_bias" in asks:
        asks["logit_bias"] = {int(token): bias for token, bias in asks["logit_bias"].items()}  # JSON's keys are text
    common = {"n": job["n"], "temperature": job["temperature"], "ignore_eos": True, "detokenize": False, **asks}
    params = [build.SamplingParams(max_tokens=count, **common) for count in job["max_tokens"]]
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    llm.reset_prefix_cache()
    if job["prefix"]:
        one = build.SamplingParams(max_tokens=1, detokenize=False)
        llm.generate([{"prompt_token_ids": job["prefix"]}], one, use_tqdm=False)
    start = perf_counter()
    if job["streams"]:
        lens: Counter[tuple[int, int]] = Counter()
        for output in llm.stream(prompts, params):
            for one in output.outputs:
                lens[int(output.request_id), one.index] += len(one.token_ids)
        counts = [lens[key] for key in sorted(lens)]
    else:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        counts = [len(one.token_ids) for output in outputs for one in output.outputs]
    return perf_counter() - start, counts


if __name__ == "__main__":
    main()
