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
    api_key: tuple[str, ...] = option("key(s) that requests must bring as a bearer token", ())
    chat_template: str | None = option(
        "file with a Jinja chat template, instead of the tokenizer's", None
    )
    max_body_bytes: int = option("largest request body", 32 * 2**20)
    max_waiting: int = option(
        "requests that may wait for the engine; one more is answered with 503", 4096
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
    log_level: Literal["debug", "info", "warning", "error"] = option("how much is logged", "info")
    log_prompts: bool = option(
        "each request's prompt in its line of the log, not only counts", False
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, it must lie in 0..65535.", mend="--port 8000")
        at_least(self, 1, "max_body_bytes")
        at_least(self, 0, "max_waiting", "drain_timeout_s")
        for name in ("keep_alive_s", "heartbeat_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"{name} is {value}, it must be finite and > 0.", mend=f"{flag_of(name)} 30"
                )
