"""`nanovllm top`: what a server does now, from its /metrics.

Owns reading and showing; the names are vLLM's, so vLLM's servers are shown too. Invariant: rates are between two looks,
and a server that was restarted in between shows none below zero.
"""

import re
import time
from argparse import Namespace
from collections import defaultdict
from urllib.error import URLError
from urllib.request import Request, urlopen

_SAMPLE = re.compile(r"^vllm:([\w]+)(?:\{(.*)\})? (\S+)$")
_TIMEOUT_SECONDS = 10
_HEAD = " running waiting  KV held  out tok/s   in tok/s  cached     first       gap"


def run(args: Namespace) -> int:
    if args.interval <= 0:
        raise ValueError(f"--interval must be more than 0, got {args.interval}")
    url = args.url if "//" in args.url else f"http://{args.url}"
    url = url.rstrip("/").removesuffix("/v1") + "/metrics"
    before, start = _read(url, args.api_key), time.monotonic()
    number = 0
    while args.count is None or number < args.count:
        time.sleep(args.interval)
        after, now = _read(url, args.api_key), time.monotonic()
        if number % 20 == 0:
            print(_HEAD)
        print(_line(before, after, now - start), flush=True)
        before, start, number = after, now, number + 1
    return 0


def _read(url: str, api_key: str | None) -> dict[str, float]:
    """Samples without their labels, added up; buckets are left out."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=_TIMEOUT_SECONDS) as answer:
            text = answer.read().decode()
    except URLError as error:
        raise ConnectionError(f"no metrics from {url}: {error}") from error
    values: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found is not None and not found[1].endswith("_bucket"):
            values[found[1]] += float(found[3])
    return values


def _line(before: dict[str, float], after: dict[str, float], seconds: float) -> str:
    def grown(name: str) -> float:
        return max(0.0, after[name] - before[name])

    def mean_ms(name: str) -> str:
        count = grown(f"{name}_count")
        return f"{1000 * grown(f'{name}_sum') / count:.1f} ms" if count else "-"

    prompt_tokens = grown("prompt_tokens_total")
    cached = f"{100 * grown('prompt_tokens_cached_total') / prompt_tokens:.0f} %" if prompt_tokens else "-"
    return (
        f"{after['num_requests_running']:8.0f}{after['num_requests_waiting']:8.0f}"
        f"{100 * after['kv_cache_usage_perc']:7.1f} %{grown('generation_tokens_total') / seconds:11,.0f}"
        f"{prompt_tokens / seconds:11,.0f}{cached:>8}{mean_ms('time_to_first_token_seconds'):>10}"
        f"{mean_ms('inter_token_latency_seconds'):>10}"
    )
