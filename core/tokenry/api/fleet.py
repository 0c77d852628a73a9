"""The models behind one port: which of them run, and what happens when one dies.

In: engine configs, admin's wishes (load, unload, sleep, wake), deaths. Out: a `Service` per model.
Every model's engine is a process of its own; ended, it gives all of its memory back. Owned by the
server. A model that sleeps is started again by the next request for it, one that is unloaded is
not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from tokenry.api.metrics import Metrics
from tokenry.api.service import Service
from tokenry.api.tracing import Tracer
from tokenry.api.watch import watch
from tokenry.async_engine import AsyncEngine
from tokenry.config import EngineConfig, ServerConfig
from tokenry.errors import ConfigError, ModelNotFound, TokenryError

State = Literal["unloaded", "sleeping", "loading", "ready", "stalled", "dead", "draining"]
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
STEADY_S = 60.0
"""An engine that served so long has recovered: the next death is the first again."""
_POLL_S = 0.05


class ServedModel:
    """One model: its service, whose engine is replaced when it is loaded anew."""

    def __init__(
        self,
        names: tuple[str, ...],
        config: EngineConfig,
        server: ServerConfig,
        *,
        metrics: Metrics,
        tracer: Tracer,
        factory: str,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._server = server
        self._factory = factory
        self._say = say
        self._changing = asyncio.Lock()
        self._life: asyncio.Task[None] | None = None
        self._wanted: Literal["running", "sleeping", "unloaded"] = "unloaded"
        self._waking = False
        self.service = Service(
            names=names,
            engine=self._new_engine(),
            config=server,
            metrics=metrics.of_model(names[0], lambda: self.service.engine.latest_stats),
            all_metrics=metrics,
            tracer=tracer,
        )

    @property
    def name(self) -> str:
        """Its first name."""
        return self.service.model_names[0]

    @property
    def state(self) -> State:
        """What it does now."""
        service, engine = self.service, self.service.engine
        if self._wanted != "running":
            return self._wanted
        if service.draining:
            return "draining"
        if engine.dead is not None:
            return "dead"
        if not engine.is_ready:
            return "loading"
        return "ready" if service.stalled is None else "stalled"

    @property
    def sleeps(self) -> bool:
        """It sleeps, or is being woken: a request waits for it by `load`."""
        return self._waking or self._wanted == "sleeping"

    async def load(self) -> None:
        """Start it, unless it runs; raises the error that the start failed with."""
        async with self._changing:
            if self._wanted == "running" and self.service.engine.dead is None:
                return
            self._waking = self._wanted == "sleeping"
            try:
                await self._end_life()
                await self._start()
            finally:
                self._waking = False
            self._life = asyncio.create_task(self._live())

    async def unload(self, *, asleep: bool) -> None:
        """End it when its requests are answered, or after drain_timeout_s."""
        async with self._changing:
            self._wanted = "sleeping" if asleep else "unloaded"
            self.service.paused = self._wanted
            end_s = time.monotonic() + self._server.drain_timeout_s
            while self.service.num_active and time.monotonic() < end_s:
                await asyncio.sleep(_POLL_S)
            await self._end_life()
            self.service.engine = self._new_engine()

    async def shutdown(self) -> None:
        """End it now; who waits is told."""
        if self._life is not None:
            self._life.cancel()
        await self.service.engine.shutdown()

    async def _start(self) -> None:
        """A new engine in the service's place; raises what it failed with."""
        if self.service.engine.dead is not None:
            self.service.engine = self._new_engine()
        self._wanted, self.service.paused, self.service.stalled = "running", None, None
        try:
            await self.service.engine.launch()
            await self.service.engine.wait_ready()
        except BaseException:
            await self.service.engine.shutdown()
            raise

    async def _live(self) -> None:
        """Watch the engine; start it again as often as the operator allows."""
        deaths = 0
        while True:
            began_s = time.monotonic()
            await watch(self.service, self._say)
            deaths = 1 if time.monotonic() - began_s > STEADY_S else deaths + 1
            while not await self._revived(deaths):
                deaths += 1
                if deaths > self._server.restart_engine:
                    return

    async def _revived(self, deaths: int) -> bool:
        """Whether the engine serves again after a try; the last try's failure is told."""
        most = self._server.restart_engine
        if deaths > most:
            return False
        wait_s = min(FIRST_WAIT_S * 2 ** (deaths - 1), LONGEST_WAIT_S)
        self._say(f"{self.name}: the engine is started again in {wait_s:g} s ({deaths} of {most})")
        await asyncio.sleep(wait_s)
        counter = self.service.metrics.labelled["engine_restarts"]
        await self.service.engine.shutdown()
        try:
            await self._start()
        except TokenryError as error:
            counter["failed"] += 1
            self._say(f"{self.name}: it could not be started: {error}")
            return False
        counter["serves"] += 1
        self._say(f"{self.name}: the engine serves again.")
        return True

    async def _end_life(self) -> None:
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
            self._life = None
        await self.service.engine.shutdown()

    def _new_engine(self) -> AsyncEngine:
        return AsyncEngine(
            self._config, chat_template=self._server.chat_template, factory=self._factory
        )


