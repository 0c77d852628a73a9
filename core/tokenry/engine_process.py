"""The engine in a process of its own: commands in, events out, msgpack over a private unix socket.

In: the engine's config as JSON on stdin, then batches of `Command`s. Out: batches of `Event`s:
Progress while loading, then Ready or Failed, then the news of each step. Blocks in poll while there
is nothing to do, so an idle server costs no CPU but a heartbeat each second. Ends with its parent,
not by SIGINT or SIGTERM: stdin is a pipe that only the parent holds open, and its end is the
parent's. Knows no HTTP and no text; run as
`python -m tokenry.engine_process ADDRESS FACTORY PULSE`, PULSE being an open pipe for heartbeats.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from tokenry.config import EngineConfig, environment
from tokenry.errors import (
    BackendError,
    ConfigError,
    DeviceOOM,
    KVCacheTooSmall,
    ModelLoadError,
    NoBackend,
    Refusal,
    RequestError,
    TokenryError,
    UnknownArchitecture,
    Unsupported,
)
from tokenry.messages import (
    Abort,
    AddRequest,
    Command,
    Event,
    Failed,
    Progress,
    Query,
    Ready,
    Reply,
    Shutdown,
    Stats,
    TokensEvent,
)
from tokenry.startup import collector_paused

DEFAULT_FACTORY = "tokenry.assemble:assemble"
STATS_INTERVAL_S = 1.0
BEAT_S = 1.0
BEAT = struct.Struct("<d")
"""A heartbeat: seconds that the step under way has taken."""
EXIT_FAILED = 1
_START_ERRORS: dict[str, type[TokenryError]] = {
    kind.__name__: kind
    for kind in (
        BackendError,
        ConfigError,
        DeviceOOM,
        KVCacheTooSmall,
        ModelLoadError,
        NoBackend,
        UnknownArchitecture,
        Unsupported,
    )
}


class Engine(Protocol):
    """What this process needs of an engine; `EngineCore` is the real one."""

    def add(self, request: AddRequest) -> None:
        """Queue a request."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""
        ...

    def step(self) -> Sequence[TokensEvent]:
        """One step; what happened."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do something."""
        ...

    def stats(self) -> Stats:
        """Counters and gauges."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Forget cached beginnings; whether it was done."""
        ...

    def check_integrity(self) -> None:
        """Raise if the books do not agree."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class _AssembledEngine(Protocol):
    @property
    def engine(self) -> Any:
        """The engine."""
        ...

    @property
    def ready(self) -> Ready:
        """Facts for the front."""
        ...


Factory = Callable[[EngineConfig, Callable[[str, float], None]], _AssembledEngine]


class EngineProcess:
    """The loop of the process: drain commands, step, send what happened."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self._engine = engine
        self._socket = socket
        self._batches = msgspec.msgpack.Decoder(list[msgspec.Raw])
        self._commands = msgspec.msgpack.Decoder(Command)
        self._encoder = msgspec.msgpack.Encoder()
        self._stats_sent_s = 0.0
        self._stats_due = False
        self._step_began_s: float | None = None
        self._running = True

    def run(self) -> None:
        """Serve until a Shutdown comes."""
        while self._running:
            events = self._take_commands()
            if self._running and self._engine.has_work():
                self._step_began_s = time.monotonic()
                events += self._engine.step()
                self._step_began_s = None
                self._stats_due = True
            events += self._due_stats()
            if events:
                self._socket.send(self._encoder.encode(events))

    def beat(self, pulse: int) -> None:
        """Every second, into this pipe: how long the step under way takes, 0 between steps. Runs on
        a thread of its own, so that a long step is not taken for a process that hangs.
        """
        with contextlib.suppress(OSError):  # the parent is gone, and so shall we be
            while True:
                began_s = self._step_began_s
                step_s = 0.0 if began_s is None else time.monotonic() - began_s
                os.write(pulse, BEAT.pack(step_s))
                time.sleep(BEAT_S)

    def _take_commands(self) -> list[Event]:
        events: list[Event] = []
        timeout_ms = self._patience_ms()
        while self._running and self._socket.poll(timeout_ms):
            for raw in self._batches.decode(self._socket.recv()):
                try:
                    command = self._commands.decode(raw)
                except (msgspec.DecodeError, TokenryError) as error:  # its sender's fault alone
                    events += _unreadable(raw, error)
                else:
                    events += self._obey(command)
            timeout_ms = 0
        return events

    def _patience_ms(self) -> int | None:
        """No wait while there is work; for ever while idle, once the last stats are told."""
        if self._engine.has_work():
            return 0
        if not self._stats_due:
            return None
        left_s = self._stats_sent_s + STATS_INTERVAL_S - time.monotonic()
        return max(0, int(left_s * 1000) + 1)

    def _due_stats(self) -> list[Event]:
        now = time.monotonic()
        if not self._stats_due or now - self._stats_sent_s < STATS_INTERVAL_S:
            return []
        self._stats_sent_s, self._stats_due = now, False
        return [self._engine.stats()]

    def _obey(self, command: Command) -> list[Event]:
        if isinstance(command, AddRequest):
            return self._add(command)
        if isinstance(command, Abort):
            self._engine.abort(command.request_ids)
            self._stats_due = True
        elif isinstance(command, Query):
            return self._answer(command)
        elif isinstance(command, Shutdown):
            self._running = False
        return []

    def _add(self, request: AddRequest) -> list[Event]:
        try:
            self._engine.add(request)
        except TokenryError as error:
            return [_failed(request.request_id, error)]
        return []

    def _answer(self, query: Query) -> list[Event]:
        """The reply; stats come as their own event before it."""
        data: dict[str, str | int | float | bool] = {}
        try:
            if query.what == "stats":
                return [self._engine.stats(), Reply(query_id=query.query_id)]
            if query.what == "reset_prefix_cache":
                data = {"done": self._engine.reset_prefix_cache()}
            else:
                self._engine.check_integrity()
                data = {"ok": True}
        except (TokenryError, AssertionError) as error:
            return [Reply(query_id=query.query_id, error=str(error) or type(error).__name__)]
        return [Reply(query_id=query.query_id, data=data)]


