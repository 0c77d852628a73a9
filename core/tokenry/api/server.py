"""The server's life: listen, load, serve, drain, end.

In: both configs. Out: an exit code. The socket listens before the model loads, so that probes and
clients get an answer from the first second; a port that is taken is known before anything is
loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from tokenry.api.app import make_app
from tokenry.api.desk import Desk
from tokenry.api.fleet import Fleet, ServedModel
from tokenry.api.http import BoundedHttp
from tokenry.api.logs import LogStream, sayer, set_up_logging
from tokenry.api.middleware import guarded
from tokenry.api.tls import tls_options
from tokenry.api.tracing import make_tracer
from tokenry.config import EngineConfig, ServerConfig
from tokenry.engine_process import DEFAULT_FACTORY
from tokenry.errors import ConfigError
from tokenry.messages import Progress
from tokenry.startup import StartLog, describe, follow

_POLL_S = 0.05


class _Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(config: ServerConfig) -> socket.socket:
    """The listening socket; raises ConfigError that names the flag."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {config.port} on {config.host} is in use.",
                mend=f"--port {config.port + 1}, or --port 0 for a free one",
            ) from error
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror or error}.",
            mend="--host 127.0.0.1 --port 8000",
        ) from error
    return listener


def serve(
    engines: EngineConfig | Sequence[EngineConfig],
    config: ServerConfig,
    *,
    factory: str = DEFAULT_FACTORY,
) -> int:
    """Serve until a signal ends it; raises TokenryError if the start fails."""
    set_up_logging(config.log_level, config.log_format)
    listener = listen(config)
    with contextlib.closing(listener):
        import uvloop

        configs = [engines] if isinstance(engines, EngineConfig) else engines
        return uvloop.run(_serve(_sharing(configs), config, listener, factory))


def _sharing(configs: Sequence[EngineConfig]) -> list[EngineConfig]:
    """Several engines on one device share the memory that one would take."""
    return [
        dataclasses.replace(config, memory_fraction=config.memory_fraction / len(configs))
        for config in configs
    ]


async def _serve(
    configs: Sequence[EngineConfig],
    config: ServerConfig,
    listener: socket.socket,
    factory: str,
) -> int:
    say = sayer(config.log_format)
    tracer = make_tracer(config.otlp_endpoint)
    fleet = Fleet(configs, config, tracer=tracer, factory=factory, say=say)
    desk = Desk.open(config)
    routes = make_app(fleet, desk)
    server = _Server(
        uvicorn.Config(
            guarded(routes, fleet),
            log_level="warning" if config.log_level == "info" else config.log_level,
            log_config=None if config.log_format == "json" else uvicorn.config.LOGGING_CONFIG,
            access_log=config.log_level == "debug",
            lifespan="off",
            http=BoundedHttp,
            timeout_graceful_shutdown=2,
            server_header=False,
            **tls_options(config),
        )
    )
    stop, hurry = asyncio.Event(), asyncio.Event()
    _on_signals(stop, hurry)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        address = _address(listener, config)
        say(f"listening on {address}, loading {', '.join(c.model for c in configs)}")
        if await _load(fleet, stop, _start_log(config)):
            for line in _welcome(fleet, address, config):
                say(line)
            async with desk.at_work(routes, fleet):
                await stop.wait()
            await _drain(fleet, config, hurry, say)
        return 0
    finally:
        desk.responses.close()
        await fleet.shutdown()
        server.should_exit = True
        await serving
        await asyncio.to_thread(tracer.close)


def _on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first signal asks for a drain, the second one ends it: who still waits gets an error."""

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


async def _load(fleet: Fleet, stop: asyncio.Event, log: StartLog) -> bool:
    """Load the models and say how far they are; False if a signal came first."""
    loading = asyncio.create_task(fleet.load_all())
    stopping = asyncio.create_task(stop.wait())
    try:
        await follow(log, lambda: _progress(fleet), loading, stopping)
        if stopping.done():  # an engine that ended by the same signal is no error
            return False
        loading.result()
        return True
    finally:
        stopping.cancel()
        loading.cancel()


def _progress(fleet: Fleet) -> Progress:
    """Of the model that is loading now."""
    model = next((m for m in fleet if m.state == "loading"), fleet.first)
    progress = model.service.engine.progress
    if len(fleet) == 1:
        return progress
    return Progress(phase=f"{model.name}: {progress.phase}", share=progress.share)


def _start_log(config: ServerConfig) -> StartLog:
    return StartLog(LogStream()) if config.log_format == "json" else StartLog()


async def _drain(
    fleet: Fleet, config: ServerConfig, hurry: asyncio.Event, say: Callable[[str], None]
) -> None:
    """No new requests; those under way get `drain_timeout_s`, or until somebody is in a hurry."""
    for model in fleet:
        model.service.draining = True
    end_s = time.monotonic() + config.drain_timeout_s
    if fleet.num_active:
        say(
            f"draining {fleet.num_active} requests, at most {config.drain_timeout_s} s; "
            "a second signal ends them at once"
        )
    while _num_left(fleet) and time.monotonic() < end_s and not hurry.is_set():
        await asyncio.sleep(_POLL_S)
    if _num_left(fleet):
        say(f"{_num_left(fleet)} requests are ended with an error")


def _num_left(fleet: Fleet) -> int:
    """Answers under way whose engine lives."""
    return sum(m.service.num_active for m in fleet if m.service.engine.dead is None)


def _address(listener: socket.socket, config: ServerConfig) -> str:
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _welcome(fleet: Fleet, address: str, config: ServerConfig) -> list[str]:
    path, body = _first_request(fleet.first)
    headers = "-H 'Content-Type: application/json'"
    headers += " -H 'Authorization: Bearer API_KEY'" if config.asks_for_keys else ""
    told = [line for model in fleet for line in _about(model, alone=len(fleet) == 1)]
    if len(fleet) > 1:
        share = fleet.first.service.engine.config.memory_fraction
        told.append(
            f"note: each of {len(fleet)} models may take {share:.3g} of its device's memory"
        )
    return [
        *told,
        f"try:  curl -N {address}{path} {headers} -d '{body}'",
        f"page: {address}/",
    ]


def _first_request(model: ServedModel) -> tuple[str, str]:
    """A route that serves the model, and a body for it."""
    limits, name = model.service.engine.ready.limits, model.name
    if limits.tokens or limits.vectors is None:
        more = '"prompt":"Once upon a time","max_tokens":200,"stream":true'
        return "/v1/completions", f'{{"model":"{name}",{more}}}'
    path = "/v1/embeddings" if limits.vectors.kind == "embed" else "/classify"
    return path, f'{{"model":"{name}","input":"Once upon a time"}}'


def _about(model: ServedModel, *, alone: bool) -> list[str]:
    lines = describe(model.service.engine.ready)
    mark = model.service.defaults.watermark
    if mark is not None:
        refused = "; temperature 0 is refused" if mark.scheme == "gumbel" else ""
        lines.append(f"note: every answer carries a {mark.scheme} watermark{refused}")
    return lines if alone else [f"{', '.join(model.service.model_names)}:", *lines]
