"""The HTTP server's options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tokenry.config.values import at_least, flag_of, option
from tokenry.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the HTTP process serves."""

    host: str = option("address to listen on", "127.0.0.1")
    port: int = option("port to listen on, 0 takes a free one", 8000)
    served_model_name: tuple[str, ...] = option(
        "name(s) that requests may use; without it the model as given", ()
    )
    alias: tuple[str, ...] = option(
        "NAME=MODEL: one more name for a model, where several are served", ()
    )
    api_key: tuple[str, ...] = option("key(s) that requests must bring as a bearer token", ())
    api_keys_file: str | None = option(
        "file of hashed keys with their limits, see `tokenry keys`; read anew when it changes", None
    )
    admin_key: tuple[str, ...] = option(
        "key(s) that may load, unload, sleep and wake models under /admin", ()
    )
    public_metrics: bool = option("/metrics and /version need no key", True)
    cors_origins: tuple[str, ...] = option(
        "origin(s) whose pages may use the API from a browser; '*' for all", ()
    )
    ssl_certfile: str | None = option("serve HTTPS with this certificate chain (PEM)", None)
    ssl_keyfile: str | None = option("the certificate's private key (PEM)", None)
    chat_template: str | None = option(
        "file with a Jinja chat template, instead of the tokenizer's", None
    )
    tool_parser: Literal[
        "auto",
        "hermes",
        "qwen3_coder",
        "llama3_json",
        "pythonic",
        "mistral",
        "mistral_v11",
        "deepseek_v3",
        "deepseek_v31",
        "harmony",
        "json",
        "gemma",
    ] = option("how the model writes tool calls; auto: as its chat template does", "auto")
    reasoning_parser: Literal[
        "auto", "none", "harmony", "think", "mistral", "seed", "thought", "kimi", "gemma", "cohere"
    ] = option("marks around the model's thinking; auto: those of its chat template", "auto")
    max_body_bytes: int = option("largest request body", 32 * 2**20)
    max_queue: int = option(
        "requests that may wait for the engine; one more is answered with 503", 4096
    )
    data_dir: str | None = option(
        "directory for files and batches (/v1/files, /v1/batches); without it they are not served",
        None,
    )
    max_file_bytes: int = option("largest file that may be uploaded", 512 * 2**20)
    batch_concurrency: int = option("most lines of batches that run at once", 16)
    max_stored_responses: int = option(
        "responses of /v1/responses that are kept in memory, the newest", 1000
    )
    keep_alive_s: float = option(
        "seconds of silence after which a stream carries a comment line", 15.0
    )
    drain_timeout_s: float = option("seconds that running requests get at shutdown", 30.0)
    heartbeat_timeout_s: float = option("seconds of an engine's silence that /readyz tells", 30.0)
    step_timeout_s: float = option("seconds of one step (it may compile) that /readyz tells", 600.0)
    strict_params: bool = option(
        "answer unknown request fields with 400 (otherwise a header names them)", False
    )
    watermark: Literal["kgw", "gumbel"] | None = option(
        "mark every answer, so that `tokenry watermark detect` can tell it with the same options",
        None,
    )
    watermark_key: int = option("secret key of the mark, 64 bits", 0)
    watermark_gamma: float = option("kgw: share of the tokens that are green", 0.25)
    watermark_delta: float = option("kgw: what is added to the logits of green tokens", 2.0)
    watermark_context: int = option("tokens that are hashed with the key", 1)
    log_level: Literal["debug", "info", "warning", "error"] = option("how much is logged", "info")
    log_format: Literal["text", "json"] = option("lines of text, or one JSON object each", "text")
    otlp_endpoint: str | None = option(
        "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span per request; needs "
        "the extra [otel]",
        None,
    )
    restart_engine: int = option(
        "how often in a row an engine that died is started again (0: never)", 0
    )
    log_prompts: bool = option(
        "each request's prompt in its line of the log, not only counts", False
    )

    @property
    def asks_for_keys(self) -> bool:
        """Whether requests must bring a key."""
        return bool(self.api_key) or self.api_keys_file is not None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, it must lie in 0..65535.", mend="--port 8000")
        at_least(self, 1, "max_body_bytes", "max_file_bytes", "batch_concurrency")
        at_least(self, 0, "max_stored_responses")
        at_least(self, 0, "max_queue", "drain_timeout_s", "restart_engine")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError(
                "HTTPS needs a certificate and its key, one of them is missing.",
                mend="--ssl-certfile CERT.pem --ssl-keyfile KEY.pem",
            )
        for name in ("keep_alive_s", "heartbeat_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"{name} is {value}, it must be finite and > 0.", mend=f"{flag_of(name)} 30"
                )
