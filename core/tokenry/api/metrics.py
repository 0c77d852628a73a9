"""Counters and gauges for Prometheus: `tokenry:` names, and vLLM's for the dashboards that exist.

In: the engine's `Stats`, and what the front has seen of latencies. Out: Prometheus' text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tokenry.messages import Stats

PREFIX, ALIAS = "tokenry:", "vllm:"
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
_Reading = dict[str, tuple[str, Callable[[Stats], float]]]
_GAUGES: _Reading = {
    "num_requests_running": ("Requests in the running batch", lambda s: s.num_running),
    "num_requests_waiting": ("Requests that wait", lambda s: s.num_waiting),
    "kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1", lambda s: s.kv_usage),
}
_COUNTERS: _Reading = {
    "num_preemptions": ("Preemptions", lambda s: s.num_preemptions),
    "prefix_cache_queries": ("Prompt tokens looked up", lambda s: s.prefix_cache_queries),
    "prefix_cache_hits": ("Prompt tokens found", lambda s: s.prefix_cache_hits),
    "prompt_tokens": ("Prompt tokens computed", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated", lambda s: s.generation_tokens),
}
_OWN_COUNTERS: _Reading = {
    "steps": ("Steps of the engine", lambda s: s.steps),
    "step_failures": ("Steps that failed", lambda s: s.step_failures),
    "uncompiled_launches": ("Launches without a program", lambda s: s.uncompiled_launches),
    "requests_aborted": ("Requests that were aborted", lambda s: s.num_requests_aborted),
}


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, stats: Callable[[], Stats], model: str) -> None:
        self._registry = CollectorRegistry()
        self._own: list[Histogram | Counter] = []
        self._model = model
        self._ttft = self._histogram("time_to_first_token_seconds", "Until the first token")
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens")
        self._whole = self._histogram("e2e_request_latency_seconds", "A whole request")
        self._success = Counter(
            PREFIX + "request_success",
            "Finished completions",
            ["model_name", "finished_reason"],
            registry=None,
        )
        self._rejected = Counter(
            PREFIX + "admission_rejections",
            "Requests refused for want of room",
            ["model_name"],
            registry=None,
        )
        self._own += [self._success, self._rejected]
        self._registry.register(_Collector(stats, self._own, model))

    def first_token(self, seconds: float) -> None:
        """A request got its first token."""
        self._ttft.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A request got another token."""
        self._gap.observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        """A completion ended."""
        self._success.labels(self._model, reason).inc()
        self._whole.observe(seconds)

    def rejected(self) -> None:
        """A request was refused for want of room."""
        self._rejected.labels(self._model).inc()

    def text(self) -> bytes:
        """Prometheus' exposition."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        """Labelled at once, so that it is told before anything was observed."""
        histogram = Histogram(PREFIX + name, help, ["model_name"], buckets=_SECONDS, registry=None)
        self._own.append(histogram)
        return histogram.labels(self._model)


class _Collector(Collector):
    """Reads the engine's last stats when Prometheus asks; every metric once under each name."""

    def __init__(
        self, stats: Callable[[], Stats], own: list[Histogram | Counter], model: str
    ) -> None:
        self._stats = stats
        self._own = own
        self._model = model

    def collect(self) -> Iterator[Metric]:
        """All metrics now."""
        stats = self._stats()
        for prefix in (PREFIX, ALIAS):
            for name, (text, read) in _GAUGES.items():
                gauge = GaugeMetricFamily(prefix + name, text, labels=["model_name"])
                gauge.add_metric([self._model], read(stats))
                yield gauge
            counters = _COUNTERS if prefix == ALIAS else {**_COUNTERS, **_OWN_COUNTERS}
            for name, (text, read) in counters.items():
                counter = CounterMetricFamily(prefix + name, text, labels=["model_name"])
                counter.add_metric([self._model], read(stats))
                yield counter
        fallbacks = CounterMetricFamily(
            PREFIX + "op_fallbacks", "Ops that run as their reference", labels=["op"]
        )
        for op, count in stats.op_fallbacks.items():
            fallbacks.add_metric([op], count)
        yield fallbacks
        for metric in (m for own in self._own for m in own.collect()):
            yield metric
            yield _alias(metric)


def _alias(metric: Metric) -> Metric:
    renamed = copy.copy(metric)
    renamed.name = ALIAS + metric.name.removeprefix(PREFIX)
    renamed.samples = [s._replace(name=ALIAS + s.name.removeprefix(PREFIX)) for s in metric.samples]
    return renamed
