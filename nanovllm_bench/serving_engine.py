"""The engine alone under the load that a server is measured with: run as a module, prints a JSON line.

Owns what stands beside the server's figures: the rate of `LLM.generate`, and from `LLM.step` the first tokens and gaps
of requests that arrive when they are due. Invariant: a process of its own, gone before the server starts.

    python -m nanovllm_bench.serving_engine PLAN      PLAN: the fields of `Plan` as JSON
"""

import json
import sys
from dataclasses import asdict, dataclass
from time import perf_counter, sleep
from typing import Any

from nanovllm.llm import LLM
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm_bench.http_load import Reply
from nanovllm_bench.workload import Workload, uniform


@dataclass(frozen=True)
class Plan:
    """offsets: seconds from the start to each request's arrival. num_alone: requests that are sent one by one."""

    model: str
    options: dict[str, Any]
    input_len: int
    output_len: int
    is_mixed: bool
    offsets: list[float]
    num_alone: int
    repeats: int

    def workload(self) -> Workload:
        return uniform(len(self.offsets), self.input_len, self.output_len, mixed=self.is_mixed)

    def alone(self) -> Workload:
        return uniform(self.num_alone, self.input_len, 2)


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    llm = LLM(plan.model, **plan.options)
    vocab_size, workload = llm.model_config.vocab_size, plan.workload()
    runs, seconds = [], []
    for number in range(plan.repeats + 1):  # the first warms up
        variant = workload.variant(number, vocab_size)
        llm.reset_prefix_cache()
        seconds.append(_generate(llm, variant))
        llm.reset_prefix_cache()
        runs.append(_arriving(llm, variant, plan.offsets))
    alone = [_arriving(llm, one, [0.0])[0] for one in _one_by_one(plan.alone(), vocab_size)]
    record = {
        "vocab_size": vocab_size,
        "max_model_len": llm.config.max_model_len,
        "generate_seconds": seconds[1:],
        "runs": [[asdict(reply) for reply in run] for run in runs[1:]],
        "alone": [asdict(reply) for reply in alone],
    }
    llm.close()
    print(json.dumps(record))


def _one_by_one(workload: Workload, vocab_size: int) -> list[Workload]:
    return [
        Workload(workload.name, [prompt], [count]).variant(0, vocab_size)
        for prompt, count in zip(workload.prompts, workload.max_tokens, strict=True)
    ]


def _params(workload: Workload, kind: RequestOutputKind) -> list[SamplingParams]:
    """Without text the clock would not see the engine's own share of a stream."""
    return [
        SamplingParams(temperature=workload.temperature, max_tokens=count, ignore_eos=True, output_kind=kind)
        for count in workload.max_tokens
    ]


def _generate(llm: LLM, workload: Workload) -> float:
    params = _params(workload, RequestOutputKind.FINAL_ONLY)
    start = perf_counter()
    llm.generate(workload.prompts, params, use_tqdm=False)
    return perf_counter() - start


def _arriving(llm: LLM, workload: Workload, offsets: list[float]) -> list[Reply]:
    params = _params(workload, RequestOutputKind.DELTA)
    left = list(zip(offsets, workload.prompts, params, strict=True))[::-1]
    due: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    start = perf_counter()
    while left or llm.has_unfinished_requests():
        while left and start + left[-1][0] <= perf_counter():
            offset, prompt, one = left.pop()
            name = llm.add_request(prompt, one)
            due[name], times[name] = start + offset, []
        if not llm.has_unfinished_requests():
            sleep(max(0.0, start + left[-1][0] - perf_counter()))
            continue
        outputs = llm.step()
        now = perf_counter()
        for output in outputs:
            times[output.request_id].append(now - due[output.request_id])
    counts = zip(times.values(), workload.max_tokens, workload.prompts, strict=True)
    return [Reply(own, own[-1], count, len(prompt)) for own, count, prompt in counts]


if __name__ == "__main__":
    main()
