"""The server's life: listen, load, serve, drain, end.

In: both configs. Out: an exit code. The socket listens before the model loads, so that probes and
clients get an answer from the first second; a port that is taken is known before anything is
loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import time
from collections.abc import Iterator

import uvicorn

from tokenry.api.app import make_app
from tokenry.api.logs import set_up_logging
from tokenry.api.metrics import Metrics
from tokenry.api.service import Service
from tokenry.api.tls import tls_options
from tokenry.api.tracing import make_tracer
from tokenry.api.watch import watch
from tokenry.async_engine import AsyncEngine
from tokenry.config import EngineConfig, ServerConfig
from tokenry.engine_process import DEFAULT_FACTORY
from tokenry.errors import ConfigError
from tokenry.messages import Ready
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
    engine_config: EngineConfig, server_config: ServerConfig, *, factory: str = DEFAULT_FACTORY
) -> int:
    """Serve until a signal ends it; raises TokenryError if the start fails."""
    set_up_logging(server_config.log_level, server_config.log_format)
    listener = listen(server_config)
    with contextlib.closing(listener):
        import uvloop

        return uvloop.run(_serve(engine_config, server_config, listener, factory))


async def _serve(
    engine_config: EngineConfig,
    config: ServerConfig,
    listener: socket.socket,
    factory: str,
) -> int:
    engine = AsyncEngine(engine_config, chat_template=config.chat_template, factory=factory)
    name = (config.served_model_name or (engine_config.model,))[0]
    metrics = Metrics()
    service = Service(
        engine=engine,
        config=config,
        metrics=metrics.of_model(name, lambda: engine.latest_stats),
        all_metrics=metrics,
        tracer=make_tracer(config.otlp_endpoint),
    )
    server = _Server(
        uvicorn.Config(
            make_app(service),
            log_level="warning" if config.log_level == "info" else config.log_level,
            access_log=config.log_level == "debug",
            lifespan="off",
            http="httptools",
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
        _say(f"listening on {address}, loading {engine_config.model}")
        if await _load(engine, stop):
            for line in _welcome(engine.ready, address, name, key=bool(config.api_key)):
                _say(line)
            watching = asyncio.create_task(watch(service, _say))
            await stop.wait()
            watching.cancel()
            await _drain(service, hurry)
        return 0
    finally:
        await engine.shutdown()
        server.should_exit = True
        await serving
        await asyncio.to_thread(service.tracer.close)


def _on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first signal asks for a drain, the second one ends it: who still waits gets an error."""

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)


async def _load(engine: AsyncEngine, stop: asyncio.Event) -> bool:
    """Load the model and say how far it is; False if a signal came first."""
    loading = asyncio.create_task(_launch(engine))
    stopping = asyncio.create_task(stop.wait())
    try:
        await follow(StartLog(), lambda: engine.progress, loading, stopping)
        if stopping.done():  # an engine that ended by the same signal is no error
            return False
        loading.result()
        return True
    finally:
        stopping.cancel()
        loading.cancel()


async def _launch(engine: AsyncEngine) -> None:
    await engine.launch()
    await engine.wait_ready()


async def _drain(service: Service, hurry: asyncio.Event) -> None:
    """No new requests; those under way get `drain_timeout_s`, or until somebody is in a hurry."""
    service.draining = True
    end_s = time.monotonic() + service.config.drain_timeout_s
    if service.num_active:
        _say(
            f"draining {service.num_active} requests, at most {service.config.drain_timeout_s} s; "
            "a second signal ends them at once"
        )
    while service.num_active and time.monotonic() < end_s and service.engine.dead is None:
        if hurry.is_set():
            break
        await asyncio.sleep(_POLL_S)
    if service.num_active and service.engine.dead is None:
        _say(f"{service.num_active} requests are ended with an error")


def _address(listener: socket.socket, config: ServerConfig) -> str:
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host
    scheme = "http" if config.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _welcome(ready: Ready, address: str, name: str, *, key: bool) -> list[str]:
    body = f'{{"model":"{name}","prompt":"Once upon a time","max_tokens":200,"stream":true}}'
    headers = "-H 'Content-Type: application/json'"
    headers += " -H 'Authorization: Bearer API_KEY'" if key else ""
    return [
        *describe(ready),
        f"try:  curl -N {address}/v1/completions {headers} -d '{body}'",
        f"page: {address}/",
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
