"""The engine's options: what to load, on what, within which limits; and what a device changes in
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenry.config.values import at_least, flag_of, option
from tokenry.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What to load, on what, within which limits."""

    model: str = option("directory, hub id, or a name that an installed package provides ('demo')")
    tokenizer: str | None = option(
        "directory or hub id of the tokenizer, if it is not the model's", None
    )
    revision: str | None = option("hub revision of the model", None)
    trust_remote_code: bool = option("let transformers run code from the model's repository", False)
    backend: str | None = option("backend to use; without it the one with the highest score", None)
    device_index: int = option("which device of the backend", 0)
    backend_option: tuple[str, ...] = option(
        "key=value for the backend, may be given more than once", ()
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "model dtype; auto: the checkpoint's if the backend has it, else the backend's preferred",
        "auto",
    )
    load_format: Literal["auto", "safetensors", "dummy"] = option(
        "dummy: random weights of the right shapes, for benchmarks; auto and safetensors are one: "
        "no other files are read",
        "auto",
    )
    max_model_len: int | None = option(
        "most tokens of a request, prompt and answer; without it the model's own, fitted to memory",
        None,
    )
    quantization: Literal["int8", "int4"] | None = option(
        "weights are quantised while they are loaded: 8 bits per channel, or 4 in groups", None
    )
    max_num_seqs: int = option("most requests in one step", 128)
    max_num_batched_tokens: int = option("token budget of one step", 2048)
    memory_fraction: float = option(
        "share of the device's memory that weights and KV may take", 0.9
    )
    kv_cache_bytes: int | None = option(
        "bytes for the KV cache, instead of what memory_fraction leaves", None
    )
    num_kv_blocks: int | None = option(
        "number of KV blocks, instead of what memory allows (for tests)", None
    )
    block_size: int | None = option("tokens per KV block; without it the backend's preferred", None)
    enable_prefix_caching: bool = option("share the KV of equal prompt beginnings", True)
    enable_chunked_prefill: bool = option("let a long prompt take several steps", True)
    scheduling_policy: Literal["fcfs", "priority", "slo"] = option(
        "who is first in the queue: the first who came, the most urgent, or who can be served "
        "within its latency targets",
        "fcfs",
    )
    overlap: bool | None = option(
        "plan step N+1 while step N runs; without it as the backend advises", None
    )
    enforce_eager: bool = option(
        "run without captured or compiled programs (not on static devices)", False
    )
    deterministic: bool = option(
        "the same request gives the same bits, whatever runs beside it and however its prompt is "
        "cut; refused where the backend cannot do that, slower on some devices",
        False,
    )
    warmup: bool = option("execute every program once before serving", True)
    bucket_strategy: Literal["auto", "exponential", "linear", "padding-aware"] = option(
        "how the sizes of compiled or captured programs are spaced; auto: as the bucket file says, "
        "else exponential",
        "auto",
    )
    bucket_axis: tuple[str, ...] = option(
        "AXIS=MIN:STEP:MAX or AXIS=VALUE,VALUE,... for one axis of the buckets (prefill.seqs, "
        "prefill.tokens, prefill.kv_blocks, decode.seqs, decode.kv_blocks), may be given more "
        "than once",
        (),
    )
    bucket_file: str | None = option("YAML file with bucket settings, see `tokenry buckets`", None)
    max_programs: int | None = option(
        "most compiled or captured programs; without it as many as the backend allows", None
    )
    record_steps: str | None = option(
        "append the shape of every step to this file, for `tokenry buckets`", None
    )
    generation_config: str = option(
        "auto: the model's generation_config.json gives the sampling defaults of requests; none: "
        "it does not; or another directory or file",
        "auto",
    )
    task: Literal["auto", "generate", "embed", "score", "classify", "rerank", "generate+embed"] = (
        option(
            "what the model is asked for; auto: as its files say (an encoder or a directory of "
            "sentence-transformers embeds, ...ForSequenceClassification scores or classifies, "
            "Qwen3-Reranker reranks)",
            "auto",
        )
    )
    pooling: Literal["auto", "cls", "mean", "last"] = option(
        "which tokens make an embedding: the first, all, the last; auto: as the model's files say",
        "auto",
    )
    matryoshka: bool = option(
        "let requests cut embeddings by `dimensions` though the model's files do not allow it",
        False,
    )
    seed: int = option("seeds the requests that bring no seed of their own", 0)

    def __post_init__(self) -> None:
        at_least(self, 1, "max_num_seqs", "max_num_batched_tokens")
        at_least(self, 0, "device_index")
        sizes = ("max_model_len", "kv_cache_bytes", "num_kv_blocks", "block_size", "max_programs")
        at_least(self, 1, *sizes)
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(
                f"memory_fraction is {self.memory_fraction}, it must lie in (0, 1].",
                mend=f"{flag_of('memory_fraction')} 0.9",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}): not every request could get a token in a step.",
                mend=f"--max-num-seqs {self.max_num_batched_tokens}, "
                "or a larger --max-num-batched-tokens",
            )
        for given in self.backend_option:
            if "=" not in given:
                raise ConfigError(
                    f"--backend-option {given!r} is not key=value.",
                    mend="--backend-option key=value",
                )

    @property
    def backend_options(self) -> dict[str, str]:
        """The backend's own options as a mapping."""
        return dict(option.split("=", 1) for option in self.backend_option)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A value that the core or a backend had to set otherwise than configured; printed once at
    start.
    """

    field: str
    value: Any
    why: str


def apply_changes(config: EngineConfig, changes: Sequence[Change]) -> EngineConfig:
    """The config with the changes in it."""
    return dataclasses.replace(config, **{c.field: c.value for c in changes})
