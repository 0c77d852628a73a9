"""What every route needs: the engine, who may come in now, and what has been counted.

In: requests' needs. Out: answers to "may this be served", model names, ids. Owned by the server;
one per model.
"""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from starlette.requests import Request

import tokenry
from tokenry.api.errors import NotReady
from tokenry.api.metrics import Metrics, ModelMetrics
from tokenry.api.sampling import Defaults
from tokenry.api.tracing import Tracer
from tokenry.async_engine import AsyncEngine
from tokenry.config import ServerConfig
from tokenry.errors import ModelNotFound, Overloaded, RequestError
from tokenry.text.tools_answer import AnswerFormat

SERVICE = "tokenry.service"
"""Where router.py puts the service of the model that a request names."""


@dataclass(slots=True, kw_only=True)
class Service:
    """One model's state. `draining` is set once, by the shutdown; `num_active` counts answers
    under way; `stalled` says why the engine does not serve just now, see watch.py; `paused` and
    `engine` are written by fleet.py alone.
    """

    names: tuple[str, ...]
    engine: AsyncEngine
    config: ServerConfig
    metrics: ModelMetrics
    all_metrics: Metrics
    tracer: Tracer = field(default_factory=Tracer)
    started_s: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    num_active: int = 0
    stalled: str | None = None
    paused: Literal["sleeping", "unloaded"] | None = None
    _answer_format: AnswerFormat | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that a request may use; the first is ours."""
        return self.names

    @property
    def fingerprint(self) -> str:
        """Changes when the same seed may give another text."""
        ready = self.engine.ready
        facts = f"{tokenry.__version__} {self.engine.config.model} {ready.backend} {ready.dtype}"
        return f"fp_{zlib.crc32(facts.encode()):08x}"

    @property
    def defaults(self) -> Defaults:
        """What requests get that do not set it; without the model's while it loads."""
        model = self.engine.ready.sampling_defaults if self.engine.is_ready else {}
        return Defaults.of(model, self.config)

    @property
    def answer_format(self) -> AnswerFormat:
        """How this model's answers are read; made once for its tokenizer."""
        known, tokenizer = self._answer_format, self.engine.tokenizer
        if known is None or known.tokenizer is not tokenizer:
            config = self.config
            known = AnswerFormat.of(tokenizer, config.tool_parser, config.reasoning_parser)
            self._answer_format = known
        return known

    def admit(self) -> None:
        """Raises what keeps a request out now: loading, draining, a dead engine, a full queue."""
        if self.draining:
            raise NotReady("The server is shutting down.", mend="send the request again")
        if self.paused is not None:
            raise NotReady(
                f"The model {self.names[0]!r} is {self.paused}.",
                mend=f"POST /admin/models/{self.names[0]}/load",
            )
        self.check_alive()
        if not self.engine.is_ready:
            progress = self.engine.progress
            raise NotReady(
                f"The model is still loading: {progress.phase}, {progress.share:.0%}.",
                mend="wait for GET /readyz",
            )
        self.check_room(1, param="n")

    def check_alive(self) -> None:
        """Raises EngineDead, with the cause, after the engine's end."""
        if self.engine.dead is not None:
            self.engine.check_health()

    def check_room(self, num_new: int, *, param: str) -> None:
        """Raises Overloaded if so many completions more are too many now, RequestError if always.

        param  the field that asks for them.
        """
        limit = self.config.max_queue + self.engine.config.max_num_seqs
        if num_new > limit:
            raise RequestError(
                f"The request asks for {num_new} completions, at most {limit} are served at once.",
                param=param,
                mend="send several requests, or --max-queue higher on the server",
            )
        if self.engine.num_completions + num_new > limit:
            error = Overloaded(
                f"{self.engine.num_completions} completions are under way, the limit is {limit}.",
                mend="send the request again later, or --max-queue higher",
            )
            self.metrics.refused(error)
            raise error

    def check_model(self, name: str | None) -> str:
        """The name that the answer carries; raises ModelNotFound."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            raise ModelNotFound(name, list(self.model_names))
        return name

    @contextmanager
    def active(self) -> Iterator[None]:
        """While an answer is under way: the drain waits for it."""
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1


def service_of(request: Request) -> Service:
    """The server's `Service`."""
    service: Service = request.scope.get(SERVICE) or request.app.state.service
    return service


def new_id(prefix: str) -> str:
    """`chatcmpl-…`."""
    return f"{prefix}-{uuid.uuid4().hex}"
