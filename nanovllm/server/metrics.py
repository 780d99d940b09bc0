"""What the server counts, in Prometheus's format under vLLM's names, so that its dashboards work.

Owns the counters of requests, and reads the engine's own when it is asked. Invariant: what happens for every token is
some additions of plain numbers, in the thread of the event loop; Prometheus's own objects are made when it asks.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from time import monotonic

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from nanovllm.engine.request import Request
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind

# vLLM's buckets begin at 1 ms and 10 ms; steps here are shorter.
_GAPS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_FIRST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_WHOLE = (0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_FEW = (1, 2, 5, 10, 20)
_HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From a request to its first token", _FIRST),
    "inter_token_latency_seconds": ("Between two outputs of a request", _GAPS),
    "request_time_per_output_token_seconds": ("Mean time of a request's tokens behind the first", _GAPS),
    "e2e_request_latency_seconds": ("From a request to its end", _WHOLE),
    "request_queue_time_seconds": ("From a request to the step that began it", _FIRST),
    "request_prefill_time_seconds": ("From there to its first token", _FIRST),
    "request_decode_time_seconds": ("From a request's first token to its end", _WHOLE),
    "request_inference_time_seconds": ("From the step that began a request to its end", _WHOLE),
    "request_prompt_tokens": ("Prompt tokens of a request", _TOKENS),
    "request_generation_tokens": ("Output tokens of a request", _TOKENS),
    "request_max_num_generation_tokens": ("Output tokens of a request's longest sequence", _TOKENS),
    "request_params_n": ("Sequences that a request asked for", _FEW),
    "request_params_max_tokens": ("Most output tokens that a request allowed, where it said so", _TOKENS),
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that have begun",
    "prompt_tokens_cached": "Of these, from the prefix cache",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache",
    "generation_tokens": "Output tokens",
}
_ENGINE_COUNTERS = {
    "num_preemptions": ("num_preemptions", "Preemptions: requests that gave their KV blocks back"),
    "num_prompt_tokens_cached": ("prefix_cache_hits", "Prompt tokens that came from the prefix cache"),
}
_SPECULATION = {  # of engines that have it
    "spec_decode_num_drafts": "Drafts: guesses of a request's next tokens that were verified",
    "spec_decode_num_draft_tokens": "Tokens of drafts",
    "spec_decode_num_accepted_tokens": "Tokens of drafts that were right, and all before them",
}
_PER_POSITION = "spec_decode_num_accepted_tokens_per_pos"
_ENGINE_GAUGES = {
    "num_running": ("num_requests_running", "Requests that hold KV blocks"),
    "num_waiting": ("num_requests_waiting", "Requests that wait to be begun"),
}


class Histogram:
    """bounds: the highest value of each bucket but the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        family.add_metric(labels, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)


class Metrics:
    """A collector, as prometheus_client has it."""

    def __init__(self, model_name: str, cache_config: Mapping[str, str]) -> None:
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self.counters: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._cache_config = cache_config
        self._engine: Mapping[str, float] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def begin(self, sequences: Sequence[Request]) -> "RequestTiming":
        """sequences: of one prompt."""
        params = sequences[0].params
        self.histograms["request_params_n"].observe(params.n)
        if params.max_tokens is not None:
            self.histograms["request_params_max_tokens"].observe(params.max_tokens)
        return RequestTiming(self, sequences)

    def render(self, engine: Mapping[str, float]) -> bytes:
        """The text of /metrics. engine: `LLM.get_metrics()`."""
        self._engine = engine
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        names, labels = list(self._labels), list(self._labels.values())
        if not self._engine:  # the registry asks what there is, before anyone asks for it
            return
        for name, (text, _) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"vllm:{name}", text, labels=names)
            self.histograms[name].add_to(histogram, labels)
            yield histogram
        counts: dict[str, tuple[str, float]] = {name: (text, self.counters[name]) for name, text in _COUNTERS.items()}
        counts |= {name: (text, self._engine[ours]) for ours, (name, text) in _ENGINE_COUNTERS.items()}
        counts |= {name: (text, self._engine[name]) for name, text in _SPECULATION.items() if name in self._engine}
        for name, (text, value) in counts.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=names)
            counter.add_metric(labels, value)
            yield counter
        ends = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by how", labels=[*names, "finished_reason"]
        )
        for reason, number in self.ends.items():
            ends.add_metric([*labels, reason], number)
        yield ends
        if "spec_decode_num_drafts" in self._engine:
            yield self._accepted_by_position(names, labels)
        engine = self._engine
        gauges: dict[str, tuple[str, float]] = {
            name: (text, engine[ours]) for ours, (name, text) in _ENGINE_GAUGES.items()
        }
        held = 1 - engine["num_free_blocks"] / engine["num_blocks"]
        gauges["kv_cache_usage_perc"] = "Share of the KV cache that requests hold, 0 to 1", held
        for name, (text, level) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=names)
            gauge.add_metric(labels, level)
            yield gauge
        config = {**self._labels, **self._cache_config, "num_gpu_blocks": str(int(engine["num_blocks"]))}
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache, in its labels", labels=list(config))
        info.add_metric(list(config.values()), 1)
        yield info

    def _accepted_by_position(self, names: list[str], labels: list[str]) -> Metric:
        text = "Tokens of drafts that were accepted, by their position in the draft"
        counter = CounterMetricFamily(f"vllm:{_PER_POSITION}", text, labels=[*names, "position"])
        for name, value in self._engine.items():
            if name.startswith(_PER_POSITION):
                counter.add_metric([*labels, name.rpartition("_")[2]], value)
        return counter


