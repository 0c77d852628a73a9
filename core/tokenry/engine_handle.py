"""The engine's process from its parent's side: start it, send commands, hear events, know its end.

In: the engine's config, commands. Out: events and, once, the error that the process ended with,
both by callback in the running event loop. Owns the process, its socket and the private directory
that the socket lies in. Knows nothing of requests, text or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from tokenry.config import EngineConfig
from tokenry.engine_process import BEAT, error_of
from tokenry.errors import ConfigError, EngineDead, TokenryError
from tokenry.messages import Command, Event, Failed, Ready, Shutdown

log = logging.getLogger("tokenry.engine_handle")
_END_GRACE_S = 5.0
_LAST_WORDS_MS = 100
_MAX_SOCKET_PATH = 100
"""A unix socket's path may have 107 bytes (sun_path of unix(7))."""


class EngineHandle:
    """One engine process. `on_event` gets its events, `on_end` why it ended; not after `end()`.

    num_beats   heartbeats so far; they begin when the engine is loaded.
    step_s      what the last one told: seconds that the step under way had taken.
    """

    def __init__(
        self, on_event: Callable[[Event], None], on_end: Callable[[TokenryError], None]
    ) -> None:
        self._on_event = on_event
        self._on_end = on_end
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._directory: Path | None = None
        self._pulse: int | None = None
        self.num_beats = 0
        self.step_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []
        self._loaded = False
        self._failure: Failed | None = None
        self._ending = False
        self._decoder = msgspec.msgpack.Decoder(list[Event])

    @property
    def pid(self) -> int | None:
        """Process id, None before the start."""
        return None if self._process is None else self._process.pid

    async def start(self, config: EngineConfig, factory: str) -> None:
        """Start the process; it begins to load."""
        self._directory = private_directory()
        address = f"ipc://{self._directory}/engine"
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.set_hwm(0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise _no_socket(self._directory, error) from error
        self._pulse, pulse = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tokenry.engine_process",
                address,
                factory,
                str(pulse),
                stdin=asyncio.subprocess.PIPE,
                stdout=sys.stderr.fileno(),  # ours carries the user's text
                pass_fds=(pulse,),
            )
        finally:
            os.close(pulse)
        asyncio.get_running_loop().add_reader(self._pulse, self._feel)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config) + b"\n")
        hearing = asyncio.create_task(self._hear(self._socket))
        watching = asyncio.create_task(self._watch(self._process, self._socket, hearing))
        self._tasks = [hearing, watching]

    def send(self, *commands: Command) -> None:
        """At once: the queue has no limit, so the future is done when it comes."""
        if self._socket is not None:
            self._socket.send(msgspec.msgpack.encode(list(commands)))

    def _feel(self) -> None:
        """Take the heartbeats that came; the pipe ends with the process."""
        assert self._pulse is not None
        data = os.read(self._pulse, 512 * BEAT.size)
        if data:
            self.num_beats += len(data) // BEAT.size
            (self.step_s,) = BEAT.unpack(data[-BEAT.size :])
        else:
            self._close_pulse()

    def _close_pulse(self) -> None:
        if self._pulse is not None:
            asyncio.get_running_loop().remove_reader(self._pulse)
            os.close(self._pulse)
            self._pulse = None

    async def end(self) -> None:
        """End the process, kindly if it listens; a second call does nothing."""
        self._ending = True
        process = self._process
        if process is not None and process.returncode is None:
            if not self._loaded:
                self._abandon()  # it loads, and does not listen yet
            self.send(Shutdown())
            try:
                await asyncio.wait_for(process.wait(), _END_GRACE_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
        self._close_pulse()
        self._remove_directory()

    def _remove_directory(self) -> None:
        """As soon as it may go, for nobody removes it after a SIGKILL."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    async def _hear(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            data = await socket.recv()
            self._remove_directory()  # the process is connected: the socket needs no name any more
            try:
                for event in self._decoder.decode(data):
                    if isinstance(event, Failed):
                        self._failure = event
                    self._loaded = self._loaded or isinstance(event, Ready)
                    self._on_event(event)
            except Exception as error:  # silence would let every request wait for ever
                log.exception("an event of the engine could not be read")
                what = f"The front could not read an event: {type(error).__name__}: {error}."
                self._on_end(EngineDead(what, mend="restart the server; its log has the cause"))
                self._abandon()  # nobody hears it any more
                return

    def _abandon(self) -> None:
        """End the process wherever it is: to it this is its parent's end."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def _watch(
        self,
        process: asyncio.subprocess.Process,
        socket: zmq.asyncio.Socket,
        hearing: asyncio.Task[None],
    ) -> None:
        """When the process ends: let its last words be heard, then say so."""
        code = await process.wait()
        while not hearing.done() and await socket.poll(_LAST_WORDS_MS):
            await asyncio.sleep(0.01)
        if not self._ending:
            self._on_end(self._cause(code))

    def _cause(self, code: int) -> TokenryError:
        failure = self._failure
        if failure is not None and not self._loaded:
            return error_of(failure)
        if failure is not None:
            what = f"The engine process ended with exit code {code}: {failure.message}"
        elif code < 0:
            what = f"The engine process was killed by {signal.Signals(-code).name}."
        else:
            what = f"The engine process ended with exit code {code}."
        mend = failure.mend if failure is not None else "restart the server; its log has the cause"
        if code == -signal.SIGKILL:
            mend = "restart the server; if nobody killed it, the machine ran out of memory"
        return EngineDead(what, mend=mend)


def private_directory() -> Path:
    """A new directory of this user alone, with a path short enough for a unix socket. Raises
    ConfigError.
    """
    try:
        path = Path(tempfile.mkdtemp(prefix="tokenry-"))
        if len(str(path)) > _MAX_SOCKET_PATH - len("/engine"):
            with contextlib.suppress(OSError):
                path.rmdir()
            path = Path(tempfile.mkdtemp(prefix="tokenry-", dir="/tmp"))
    except OSError as error:
        raise _no_socket(error.filename or "the temporary directory", error) from error
    return path


def _no_socket(where: object, error: OSError | zmq.ZMQError) -> ConfigError:
    return ConfigError(
        f"No socket to the engine process can be made in {where}: {error.strerror or error}.",
        mend="TMPDIR=/some/directory with room, that this user may write",
    )
