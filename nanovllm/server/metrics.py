"""What the server counts, in Prometheus's format under vLLM's names, so that its dashboards work.

Owns the counters of requests, and reads the engine's own when it is asked. Invariant: a series that nobody asks for
costs nothing; of a token only its time is taken.
"""

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

# vLLM's buckets begin at 1 ms and 10 ms; steps here are shorter.
_GAPS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_FIRST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_WHOLE = (0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_ENGINE_COUNTERS = {
    "num_preemptions": ("num_preemptions", "Preemptions: requests that gave their KV blocks back"),
    "num_prompt_tokens_cached": ("prefix_cache_hits", "Prompt tokens that came from the prefix cache"),
}


class Metrics:
    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._labels = {"model_name": model_name, "engine": "0"}
        names = tuple(self._labels)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", text, (*names, *labels), registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, names, buckets=buckets, registry=self._registry)
            return made.labels(**self._labels)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, names, registry=self._registry).labels(**self._labels)

        self.prompt_tokens, self.cached_tokens, self.prefix_queries, self.generation_tokens = (
            counter(name, text).labels(**self._labels)
            for name, text in (
                ("prompt_tokens", "Prompt tokens of requests that have begun"),
                ("prompt_tokens_cached", "Of these, from the prefix cache"),
                ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
                ("generation_tokens", "Output tokens"),
            )
        )
        self._success = counter("request_success", "Requests that ended, by how", "finished_reason")
        self.time_to_first_token = histogram("time_to_first_token_seconds", "From a request to its first token", _FIRST)
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between two outputs of a request", _GAPS)
        self.latency = histogram("e2e_request_latency_seconds", "From a request to its end", _WHOLE)
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self.request_generation_tokens = histogram("request_generation_tokens", "Output tokens of a request", _TOKENS)
        self.request_n = histogram("request_params_n", "Sequences that a request asked for", (1, 2, 5, 10, 20))
        self.running = gauge("num_requests_running", "Requests that hold KV blocks")
        self.waiting = gauge("num_requests_waiting", "Requests that wait to be begun")
        self.cache_usage = gauge("kv_cache_usage_perc", "Share of the KV cache that requests hold, 0 to 1")
        self._engine = {name: counter(*described) for name, described in _ENGINE_COUNTERS.items()}
        self._seen = dict.fromkeys(self._engine, 0.0)

    def begin(self, params: SamplingParams) -> "RequestTiming":
        self.request_n.observe(params.n)
        return RequestTiming(self)

    def count_end(self, reason: str) -> None:
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def render(self, engine: Mapping[str, float]) -> bytes:
        """The text of /metrics. engine: `LLM.get_metrics()`."""
        for name, made in self._engine.items():
            made.labels(**self._labels).inc(max(0.0, engine[name] - self._seen[name]))
            self._seen[name] = engine[name]
        self.running.set(engine["num_running"])
        self.waiting.set(engine["num_waiting"])
        self.cache_usage.set(1 - engine["num_free_blocks"] / engine["num_blocks"])
        return generate_latest(self._registry)


class RequestTiming:
    """Of one request, from its outputs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = self._last = time.perf_counter()
        self._num_tokens = 0
        self._is_begun = False
        self._reasons: list[str] = []

    def count(self, output: RequestOutput) -> None:
        now, metrics = time.perf_counter(), self._metrics
        num_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        if not self._is_begun:
            self._is_begun = True
            metrics.time_to_first_token.observe(now - self._begin)
            metrics.prompt_tokens.inc(len(output.prompt_token_ids))
            metrics.prefix_queries.inc(len(output.prompt_token_ids))
            metrics.cached_tokens.inc(output.num_cached_tokens)
            metrics.request_prompt_tokens.observe(len(output.prompt_token_ids))
        else:
            metrics.inter_token_latency.observe(now - self._last)
        self._last = now
        self._num_tokens += num_tokens
        metrics.generation_tokens.inc(num_tokens)
        self._reasons += [done.finish_reason for done in output.outputs if done.finish_reason is not None]

    def end(self) -> None:
        for reason in self._reasons or ["abort"]:
            self._metrics.count_end(reason)
        self._metrics.latency.observe(time.perf_counter() - self._begin)
        self._metrics.request_generation_tokens.observe(self._num_tokens)
