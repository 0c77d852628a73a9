"""A span per request for an OpenTelemetry collector: queue, prefill and decode inside it.

In: the `Facts` of a request at its end. Out: spans by OTLP over HTTP, sent by the SDK's thread. A
`traceparent` that came with the request is the span's parent. Never a prompt, never an answer. The
SDK is the extra [otel]; without --otlp-endpoint nothing of it is loaded.

Attribute names: OpenTelemetry's semantic conventions for generative AI.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tokenry.api.request_log import Facts
from tokenry.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class Tracer:
    """Tells nobody."""

    def ended(self, facts: Facts) -> None:
        """A request has ended."""

    def close(self) -> None:
        """Send what is not sent yet."""


class OTLPTracer(Tracer):
    """Tells the collector at `endpoint`, with or without /v1/traces at its end."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"--otlp-endpoint needs OpenTelemetry's SDK, which is not installed ({error}).",
                mend='pip install "tokenry[otel]"',
            ) from error
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_endpoint is {endpoint!r}, it must be an http:// or https:// URL.",
                mend="--otlp-endpoint http://127.0.0.1:4318",
            )
        url = endpoint.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
        self._provider: TracerProvider = TracerProvider(
            resource=Resource.create({"service.name": "tokenry"})
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("tokenry")

    def ended(self, facts: Facts) -> None:
        """One span with its parts; the SDK's thread sends them."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": facts.caller.traceparent})
        offset_ns = time.time_ns() - time.monotonic_ns()

        def wall_ns(monotonic_s: float) -> int:
            return int(monotonic_s * 1e9) + offset_ns

        span = self._tracer.start_span(
            "tokenry.request",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=_attributes(facts),
            start_time=wall_ns(facts.arrival_s),
        )
        inside = set_span_in_context(span)
        times = (facts.arrival_s, facts.scheduled_s, facts.first_token_s, facts.end_s)
        for name, start_s, end_s in zip(
            ("queue", "prefill", "decode"), times, times[1:], strict=False
        ):
            if start_s is not None and end_s is not None:
                part = self._tracer.start_span(name, context=inside, start_time=wall_ns(start_s))
                part.end(wall_ns(end_s))
        if "error" in facts.reasons:
            span.set_status(Status(StatusCode.ERROR))
        span.end(wall_ns(facts.end_s))

    def close(self) -> None:
        """Send what is not sent yet, and stop the thread."""
        self._provider.shutdown()


def make_tracer(endpoint: str | None) -> Tracer:
    """The tracer for this option; raises ConfigError."""
    return Tracer() if endpoint is None else OTLPTracer(endpoint)


def _attributes(facts: Facts) -> dict[str, Any]:
    params = facts.params
    told: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": facts.model,
        "gen_ai.response.id": facts.request_id,
        "gen_ai.response.finish_reasons": list(facts.reasons),
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.max_tokens": facts.max_tokens,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.usage.input_tokens": facts.num_prompt,
        "gen_ai.usage.output_tokens": facts.num_answer,
        "gen_ai.usage.cache_read.input_tokens": facts.num_cached,
        "tokenry.http_request_id": facts.caller.request_id,
        "tokenry.time_to_first_token_s": facts.ttft_s,
        "tokenry.key": None if facts.caller.key is None else facts.caller.key.name,
        "tokenry.missed_targets": None if facts.missed is None else list(facts.missed),
    }
    return {name: value for name, value in told.items() if value is not None}
