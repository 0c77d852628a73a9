"""Which devices are here, which one to use, and how it is opened.

In: the entry points of the group `tokenry.backends`, the name that the user gave or none. Out:
`Probe` rows (every backend with its score and reason), the chosen `DeviceRef`, an open `Backend`. A
plugin that breaks is a row with its reason and never the end of the others; nothing falls back to
another device in silence. Imports no torch: that comes with the plugin, when it is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from tokenry.backend.contract import CONTRACT, ENTRY_POINTS, Caps, DeviceRef, Hooks
from tokenry.backend.simulators import SIMULATORS, open_simulator
from tokenry.errors import BackendError, ConfigError, NoBackend, TokenryError

if TYPE_CHECKING:
    from tokenry.backend.base import Backend

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One row of the table: what came of an entry point.

    state    usable: `device` has a score above 0; unusable: hardware or driver is missing; broken:
             the plugin raised or is no plugin; absent: not installed.
    reason   what `tokenry devices` says about it.
    """

    backend: str
    version: str | None
    state: Literal["usable", "unusable", "broken", "absent", "simulator"]
    reason: str
    device: DeviceRef | None = None
    mend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBackend:
    """A backend of this project: its device nodes (globs) and how it is installed."""

    name: str
    distribution: str
    install: str
    nodes: tuple[str, ...] = field(default=())


def discover(only: str | None = None) -> list[Probe]:
    """Probe every installed backend, each on its own; `only` loads that entry point alone."""
    return [_probe(entry) for entry in _entries(only)]


def check_installed(wanted: str | None) -> None:
    """What is known without importing or probing anything, for a front to ask before it starts.

    Raises ConfigError for a backend that nobody knows, NoBackend where `wanted`, or any, is not
    installed, or torch is not.
    """
    installed = [entry.name for entry in _entries(None)]
    if wanted is not None and wanted not in (*installed, *SIMULATORS):
        known = {backend.name: backend.install for backend in known_backends()}
        if wanted in known:
            raise NoBackend(f"the backend {wanted!r} is not installed.", mend=known[wanted])
        names = [*installed, *SIMULATORS, *known]
        raise ConfigError(
            f"There is no backend {wanted!r}; installed: {', '.join(installed) or 'none'}; "
            f"known: {', '.join(known)}; simulators: {', '.join(SIMULATORS)}.",
            mend=f"--backend {(get_close_matches(wanted, names, n=1) or names)[0]}",
        )
    if wanted is None and not installed:
        what = "No backend is installed (`tokenry devices` lists all)."
    elif find_spec("torch") is None:
        what = "torch is not installed; each backend brings it along."
    else:
        return
    cpu = next(backend for backend in known_backends() if backend.name == "cpu")
    raise NoBackend(what, mend=cpu.install)


def choose(
    probes: Sequence[Probe],
    wanted: str | None,
    *,
    index: int = 0,
    root: Path = Path("/"),
    compile_only: bool = False,
) -> DeviceRef:
    """The device to open: the one named `wanted`, else the one with the highest score.

    compile_only: where `wanted` is installed but its device is not here, a DeviceRef of score 0
    stands for it: its programs can be compiled, none can run.

    Raises NoBackend, with the table, when none can run, when two are equal, or when only the CPU is
    left although a device node says that an accelerator is here (`wanted="cpu"` says that it is
    meant).
    """
    if wanted is not None and wanted in SIMULATORS:
        return DeviceRef(backend=wanted, index=index, name="simulator", score=0)
    rows = [p for p in probes if wanted is None or p.backend == wanted]
    found = [p.device for p in rows if p.state == "usable" and p.device is not None]
    if not found and compile_only and any(p.state == "unusable" for p in rows) and wanted:
        return DeviceRef(
            backend=wanted, index=index, name="no device", score=0, why="for compiling only"
        )
    if not found:
        what = "no installed backend can" if wanted is None else f"the backend {wanted!r} cannot"
        raise NoBackend(f"{what} run here.\n{table([*rows, *absent(probes, wanted)])}")
    best = max(device.score for device in found)
    top = [device for device in found if device.score == best]
    if len(top) > 1:
        names = ", ".join(device.backend for device in top)
        raise NoBackend(
            f"{names} are equally good (score {best}).", mend=f"--backend {top[0].backend}"
        )
    if wanted is None and best == 1:
        _refuse_quiet_cpu(probes, root)
    return replace(top[0], index=index)


