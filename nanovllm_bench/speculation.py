"""`nanovllm bench speculation`: tokens a step and time with drafts, beside none, on texts with and without copies.

Owns the tasks and the sweep over methods and lengths of drafts. Invariant: every engine answers the same requests
greedily, and whether it gave the tokens of the plain one is in its row; figures are the fastest of the runs, each after
one that is not counted, since what is measured is one request at a time on a machine that others use.
"""

from argparse import Namespace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from nanovllm.cli.options import engine_options
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.speculative_config import NAMED_METHODS
from nanovllm_bench.report import print_record, print_table

_TEXT = Path(__file__).with_name("quality.txt")
_CODE = '''\
def mean(values):
    """The arithmetic mean of a list of numbers."""
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def spread(values):
    """The mean distance of the values from their mean."""
    middle = mean(values)
    total = 0.0
    for value in values:
        total += abs(value - middle)
    return total / len(values)
'''
_COLUMNS = {
    "task": "task",
    "method": "method",
    "k": "num_speculative_tokens",
    "tokens a step": "tokens_per_step",
    "accepted": "acceptance",
    "ms a token": "token_ms",
    "times as fast": "speedup",
    "same tokens": "same",
}


def tasks() -> dict[str, str]:
    """What is asked, by name; the first three are answered with much of what was given."""
    text = _TEXT.read_text(encoding="utf-8")[:600]
    return {
        "copy": f"Repeat the following text word for word, and nothing else:\n\n{text}",
        "edit": f"Rename the function mean to average in this code. Print the whole code:\n\n```python\n{_CODE}```",
        "summary": f"Summarize this text in three sentences, with quotes from it:\n\n{text}",
        "chat": "What should I cook tonight with rice, eggs and tomatoes?",
        "code": "Write a Python function that finds the longest word of a text.",
    }


class Answer(NamedTuple):
    """seconds: of all tokens but the first."""

    token_ids: list[int]
    seconds: float
    counters: dict[str, float]


def run(args: Namespace) -> int:
    for name, value, low in (("--max-tokens", args.max_tokens, 2), ("--num-speculative-tokens", min(args.lengths), 1)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    asked = {name: task for name, task in tasks().items() if name in args.tasks}
    options = engine_options(args)
    plain = answer_all(args, options, asked)
    rows: list[dict[str, Any]] = [_row(name, "none", 0, answer, answer) for name, answer in plain.items()]
    for method, length in product(args.methods, args.lengths):
        config: dict[str, Any] = {"method": method, "num_speculative_tokens": length}
        if method in NAMED_METHODS:
            config["model"] = args.draft_model
        answers = answer_all(args, {**options, "speculative_config": config}, asked)
        rows += [_row(name, method, length, answer, plain[name]) for name, answer in answers.items()]
    rows.sort(key=lambda row: list(asked).index(row["task"]))  # stable
    print_table(rows, _COLUMNS)
    print_record(args, {"options": options, "max_tokens": args.max_tokens, "results": rows})
    return 0


def answer_all(args: Namespace, options: dict[str, Any], asked: dict[str, str]) -> dict[str, Answer]:
    """The answer to each task by one engine, one at a time."""
    with LLM(args.model, **options) as llm:
        return {name: _answer(llm, task, args.max_tokens, args.repeats) for name, task in asked.items()}


def _answer(llm: LLM, task: str, max_tokens: int, repeats: int) -> Answer:
    """The prompt is found in the prefix cache from the second time on."""
    messages = [{"role": "user", "content": task}]
    best: Answer | None = None
    for number in range(1 + repeats):
        seconds = []
        before = llm.get_metrics()
        for length in (1, max_tokens):
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            start = perf_counter()
            (output,) = llm.chat(messages, params, use_tqdm=False)
            seconds.append(perf_counter() - start)
        after = llm.get_metrics()
        counters = {name: after[name] - before[name] for name in after if name.startswith("spec_decode")}
        answer = Answer(output.outputs[0].token_ids, seconds[1] - seconds[0], counters)
        if number and (best is None or answer.seconds < best.seconds):
            best = answer
    assert best is not None
    return best


def _row(task: str, method: str, length: int, answer: Answer, plain: Answer) -> dict[str, Any]:
    num_tokens = len(answer.token_ids) - 1
    drafted, accepted = (answer.counters.get(f"spec_decode_num_{name}_tokens", 0) for name in ("draft", "accepted"))
    return {
        "task": task,
        "method": method,
        "num_speculative_tokens": length,
        "tokens_per_step": num_tokens / (num_tokens - accepted),
        "acceptance": accepted / drafted if drafted else None,
        "token_ms": 1e3 * answer.seconds / num_tokens,
        "speedup": plain.seconds / answer.seconds,
        "same": "yes" if answer.token_ids == plain.token_ids else "no",
        "seconds": answer.seconds,
        "counters": answer.counters,
    }