class Fleet:
    """All models of a server, in the order in which they were named."""

    def __init__(
        self,
        configs: Sequence[EngineConfig],
        server: ServerConfig,
        *,
        tracer: Tracer,
        factory: str,
        say: Callable[[str], None],
    ) -> None:
        self.metrics = Metrics()
        names = names_of(configs, server)
        self._make: Callable[[EngineConfig, tuple[str, ...]], ServedModel] = lambda config, given: (
            ServedModel(
                given, config, server, metrics=self.metrics, tracer=tracer, factory=factory, say=say
            )
        )
        self._models = [self._make(c, n) for c, n in zip(configs, names, strict=True)]

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def first(self) -> ServedModel:
        """Who answers a request that names no model."""
        return self._models[0]

    @property
    def names(self) -> list[str]:
        """All names that a request may use."""
        return [name for model in self._models for name in model.service.model_names]

    @property
    def num_active(self) -> int:
        """Answers under way."""
        return sum(model.service.num_active for model in self._models)

    def find(self, name: str) -> ServedModel:
        """The model of that name; raises ModelNotFound."""
        for model in self._models:
            if name in model.service.model_names:
                return model
        raise ModelNotFound(name, self.names)

    def add(self, config: EngineConfig, names: tuple[str, ...]) -> ServedModel:
        """One more model, not loaded yet. Raises ConfigError if a name is taken."""
        for name in names:
            if name in self.names:
                raise ConfigError(f"A model is served as {name!r} already.", mend="another alias")
        model = self._make(config, names)
        self._models.append(model)
        return model

    async def load_all(self) -> None:
        """One after the other: each measures the memory that the others left."""
        for model in self._models:
            await model.load()

    async def shutdown(self) -> None:
        """End all of them now."""
        await asyncio.gather(*(model.shutdown() for model in self._models))


def names_of(configs: Sequence[EngineConfig], server: ServerConfig) -> list[tuple[str, ...]]:
    """The names of each model: its aliases, then the one that it was given by. Raises
    ConfigError.
    """
    given = [config.model for config in configs]
    if len(set(given)) < len(given):
        raise ConfigError("A model is named twice.", mend="one process serves each model once")
    if server.served_model_name and len(given) > 1:
        raise ConfigError(
            "--served-model-name names one model, and there are several.",
            mend=f"--alias NAME={given[0]}",
        )
    aliases: dict[str, list[str]] = {model: [] for model in given}
    for text in server.alias:
        name, _, model = text.partition("=")
        if not name or model not in aliases:
            raise ConfigError(
                f"--alias {text!r} is not NAME=MODEL with one of the models {', '.join(given)}.",
                mend=f"--alias NAME={given[0]}",
            )
        aliases[model].append(name)
    names = [(*server.served_model_name, *aliases[model], *_own(model, server)) for model in given]
    flat = [name for group in names for name in group]
    twice = sorted({name for name in flat if flat.count(name) > 1})
    if twice:
        raise ConfigError(f"Two models have the name {twice[0]!r}.", mend="another --alias")
    return names


def _own(model: str, server: ServerConfig) -> tuple[str, ...]:
    """The name that it was given by, unless --served-model-name stands in its place."""
    return () if server.served_model_name else (model,)
