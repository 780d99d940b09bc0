"""One start, timed from within a fresh process: run as a module, prints a JSON line of seconds.

Owns the order: import, LLM(...), a first token, a second one. Invariant: nothing heavy is imported before the clock.

    python -m nanovllm.bench.start_probe SPAWNED_AT MODEL OPTIONS      time.time() of the parent; engine options as JSON
"""

import json
import sys
from importlib import import_module
from time import time


def main() -> None:
    spawned, model, options = float(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    times = [spawned, time()]
    nanovllm = import_module("nanovllm")
    engine = nanovllm.LLM  # loads torch and all else that is needed
    times.append(time())
    llm = engine(model, **options)
    times.append(time())
    length = min(128, llm.config.max_model_len // 2)
    params = nanovllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    for token in (1, 2):
        llm.generate([[token] * length], params, use_tqdm=False)
        times.append(time())
    python, imports, construct, first, second = (end - start for start, end in zip(times, times[1:], strict=False))
    metrics = llm.get_metrics()
    parts = {name.removeprefix("start_"): metrics[name] for name in metrics if name.startswith("start_")}
    record = {
        "python_seconds": python,
        "import_seconds": imports,
        **parts,
        "other_seconds": construct - sum(parts.values()),
        "construct_seconds": construct,
        "first_token_seconds": first,
        "second_token_seconds": second,
        "total_seconds": times[-2] - spawned,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