class RequestTiming:
    """Of one request, from its outputs. In a stream they come as tokens do; else the first is the last.

    Times are by `time.monotonic`, whose zero an engine in another process shares.
    """

    def __init__(self, metrics: Metrics, sequences: Sequence[Request]) -> None:
        self._metrics, self._sequences = metrics, sequences
        self._is_stream = sequences[0].params.output_kind is not RequestOutputKind.FINAL_ONLY
        self._gaps = metrics.histograms["inter_token_latency_seconds"]
        self._start = monotonic()
        self._first = self._last = 0.0
        self._num_tokens = 0
        self._reasons: list[str] = []

    def count(self, output: RequestOutput) -> None:
        now = monotonic()
        if self._last:
            self._gaps.observe(now - self._last)
        else:
            self._first = now
            self._count_prompt(output)
            if self._is_stream:
                self._metrics.histograms["time_to_first_token_seconds"].observe(now - self._start)
        self._last = now
        num_tokens = 0
        for completion in output.outputs:
            num_tokens += len(completion.token_ids)
            if completion.finish_reason is not None:
                self._reasons.append(completion.finish_reason)
        self._num_tokens += num_tokens
        self._metrics.counters["generation_tokens"] += num_tokens

    def count_more(self, num_tokens: int) -> None:
        """Of an output in the middle of a stream."""
        now = monotonic()
        self._gaps.observe(now - self._last)
        self._last = now
        self._num_tokens += num_tokens
        self._metrics.counters["generation_tokens"] += num_tokens

    def _count_prompt(self, output: RequestOutput) -> None:
        counters, num_tokens = self._metrics.counters, len(output.prompt_token_ids)
        self._metrics.histograms["request_prompt_tokens"].observe(num_tokens)
        counters["prompt_tokens"] += num_tokens
        counters["prefix_cache_queries"] += num_tokens
        counters["prompt_tokens_cached"] += output.num_cached_tokens

    def end(self) -> None:
        histograms = self._metrics.histograms
        for reason in self._reasons or ["abort"]:
            self._metrics.ends[reason] += 1
        histograms["e2e_request_latency_seconds"].observe(monotonic() - self._start)
        histograms["request_generation_tokens"].observe(self._num_tokens)
        longest = max(len(one.token_ids) - one.num_prompt_tokens for one in self._sequences)
        histograms["request_max_num_generation_tokens"].observe(longest)
        begun_at = self._sequences[0].begun_at
        if begun_at is not None and self._last:
            histograms["request_queue_time_seconds"].observe(max(0.0, begun_at - self._start))
            histograms["request_inference_time_seconds"].observe(self._last - begun_at)
            if self._is_stream:
                histograms["request_prefill_time_seconds"].observe(self._first - begun_at)
        if self._is_stream and self._num_tokens > 1:
            histograms["request_decode_time_seconds"].observe(self._last - self._first)
            mean = (self._last - self._first) / (self._num_tokens - 1)
            histograms["request_time_per_output_token_seconds"].observe(mean)
