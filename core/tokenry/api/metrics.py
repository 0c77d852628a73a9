"""Counters, gauges and histograms for Prometheus: `tokenry:` names, and those of vLLM and TGI for
the dashboards that exist.

In: each engine's `Stats`, and what the front has seen of its requests. Out: Prometheus' text. The
aliases are names only: every series is counted once. Own counters and histograms instead of
prometheus_client's, whose locks would cost as much as a token: one thread counts here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    UnknownMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tokenry.api.metric_names import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    LABELLED,
    PREFIX,
    TGI_PREFIX,
    Name,
)
from tokenry.api.request_log import Facts
from tokenry.errors import TokenryError
from tokenry.messages import Stats

TARGETS = ("ttft", "tpot", "deadline")


class Histogram:
    """Counts per bucket; `bounds` are upper bounds, ascending, +Inf left out."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count it."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    @property
    def total(self) -> float:
        """Sum of all values."""
        return self._sum

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self._counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound as text, values at or below it), +Inf last."""
        result, seen = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            seen += count
            result.append((bound, float(seen)))
        return result


class ModelMetrics:
    """What one model's requests were, by its front. Written by the HTTP process alone."""

    def __init__(self, model: str, stats: Callable[[], Stats]) -> None:
        self.model = model
        self.stats = stats
        self.histograms = {name.own: Histogram(name.buckets) for name in HISTOGRAMS}
        self.labelled: dict[str, Counter[str]] = {name.own: Counter() for name in LABELLED}
        self._gap = self.histograms["inter_token_latency_seconds"]

    def token_gap(self, seconds: float, num_tokens: int) -> None:
        """A completion got more tokens, so long after those before."""
        self._gap.observe(seconds / num_tokens, num_tokens)

    def first_token(self, seconds: float) -> None:
        """A request got its first token."""
        self.histograms["time_to_first_token_seconds"].observe(seconds)

    def refused(self, error: TokenryError) -> None:
        """A request was turned away before it began."""
        self.labelled["requests_refused"][error.code or type(error).__name__] += 1

    def ended(self, facts: Facts) -> None:
        """A request has ended, whatever the end was."""
        for reason in facts.reasons:
            self.labelled["request_success"][reason] += 1
        histograms = self.histograms
        histograms["e2e_request_latency_seconds"].observe(facts.total_s)
        histograms["request_prompt_tokens"].observe(facts.num_prompt)
        histograms["request_generation_tokens"].observe(facts.num_answer)
        if facts.max_tokens is not None:
            histograms["request_params_max_tokens"].observe(facts.max_tokens)
        for name, seconds in (
            ("request_queue_time_seconds", facts.queue_s),
            ("request_prefill_time_seconds", facts.prefill_s),
            ("request_decode_time_seconds", facts.decode_s),
            ("request_inference_time_seconds", facts.inference_s),
            ("request_time_per_output_token_seconds", facts.tpot_s),
        ):
            if seconds is not None:
                histograms[name].observe(seconds)
        self._count_targets(facts)

    def _count_targets(self, facts: Facts) -> None:
        """Goodput: requests that had targets, those that met all of them, and what was missed."""
        missed = facts.missed
        if missed is None or "abort" in facts.reasons:
            return
        self.labelled["requests_with_targets"]["within" if not missed else "missed"] += 1
        for target in missed:
            self.labelled["targets_missed"][target] += 1


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._models: dict[str, ModelMetrics] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(self._models.values))

    def of_model(self, model: str, stats: Callable[[], Stats]) -> ModelMetrics:
        """The metrics of a model; a name that comes again counts on."""
        known = self._models.get(model)
        if known is None:
            known = self._models[model] = ModelMetrics(model, stats)
        known.stats = stats
        return known

    def text(self) -> bytes:
        """Prometheus' exposition."""
        return generate_latest(self._registry)


class _Collector(Collector):
    """Reads everything when Prometheus asks; every metric once under each name."""

    def __init__(self, models: Callable[[], Iterable[ModelMetrics]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """All metrics now."""
        models = list(self._models())
        stats = [(m.model, m.stats()) for m in models]
        values: list[tuple[tuple[str, ...], float]]
        for name, read in GAUGES:
            values = [((model,), float(read(s))) for model, s in stats]
            yield from _families(name, GaugeMetricFamily, ("model_name",), values)
        for name, read in COUNTERS:
            values = [((model,), float(read(s))) for model, s in stats]
            yield from _families(name, CounterMetricFamily, ("model_name",), values)
        for name in LABELLED:
            values = [
                ((m.model, label), float(count))
                for m in models
                for label, count in (dict.fromkeys(name.known, 0) | m.labelled[name.own]).items()
            ]
            labels = ("model_name", name.label)
            yield from _families(name, CounterMetricFamily, labels, values)
        for name in HISTOGRAMS:
            yield from _histograms(name, [(m.model, m.histograms[name.own]) for m in models])
        yield from _tgi_totals(models)
        fallbacks = CounterMetricFamily(
            PREFIX + "op_fallbacks", "Ops that run as their reference", labels=["model_name", "op"]
        )
        for model, s in stats:
            for op, count in s.op_fallbacks.items():
                fallbacks.add_metric([model, op], count)
        yield fallbacks


def _families(
    name: Name,
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    labels: tuple[str, ...],
    values: list[tuple[tuple[str, ...], float]],
) -> Iterator[Metric]:
    """The series under each of its names; TGI's counters have no `_total`, so they are untyped."""
    for full in name.names():
        untyped = full.startswith(TGI_PREFIX) and kind is CounterMetricFamily
        family = (UnknownMetricFamily if untyped else kind)(full, name.help, labels=labels)
        for given, value in values:
            family.add_metric(given, value)
        yield family


def _histograms(name: Name, values: list[tuple[str, Histogram]]) -> Iterator[Metric]:
    for full in name.names():
        family = HistogramMetricFamily(full, name.help, labels=["model_name"])
        for model, histogram in values:
            family.add_metric([model], histogram.cumulative(), histogram.total)
        yield family


def _tgi_totals(models: list[ModelMetrics]) -> Iterator[Metric]:
    """TGI counts requests by their outcome in three series without a common label."""
    totals: dict[str, list[tuple[str, int]]] = {"success": [], "failure": [], "count": []}
    for m in models:
        ended = m.labelled["request_success"]
        well = ended["stop"] + ended["length"]
        ill = ended["error"] + m.labelled["requests_refused"].total()
        for what, count in (("success", well), ("failure", ill), ("count", ended.total() + ill)):
            totals[what].append((m.model, count))
    for what, values in totals.items():
        text = f"Requests ({what}), as TGI names them"
        family = UnknownMetricFamily(f"{TGI_PREFIX}request_{what}", text, labels=["model_name"])
        for model, count in values:
            family.add_metric([model], count)
        yield family
