"""Runs workloads with nano-vllm, whose module is called `nanovllm` too: started by path, with a Python that has it.

Owns one loop: a job as a JSON line in, its seconds and token counts as a JSON line out. Invariant: imports nothing of
this project; the `nanovllm` that it imports is nano-vllm.
"""

import json
import sys
from importlib import import_module
from importlib.metadata import version
from time import perf_counter


def main() -> None:
    engine = import_module("nanovllm")
    llm = engine.LLM(sys.argv[1], **json.loads(sys.argv[2]))
    print(json.dumps({"version": version("nano-vllm")}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        params = [
            engine.SamplingParams(temperature=job["temperature"], max_tokens=count, ignore_eos=True)
            for count in job["max_tokens"]
        ]
        start = perf_counter()
        outputs = llm.generate(job["prompts"], params, use_tqdm=False)
        seconds = perf_counter() - start
        counts = [len(output["token_ids"]) for output in outputs]
        print(json.dumps({"seconds": seconds, "counts": counts}), flush=True)


if __name__ == "__main__":
    main()
