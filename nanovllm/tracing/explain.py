"""What happened to one request, in words, from a trace's file.

Owns the sentences; the events are `recorder.py`'s. Invariant: every number in a sentence is one of the trace's.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanovllm.tracing.recorder import QUEUE
from nanovllm.tracing.trace_file import read_events

_FOR = {  # what a request waited for at the head of the queue -> what would have helped
    "a row": "one of max_num_seqs places",
    "blocks": "free KV blocks (a larger KV cache or shorter contexts have more)",
    "budget": "room in a step (max_num_batched_tokens)",
    "an adapter": "one of max_loras places for its adapter",
    "its prefix": "files of prefix_store, which were still being checked",
    "its last token": "its newest token, which was still on the device",
}


def explain(paths: Iterable[Path], request_id: str) -> str:
    """Raises ValueError if no event in these files is of that request."""
    for path in paths:
        events = [event for event in read_events(path, json.dumps(request_id)[1:-1]) if _is_of(event, request_id)]
        if events:
            return _tell(events, request_id)
    raise ValueError(
        f"the trace has nothing of a request {request_id!r}: it tells of each part of a request's life when that has "
        "ended"
    )


def _is_of(event: Mapping[str, Any], request_id: str) -> bool:
    """A sequence of several is id[index]; a data-parallel engine puts a number and a colon before ids."""
    name = event.get("args", {}).get("request", "")
    return any(one in (name, name.rpartition("[")[0]) for one in (request_id, f"{name.partition(':')[0]}:{request_id}"))


def _tell(events: list[dict[str, Any]], request_id: str) -> str:
    names = sorted({event["args"]["request"] for event in events}, key=lambda name: (len(name), name))
    parts = []
    for name in names:
        own = sorted((event for event in events if event["args"]["request"] == name), key=lambda event: event["ts"])
        lines = [line for event in own if (line := _line(event)) is not None]
        parts.append("\n".join([f"Request {name}:", *lines]))
    return "\n".join(parts)


def _line(event: Mapping[str, Any]) -> str | None:
    args, name = event["args"], event["name"]
    at = f"  {event['ts'] / 1e6:9.3f} s  "
    lasting = f" ({event.get('dur', 0) / 1e3:.1f} ms)"
    if event["ph"] == "X" and event["pid"] == 1:
        assert event["tid"] == QUEUE
        return f"{at}stood at the head of the queue{lasting}: for {_FOR.get(name, name)}"
    if name == "waiting":
        return at + _wait(args)
    if name in ("prefill", "recompute"):
        again = " once more, after it had lost its place" if name == "recompute" else ""
        tokens = f"{args['tokens']} tokens from number {args['from']} on"
        return f"{at}{tokens} were computed{again} in step {args['step']}{lasting}"
    if name == "verify":
        return f"{at}{args['tokens'] - 1} drafted tokens were verified in step {args['step']}{lasting}"
    if name == "decode":
        return f"{at}got a token in each of steps {args['first']} to {args['last']}: {args['tokens']}{lasting}"
    if name == "preempted":
        return f"{at}was preempted for want of {args['for']}: {args['lost']} computed tokens were given up"
    if name == "finished":
        return (
            f"{at}ended ({args['reason']}): {args['prompt']} tokens of prompt, {args['cached']} of them cached, and "
            f"{args['output']} of output; preempted {args['preemptions']} times"
        )
    return at + name


def _wait(args: Mapping[str, Any]) -> str:
    text = f"came into the queue, and stayed for {args['plans']} plans"
    if args["behind"] is not None:
        text += f", at first behind request {args['behind']}"
    reasons = [f"{count} for {_FOR.get(why, why)}" for why, count in args["at head"].items()]
    if reasons:
        text += f"; at its head {', '.join(reasons)}"
    if "row" not in args:
        return f"{text}; then it left ({args['left']})"
    return f"{text}; then it entered row {args['row']} with {args['cached']} of {args['tokens']} tokens cached"