def _refuse_quiet_cpu(probes: Sequence[Probe], root: Path) -> None:
    for known in known_backends():
        nodes = [str(path) for glob in known.nodes for path in root.glob(glob.lstrip("/"))]
        if not nodes:
            continue
        installed = any(p.backend == known.name for p in probes)
        raise NoBackend(
            f"only the CPU could be used, although {min(nodes)} is here.\n"
            + table([*probes, *absent(probes)]),
            mend=("see the reason above" if installed else known.install)
            + ", or --backend cpu to mean the CPU",
        )


def absent(probes: Iterable[Probe], wanted: str | None = None) -> list[Probe]:
    """Rows for the project's backends that are not installed (only `wanted`, if named)."""
    installed = {p.backend for p in probes}
    return [
        Probe(
            backend=known.name,
            version=None,
            state="absent",
            reason="not installed",
            mend=known.install,
        )
        for known in known_backends()
        if known.name not in installed and wanted in (None, known.name)
    ]


def simulators() -> list[Probe]:
    """Rows of the core's simulators, for `tokenry devices --all`."""
    return [
        Probe(backend=name, version=None, state="simulator", reason=text)
        for name, text in SIMULATORS.items()
    ]


def table(probes: Sequence[Probe]) -> str:
    """One line per row: backend, version, score or reason, mend."""
    rows = [(p.backend, p.version or "–", _state_text(p), p.mend) for p in probes]
    widths = [max((len(str(row[i])) for row in rows), default=0) for i in (0, 1)]
    widths.append(max((len(row[2]) for row in rows if row[3]), default=0))
    lines = []
    for backend, version, text, mend in rows:
        line = f"  {backend:<{widths[0]}}  {version:<{widths[1]}}  "
        line += text if mend is None else f"{text:<{widths[2]}}  mend: {mend}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _state_text(probe: Probe) -> str:
    if probe.state == "usable" and probe.device is not None:
        return f"score {probe.device.score}: {probe.device.name}" + (
            f" ({probe.reason})" if probe.reason else ""
        )
    prefix = {"unusable": "no: ", "broken": "broken: "}.get(probe.state, "")
    return prefix + probe.reason


def open_backend(device: DeviceRef, options: Mapping[str, str]) -> Backend:
    """Open the device with its plugin, and check what the plugin gave.

    Raises BackendError when the plugin fails, gives no Backend or was made for another contract;
    ConfigError for an option that the plugin did not even look at.
    """
    watched = _WatchedOptions(options)
    if device.backend in SIMULATORS:
        backend: Any = open_simulator(device, watched)
    else:
        backend = _open_plugin(device, watched)
    unread = sorted(set(options) - watched.read)
    if unread:
        raise ConfigError(
            f"The {device.backend} backend does not know the option {', '.join(unread)}.",
            mend="leave it out of --backend-option",
        )
    return _checked(device, backend)


def _open_plugin(device: DeviceRef, options: Mapping[str, str]) -> Any:
    entries = list(_entries(device.backend))
    if not entries:
        raise BackendError(f"No installed distribution provides the backend {device.backend!r}.")
    try:
        manager = _manager(entries[0])
        return manager.hook.tokenry_open(device=device, options=options, contract=CONTRACT)
    except TokenryError:
        raise
    except Exception as error:
        raise BackendError(
            f"The {device.backend} backend could not open {device.name}: {_describe(error)}."
        ) from error


