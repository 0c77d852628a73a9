"""`tokenry doctor`: what was found here, what was refused and why, what the last start failed at.

In: the installed backends' probes, facts of the machine, the note that a failed start leaves behind
(`remember`). Out: findings, each with its mend, and a verdict: one root cause. Loads no model,
opens no device, imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec

import tokenry
from tokenry.config import environment, our_variables
from tokenry.errors import ConfigError, TokenryError

State = Literal["ok", "warn", "bad"]
_FEW_BYTES = 2 * 2**30
_SECRETS = ("--api-key", "--admin-key")


class FailedStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a start failed at. `causes`: from the error that was shown down to its root."""

    at_s: float
    command: list[str]
    version: str
    causes: list[str]
    kind: str
    mend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    text: str
    mend: str | None = None


# ---- what a failed start leaves behind -------------------------------------------------------


def state_file() -> Path:
    """Where the last failed start is noted: $XDG_STATE_HOME/tokenry, by default in ~/.local."""
    base = environment("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "tokenry" / "last_failed_start.json"


def remember(command: Sequence[str], error: BaseException) -> None:
    """Note the failure; keys on the command line are not noted. A disk that cannot be written is
    no second failure.
    """
    causes = list(_causes(error))
    note = FailedStart(
        at_s=time.time(),
        command=_without_secrets(command),
        version=tokenry.__version__,
        causes=[_text(cause) for cause in causes],
        kind=type(error).__name__,
        mend=next((c.mend for c in causes if isinstance(c, TokenryError) and c.mend), None),
    )
    path = state_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(note)))


def last_failed_start() -> FailedStart | None:
    """The note, None if there is none that can be read."""
    try:
        return msgspec.json.decode(state_file().read_bytes(), type=FailedStart)
    except (OSError, msgspec.DecodeError):
        return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _text(error: BaseException) -> str:
    if isinstance(error, TokenryError):
        return error.message
    return f"{type(error).__name__}: {error}"


def _without_secrets(command: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for word in command:
        if kept and kept[-1] in _SECRETS:
            kept.append("...")
        else:
            flag, equals, _ = word.partition("=")
            kept.append(f"{flag}=..." if equals and flag in _SECRETS else word)
    return kept


# ---- what is looked at -----------------------------------------------------------------------


def look() -> list[Finding]:
    """Everything, in the order in which a start needs it."""
    return [finding for check in _CHECKS for finding in check()]


def _versions() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    yield Finding(name="tokenry", state="ok", text=f"{tokenry.__version__} on {system}")


def _variables() -> Iterator[Finding]:
    try:
        ours = our_variables()
    except ConfigError as error:
        yield Finding(name="environment", state="bad", text=error.message, mend=error.mend)
        return
    text = ", ".join(ours) if ours else "no TOKENRY_* variables are set"
    yield Finding(name="environment", state="ok", text=text)


def _backends() -> Iterator[Finding]:
    from tokenry.backend.discovery import absent, choose, discover

    probes = discover()
    for probe in (*probes, *absent(probes)):
        device = "" if probe.device is None else f"{probe.device.name}: "
        state: State = "warn" if probe.state == "broken" else "ok"
        text = f"{device}{probe.state}, {probe.reason}"
        mend = probe.mend if probe.state == "broken" else None
        yield Finding(name=f"backend {probe.backend}", state=state, text=text, mend=mend)
    try:
        chosen = choose(probes, None)
    except TokenryError as error:
        text = error.message.partition("\n")[0]
        yield Finding(
            name="device", state="bad", text=text, mend=error.mend or 'pip install "tokenry[cpu]"'
        )
    else:
        text = f"{chosen.name} by the backend {chosen.backend}, score {chosen.score}"
        yield Finding(name="device", state="ok", text=text)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / 2**30:.1f} GiB of {memory.total / 2**30:.1f} GiB are free, "
    text += f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores"
    few = memory.available < _FEW_BYTES
    yield Finding(
        name="memory",
        state="warn" if few else "ok",
        text=text,
        mend="end other programs, or serve a smaller model" if few else None,
    )


def _places() -> Iterator[Finding]:
    """Directories that a start writes to."""
    hub = environment("HF_HUB_CACHE") or environment("HF_HOME") or "~/.cache/huggingface"
    for name, path in (("hub cache", Path(hub).expanduser()), ("temporary files", _temporary())):
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding(
                name=name,
                state="bad",
                text=f"{path} cannot be written",
                mend="HF_HOME=DIR" if name == "hub cache" else "TMPDIR=DIR",
            )
            continue
        yield Finding(
            name=name,
            state="warn" if free < _FEW_BYTES else "ok",
            text=f"{path}, {free / 2**30:.1f} GiB free",
            mend="a model may not fit: HF_HOME=DIR on a larger disk" if free < _FEW_BYTES else None,
        )
    if environment("HF_HUB_OFFLINE") in ("1", "true", "yes", "on"):
        text = "HF_HUB_OFFLINE is set: only models that are here already are found"
        yield Finding(name="hub", state="warn", text=text, mend="unset HF_HUB_OFFLINE")


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _extras() -> Iterator[Finding]:
    for name, distribution in (("hf", "transformers"), ("otel", "opentelemetry-sdk")):
        try:
            text = f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            text = f'not installed (pip install "tokenry[{name}]" brings it)'
        yield Finding(name=f"extra {name}", state="ok", text=text)


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions,
    _variables,
    _backends,
    _memory,
    _places,
    _extras,
)


# ---- the command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tokenry doctor`."""
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--forget", action="store_true", help="remove the last failed start's note")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 if a start would fail."""
    findings, failed = look(), last_failed_start()
    bad = [finding for finding in findings if finding.state == "bad"]
    if args.json:
        data = {"findings": [asdict(f) for f in findings], "last_failed_start": failed}
        print(msgspec.json.encode(data).decode())
    else:
        for finding in findings:
            print(_line(finding))
        print()
        for line in (*_failure(failed), *_verdict(bad)):
            print(line)
    if args.forget:
        state_file().unlink(missing_ok=True)
    return 1 if bad else 0


def _line(finding: Finding) -> str:
    line = f"{finding.state:5} {finding.name:16} {finding.text}"
    return line if finding.mend is None else f"{line}\n      {'':16} mend: {finding.mend}"


def _failure(failed: FailedStart | None) -> list[str]:
    if failed is None:
        return ["No failed start is noted."]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(failed.at_s))
    lines = [
        f"Last failed start: {when}, tokenry {failed.version}",
        f"  command     {shlex.join(failed.command)}",
        f"  root cause  {failed.causes[-1]}",
    ]
    lines += [f"  shown as    {failed.causes[0]}"] if len(failed.causes) > 1 else []
    lines += [f"  mend        {failed.mend}"] if failed.mend else []
    return lines


def _verdict(bad: Sequence[Finding]) -> list[str]:
    if not bad:
        return ["A start should succeed here."]
    worst = bad[0]
    mend = "" if worst.mend is None else f"\n  mend: {worst.mend}"
    return [f"A start fails here: {worst.name}: {worst.text}{mend}"]
