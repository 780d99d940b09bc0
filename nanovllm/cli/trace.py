"""`nanovllm trace`: what a trace holds, as a page for a browser, or of one request in words.

Owns the command; the rest is `nanovllm/tracing/`. Invariant: it reads the trace and changes nothing in it.
"""

from argparse import Namespace
from collections import Counter
from pathlib import Path

from nanovllm.tracing.explain import explain
from nanovllm.tracing.page import write_page
from nanovllm.tracing.recorder import DEVICE, ENGINE, QUEUE
from nanovllm.tracing.trace_file import read_events


def run(args: Namespace) -> int:
    trace = Path(args.trace)
    if args.explain is not None:
        print(explain([trace], args.explain))
    elif args.html is None:
        print(_summary(trace))
    if args.html is not None:
        for _ in read_events(trace):  # else the page would be of anything
            break
        write_page(trace, Path(args.html))
    return 0


def _summary(trace: Path) -> str:
    """Steps, tokens, where time went, and what was waited for."""
    counts: Counter[str] = Counter()
    waited: Counter[str] = Counter()
    end = 0
    for event in read_events(trace):
        end = max(end, event.get("ts", 0) + event.get("dur", 0))
        place = event["ph"], event["pid"], event.get("tid")
        if place == ("X", ENGINE, DEVICE):
            counts["steps"] += 1
            counts["busy"] += event["dur"]
            counts["tokens"] += event["args"]["tokens"]
            counts["prompt tokens"] += event["args"]["prompt_tokens"]
        elif place == ("X", ENGINE, QUEUE):
            waited[event["name"]] += event["dur"]
        elif event["ph"] == "i":
            counts[event["name"]] += 1
    lines = [
        f"{counts['finished']:,} requests in {end / 1e6:.2f} s, of which the device was busy "
        f"{100 * counts['busy'] / max(end, 1):.1f} %",
        f"{counts['steps']:,} steps, {counts['tokens']:,} tokens ({counts['prompt tokens']:,} of prompts), "
        f"{counts['preempted']:,} preemptions",
    ]
    lines += [f"the head of the queue waited {time / 1e6:.2f} s for {why}" for why, time in waited.most_common()]
    return "\n".join(lines)
