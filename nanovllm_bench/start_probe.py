"""One start, timed from within a fresh process: run as a module, prints a JSON line of seconds.

Owns the order: import, LLM(...), a first token, a second one; and the watch on the compilers of this process, Triton's
(reading its cache counts too) and the one of the C++ kernels. Worker processes and torch.compile are not watched.
Invariant: nothing heavy is imported before the clock.

    python -m nanovllm_bench.start_probe SPAWNED_AT MODEL OPTIONS      time.time() of the parent; engine options as JSON
    python -m nanovllm_bench.start_probe SPAWNED_AT MODEL OPTIONS first-use     all kinds of steps instead of two tokens
"""

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from time import time
from typing import Any


def main() -> None:
    spawned, model, options = float(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    times = [spawned, time()]
    nanovllm = import_module("nanovllm")
    engine = nanovllm.LLM  # loads torch and all else that is needed
    compiling, compiled = _watch_compilers(options.get("device", "auto"))
    times.append(time())
    llm = engine(model, **options)
    times.append(time())
    construct_compile = sum(compiling)
    if sys.argv[4:] == ["first-use"]:
        rows = import_module("nanovllm_bench.first_use").measure(llm, compiled)
        print(json.dumps({"construct_seconds": times[3] - times[2], "steps": rows}))
        return
    length = min(128, llm.config.max_model_len // 2)
    params = nanovllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate([[1] * length], params, use_tqdm=False)
    times.append(time())
    compile_in_all = sum(compiling)
    llm.generate([[2] * length], params, use_tqdm=False)
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
        "construct_compile_seconds": construct_compile,
        "first_token_seconds": first,
        "second_token_seconds": second,
        "total_seconds": times[-2] - spawned,
        "compile_seconds": compile_in_all,
    }
    print(json.dumps(record))


def _watch_compilers(device: str) -> tuple[list[float], list[str]]:
    """Seconds and name of each compilation in this process from now on; the lists grow.

    device: as in `EngineConfig`.
    """
    seconds: list[float] = []
    names: list[str] = []
    cpu_kernels: Any = import_module("nanovllm.kernels.cpu.cpu_kernels")
    build = cpu_kernels.build

    def timed_build(*arguments: Any) -> None:
        start = time()
        build(*arguments)
        seconds.append(time() - start)
        names.append("C++ kernels")

    cpu_kernels.build = timed_build
    # An engine on a CPU never imports Triton.
    if device != "cpu" and import_module("torch").cuda.is_available() and find_spec("triton"):
        knobs: Any = import_module("triton.knobs")

        def note(*, src: Any, times: Any, **_: Any) -> None:
            seconds.append(times.total / 1e6)
            names.append(src.name)

        knobs.compilation.listener = note
    return seconds, names


if __name__ == "__main__":
    main()