def _checked(device: DeviceRef, backend: Any) -> Backend:
    """The version rule (see contract.py), and that a Backend with Caps came."""
    from tokenry.backend.base import Backend

    name = device.backend
    if not isinstance(backend, Backend):
        got = "nothing" if backend is None else f"a {type(backend).__name__}"
        raise BackendError(f"tokenry_open of the {name} backend gave {got}, not a Backend.")
    if not isinstance(backend.caps, Caps):
        raise BackendError(f"The {name} backend has no Caps but a {type(backend.caps).__name__}.")
    major, minor = backend.caps.contract
    if major > CONTRACT[0]:
        raise BackendError(
            f"The {name} backend needs contract {major}.{minor}, "
            f"this is {CONTRACT[0]}.{CONTRACT[1]}.",
            mend="upgrade tokenry",
        )
    if major < CONTRACT[0] - 1:
        raise BackendError(
            f"The {name} backend was made for contract {major}.{minor}, too old for "
            f"{CONTRACT[0]}.{CONTRACT[1]}.",
            mend=f"upgrade the {name} backend",
        )
    if (major, minor) > CONTRACT:
        log.warning(
            "The %s backend was tested with contract %d.%d, newer than this %d.%d.",
            name, major, minor, *CONTRACT,
        )  # fmt: skip
    _refuse_unserved(name, backend.caps)
    return backend


def _refuse_unserved(name: str, caps: Caps) -> None:
    """Raises BackendError for what the contract can say and this core cannot do: a field that is
    not looked at would give wrong answers.
    """
    if caps.sampling == "tokens":
        raise BackendError(
            f"The programs of the {name} backend give token ids (Caps.sampling is 'tokens'); this "
            "core draws from logits.",
            mend=f"a {name} backend that gives logits",
        )
    if "auto" not in caps.kv_dtypes:
        raise BackendError(
            f"The {name} backend holds KV as {', '.join(caps.kv_dtypes)} only; this core keeps it "
            "in the model's dtype ('auto' in Caps.kv_dtypes)."
        )
    for field_name in ("dtypes", "block_sizes"):
        if not getattr(caps, field_name):
            raise BackendError(f"The {name} backend has no Caps.{field_name}.")


class _WatchedOptions(dict[str, str]):
    """Options that remember which of them were looked at, so that none is ignored in silence."""

    def __init__(self, options: Mapping[str, str]) -> None:
        super().__init__(options)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> str:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:
        self.read.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self.read.update(super().keys())
        return super().keys()

    def items(self) -> Any:
        self.read.update(super().keys())
        return super().items()


def known_backends() -> tuple[KnownBackend, ...]:
    """The project's own backends, from known_backends.toml."""
    import tomllib  # seldom needed: each start would pay for it

    text = resources.files("tokenry.backend").joinpath("known_backends.toml").read_text("utf-8")
    return tuple(
        KnownBackend(
            name=name,
            distribution=facts["distribution"],
            install=facts["install"],
            nodes=tuple(facts["nodes"]),
        )
        for name, facts in tomllib.loads(text).items()
    )


def _entries(only: str | None) -> Iterator[EntryPoint]:
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        if only is None or entry.name == only:
            yield entry


def _manager(entry: EntryPoint) -> pluggy.PluginManager:
    """A manager with this one plugin; raises for misspelt hooks and for a plugin without both
    hooks.
    """
    manager = pluggy.PluginManager("tokenry")
    manager.add_hookspecs(Hooks)
    manager.register(entry.load())
    manager.check_pending()
    for hook in (manager.hook.tokenry_probe, manager.hook.tokenry_open):
        if not hook.get_hookimpls():
            raise BackendError(f"{entry.value} does not implement {hook.name}")
    return manager


def _probe(entry: EntryPoint) -> Probe:
    version = entry.dist.version if entry.dist is not None else None

    def row(state: Any, reason: str, device: DeviceRef | None = None) -> Probe:
        return Probe(backend=entry.name, version=version, state=state, reason=reason, device=device)

    try:
        found = _manager(entry).hook.tokenry_probe()
    except (Exception, SystemExit) as error:  # whatever a foreign plugin does, the others go on
        return row("broken", _describe(error))
    if not found:
        return row("unusable", "its device is not here")
    device = found[0]
    if not isinstance(device, DeviceRef):
        return row("broken", f"tokenry_probe gave a {type(device).__name__}, not a DeviceRef")
    if device.backend != entry.name:
        return row("broken", f"its entry point is {entry.name!r}, its device {device.backend!r}")
    if device.score <= 0:
        return row("unusable", device.why or "score 0, without a reason", device)
    return row("usable", device.why, device)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
