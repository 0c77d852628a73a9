"""The list of all metrics: our name, those that other engines' dashboards know, what it tells.

In: nothing. Out: tables that metrics.py reads. Our names follow vLLM's where it has one. Sources of
the others' names: vLLM's docs/design/metrics.md, TGI's docs/source/reference/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenry.messages import Stats

PREFIX, VLLM_PREFIX, TGI_PREFIX = "tokenry:", "vllm:", "tgi_"
SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
TOKENS = tuple(float(2**i) for i in range(18))


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """One metric.

    own      name without prefix; vllm: whether vLLM has it under the same name.
    tgi      TGI's name without prefix, None if it has none.
    others   further full names.
    label    the label beside model_name, with the values that are told before they happen.
    buckets  of a histogram: upper bounds.
    """

    own: str
    help: str
    vllm: bool = False
    tgi: str | None = None
    others: tuple[str, ...] = ()
    label: str = ""
    known: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def names(self) -> tuple[str, ...]:
        """Every full name, ours first."""
        vllm = (VLLM_PREFIX + self.own,) if self.vllm else ()
        tgi = () if self.tgi is None else (TGI_PREFIX + self.tgi,)
        return (PREFIX + self.own, *vllm, *tgi, *self.others)


Reading = tuple[Name, Callable[[Stats], float]]

GAUGES: tuple[Reading, ...] = (
    (
        Name(
            own="num_requests_running",
            help="Requests in the running batch",
            vllm=True,
            tgi="batch_current_size",
        ),
        lambda s: s.num_running,
    ),
    (
        Name(own="num_requests_prefilling", help="Of these, those whose prompt is computed"),
        lambda s: s.num_prefilling,
    ),
    (
        Name(own="num_requests_waiting", help="Requests that wait", vllm=True, tgi="queue_size"),
        lambda s: s.num_waiting,
    ),
    (
        Name(
            own="kv_cache_usage_perc",
            help="Share of KV blocks in use, 0 to 1",
            vllm=True,
            others=("vllm:gpu_cache_usage_perc",),
        ),
        lambda s: s.kv_usage,
    ),
)

COUNTERS: tuple[Reading, ...] = (
    (Name(own="num_preemptions", help="Preemptions", vllm=True), lambda s: s.num_preemptions),
    (
        Name(own="prefix_cache_queries", help="Prompt tokens looked up", vllm=True),
        lambda s: s.prefix_cache_queries,
    ),
    (
        Name(own="prefix_cache_hits", help="Prompt tokens found", vllm=True),
        lambda s: s.prefix_cache_hits,
    ),
    (
        Name(own="prompt_tokens", help="Prompt tokens computed", vllm=True),
        lambda s: s.prompt_tokens,
    ),
    (
        Name(own="generation_tokens", help="Tokens generated", vllm=True),
        lambda s: s.generation_tokens,
    ),
    (
        Name(own="steps", help="Steps of the engine", tgi="batch_inference_count"),
        lambda s: s.steps,
    ),
    (Name(own="step_failures", help="Steps that failed"), lambda s: s.step_failures),
    (
        Name(own="device_out_of_memory", help="Steps without device memory, tried again smaller"),
        lambda s: s.num_device_ooms,
    ),
    (
        Name(own="uncompiled_launches", help="Launches without a program"),
        lambda s: s.uncompiled_launches,
    ),
    (
        Name(own="requests_aborted", help="Requests that were aborted"),
        lambda s: s.num_requests_aborted,
    ),
)

LABELLED: tuple[Name, ...] = (
    Name(
        own="request_success",
        help="Finished completions",
        vllm=True,
        label="finished_reason",
        known=("stop", "length", "abort", "error"),
    ),
    Name(
        own="requests_refused",
        help="Requests turned away before they began: wrong key, quota, no room",
        label="reason",
        known=("invalid_api_key", "rate_limit_exceeded", "overloaded"),
    ),
    Name(
        own="requests_with_targets",
        help="Requests with latency targets; those within all of them are the goodput",
        label="result",
        known=("within", "missed"),
    ),
    Name(
        own="targets_missed",
        help="Latency targets that a request missed",
        label="target",
        known=("ttft", "tpot", "deadline"),
    ),
    Name(
        own="engine_restarts",
        help="Engine processes started again after a death",
        label="result",
        known=("serves", "failed"),
    ),
)

HISTOGRAMS: tuple[Name, ...] = (
    Name(
        own="time_to_first_token_seconds",
        help="From arrival to the first token",
        vllm=True,
        buckets=SECONDS,
    ),
    Name(
        own="inter_token_latency_seconds",
        help="Between two tokens of a completion",
        vllm=True,
        others=("vllm:time_per_output_token_seconds",),
        buckets=SECONDS,
    ),
    Name(
        own="e2e_request_latency_seconds",
        help="A whole request",
        vllm=True,
        tgi="request_duration",
        buckets=SECONDS,
    ),
    Name(
        own="request_queue_time_seconds",
        help="From arrival until a request was first scheduled",
        vllm=True,
        tgi="request_queue_duration",
        buckets=SECONDS,
    ),
    Name(
        own="request_prefill_time_seconds",
        help="From being scheduled to the first token",
        vllm=True,
        buckets=SECONDS,
    ),
    Name(
        own="request_decode_time_seconds",
        help="From the first token to the last",
        vllm=True,
        buckets=SECONDS,
    ),
    Name(
        own="request_inference_time_seconds",
        help="From being scheduled to the last token",
        vllm=True,
        tgi="request_inference_duration",
        buckets=SECONDS,
    ),
    Name(
        own="request_time_per_output_token_seconds",
        help="Mean time per token after the first, per request",
        vllm=True,
        tgi="request_mean_time_per_token_duration",
        buckets=SECONDS,
    ),
    Name(
        own="request_prompt_tokens",
        help="Prompt tokens per request",
        vllm=True,
        tgi="request_input_length",
        buckets=TOKENS,
    ),
    Name(
        own="request_generation_tokens",
        help="Generated tokens per request",
        vllm=True,
        tgi="request_generated_tokens",
        buckets=TOKENS,
    ),
    Name(
        own="request_params_max_tokens",
        help="Longest answer that a request asked for",
        vllm=True,
        tgi="request_max_new_tokens",
        buckets=TOKENS,
    ),
)