def _unreadable(raw: msgspec.Raw, error: Exception) -> list[Event]:
    """The answer to whoever sent a command that is none, where it can be told who that is."""
    data = msgspec.msgpack.decode(raw)
    told = data if isinstance(data, dict) else {}
    text = f"The engine cannot read this command: {error}."
    request_id, query_id = told.get("request_id"), told.get("query_id")
    if isinstance(request_id, str):
        wrong = error if isinstance(error, RequestError) else RequestError(text)
        return [_failed(request_id, wrong)]
    if isinstance(query_id, int):
        return [Reply(query_id=query_id, error=text)]
    print(text, file=sys.stderr, flush=True)
    return []


def _failed(request_id: str, error: TokenryError) -> TokensEvent:
    refusal = Refusal.of(error) if isinstance(error, RequestError) else None
    return TokensEvent(
        request_id=request_id, finish_reason="error", error=str(error), refusal=refusal
    )


def main(argv: Sequence[str]) -> int:
    """Load the engine that `factory` makes, then serve it at `address`; heartbeats go to a pipe."""
    address, factory, pulse = argv
    for number in (signal.SIGINT, signal.SIGTERM):  # often sent to the whole group: the parent's
        signal.signal(number, signal.SIG_IGN)  # to understand, it drains and then ends us
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    threading.Thread(target=_end_with_parent, args=(address,), daemon=True).start()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 2000)
    socket.set_hwm(0)
    socket.connect(address)
    try:
        return _load_and_run(config, factory, socket, int(pulse))
    finally:
        socket.close()
        context.term()


def _load_and_run(config: EngineConfig, factory: str, socket: zmq.Socket[bytes], pulse: int) -> int:
    def send(event: Event) -> None:
        socket.send(msgspec.msgpack.encode([event]))

    engine: Any = None
    try:
        send(Progress(phase="importing"))
        with collector_paused():
            assembled = find_factory(factory)(
                config, lambda phase, share: send(Progress(phase=phase, share=share))
            )
            engine = assembled.engine
            gc.freeze()  # what stays: here no collection need ever look through it
        process = EngineProcess(engine, socket)
        threading.Thread(target=process.beat, args=(pulse,), daemon=True).start()
        send(assembled.ready)
        process.run()
        return 0
    except Exception as error:  # whatever it is, the parent must learn the cause
        send(failure_of(error))
        if not isinstance(error, TokenryError) or environment("TOKENRY_LOG_LEVEL") == "debug":
            traceback.print_exc()
        return EXIT_FAILED
    finally:
        if engine is not None:
            engine.close()


def failure_of(error: BaseException) -> Failed:
    """One cause with its mend, as an event."""
    if isinstance(error, TokenryError):
        return Failed(message=error.message, mend=error.mend, error_type=type(error).__name__)
    return Failed(message=f"{type(error).__name__}: {error}", error_type=type(error).__name__)


def error_of(failure: Failed) -> TokenryError:
    """The error that `failure_of` told of, on the other side."""
    kind = _START_ERRORS.get(failure.error_type, TokenryError)
    return kind(failure.message, mend=failure.mend)


def find_factory(dotted: str) -> Factory:
    """`package.module:function`."""
    module, _, name = dotted.partition(":")
    factory: Factory = getattr(importlib.import_module(module), name)
    return factory


def _end_with_parent(address: str) -> None:
    """Even while the main thread loads or computes: the parent's end closes the pipe.

    A parent that was killed could not remove the socket and its directory, so they go here.
    """
    while os.read(0, 4096):
        pass
    socket_path = Path(address.removeprefix("ipc://"))
    with contextlib.suppress(OSError):  # the parent was quicker
        socket_path.unlink()
        socket_path.parent.rmdir()
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
