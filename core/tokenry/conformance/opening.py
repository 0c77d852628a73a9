"""Checks of a backend's front door: probe, open, Caps, and that nothing of others is touched."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pluggy
import torch

from tokenry.backend.base import Backend, GroupSpec
from tokenry.backend.contract import (
    CONTRACT,
    ENTRY_POINTS,
    Caps,
    DeviceRef,
    Hooks,
    KVSpec,
    PhaseRules,
    ShapeRules,
)
from tokenry.backend.discovery import open_backend
from tokenry.conformance.check import Case, Check, attempt, check
from tokenry.conformance.child import in_child
from tokenry.conformance.kit import Kit
from tokenry.conformance.memory import touch
from tokenry.errors import TokenryError

DTYPES = ("float32", "float16", "bfloat16")
CACHE = "_CACHE_DIR"
"""Where torch's compiler keeps what it made; it sets such variables itself."""


@check("C01.probe", "tokenry_probe states facts: no torch, no environment written, the same twice.")
def probe(kit: Kit) -> Iterator[Case]:
    """In a fresh process: discovery probes the entry point twice. torch (or another framework) is
    not loaded by it, environment and argv are as before, both rows are the same and usable.
    """
    if kit.simulated:
        yield Case("a simulator has no entry point")
        return
    found = in_child("probe", kit.name, {}, environment=kit.environment)
    heavy = ", ".join(found["heavy"])
    yield Case("libraries", f"it loaded {heavy}" if heavy else None)
    changes = ", ".join(f"{name} {how}" for name, how in found["environment"].items())
    yield Case("environment", f"it wrote {changes}" if changes else None)
    yield Case("argv", "it changed sys.argv" if found["argv"] else None)
    first, *rest = found["rows"]
    yield Case("twice", None if rest == [first] else f"first {first}, then {rest}")
    yield Case("state", None if first[1] == "usable" else f"{first[1]}: {first[2]}")


@check(
    "C01.patch", "Opening and running a backend changes nothing of torch, the core, or the process."
)
def patch(kit: Kit) -> Iterator[Case]:
    """In a fresh process: every function and class of the core and of torch's public modules,
    torch's process-wide settings, argv and the environment, before and after the backend was
    opened and a tiny model ran on it. New names in torch are no finding (a device registers
    itself); a new variable is none if the log names it.
    """
    found = _ran(kit)
    if found["patched"] and found["compiler"]:
        found = _ran(kit, compiler=True)  # what that does is not the backend's doing
    for name in ("patched", "switches"):
        texts = found[name]
        more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
        yield Case(name, f"{', '.join(texts[:8])}{more}" if texts else None)
    silent = [
        f"{name} {how}"
        for name, how in found["environment"].items()
        if not name.endswith(CACHE)
        and not (how == "set" and any(name in text for text in found["said"]))
    ]
    yield Case("environment", f"without a word: {', '.join(silent)}" if silent else None)
    yield Case("argv", "sys.argv was changed" if found["argv"] else None)


def _ran(kit: Kit, **more: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="conform-") as scratch:
        return in_child(
            "run", kit.name, kit.options, environment=kit.environment, scratch=scratch, **more
        )


@check("C02.open", "What cannot be opened is refused: an unknown option, another plugin's device.")
def refused(kit: Kit) -> Iterator[Case]:
    """An option that no backend has: an error of tokenry that names it. A device of another name:
    None. Two openings: two backends.
    """

    def option() -> str | None:
        try:
            open_backend(kit.device, {**kit.options, "no_such_option": "1"})
        except TokenryError as error:
            named = "no_such_option" in str(error)
            return None if named else f"refused without naming it: {error.message}"
        return "opened, with the option no_such_option ignored"

    yield attempt("unknown option", option)
    if not kit.simulated:
        yield attempt("another plugin's device", lambda: _foreign(kit))
    yield attempt(
        "two openings", lambda: None if kit.open() is not kit.open() else "gave one object twice"
    )


def _foreign(kit: Kit) -> str | None:
    entry = next(e for e in entry_points(group=ENTRY_POINTS) if e.name == kit.name)
    manager = pluggy.PluginManager("tokenry")
    manager.add_hookspecs(Hooks)
    manager.register(entry.load())
    device = DeviceRef(backend="somebody-else", index=0, name="not ours", score=1)
    got = manager.hook.tokenry_open(device=device, options={}, contract=CONTRACT)
    return None if got is None else f"it opened somebody else's device as a {type(got).__name__}"


@check("C23.caps", "Caps are whole, consistent, and the same at every opening.")
def caps(kit: Kit) -> Iterator[Case]:
    """Types and known values of every field; sizes above 0, none twice; dtypes that models have;
    `max_decode_q` and `multiple_of` that can be; a second opening gives the same.
    """
    now = kit.caps
    yield Case("the same again", None if kit.open().caps == now else "a second opening has others")
    yield from (_literals(rules, name) for rules, name in (
        (now, "Caps"), (now.shapes, "ShapeRules"), (now.phases, "PhaseRules")
    ))  # fmt: skip
    lists = {"dtypes": now.dtypes, "block_sizes": now.block_sizes, "kv_dtypes": now.kv_dtypes}
    for name, values in lists.items():
        ok = isinstance(values, tuple) and values and len(set(values)) == len(values)
        yield Case(name, None if ok else f"{values!r}: not a tuple of different values")
    unknown = [d for d in now.dtypes if d not in DTYPES]
    yield Case("dtypes are known", f"{unknown}: known are {DTYPES}" if unknown else None)
    sizes = {
        **{f"block_sizes {size}": size for size in now.block_sizes},
        **{f"multiple_of {name}": step for name, step in now.shapes.multiple_of.items()},
        "max_programs": now.shapes.max_programs,
        "max_prefill_seqs": now.phases.max_prefill_seqs or 1,
        "max_decode_q": now.phases.max_decode_q,
        "sample_max_top_k": now.sample_max_top_k or 1,
    }
    low = [f"{n} is {v!r}" for n, v in sizes.items() if type(v) is not int or v < 1]
    yield Case("sizes", f"{', '.join(low)}: whole numbers above 0 are meant" if low else None)
    axes = set(now.shapes.multiple_of) - {"tokens", "seqs", "kv_blocks"}
    yield Case("multiple_of", f"{sorted(axes)}: no such axes" if axes else None)
    yield Case("contract", None if _version(now.contract) else f"{now.contract!r}: not (int, int)")


def _literals(rules: Caps | ShapeRules | PhaseRules, name: str) -> Case:
    hints = get_type_hints(type(rules))
    wrong = []
    for field in fields(rules):
        choices, value = get_args(hints[field.name]), getattr(rules, field.name)
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            wrong.append(f"{field.name} is {value!r}, not one of {', '.join(choices)}")
        if hints[field.name] is bool and type(value) is not bool:
            wrong.append(f"{field.name} is {value!r}, not a bool")
    return Case(f"values of {name}", "; ".join(wrong) or None)


def _version(value: object) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and all(type(part) is int for part in value)  # type: ignore[attr-defined]  # a tuple


@check("C23.dtypes", "Every dtype that is claimed, for models and for KV, can be used.")
def dtypes(kit: Kit) -> Iterator[Case]:
    """For each: a tensor goes to the input device and is computed with; KV is taken and written."""
    backend, now = kit.open(), kit.caps
    for dtype in now.dtypes:
        yield attempt(f"a tensor of {dtype}", _computes, backend, dtype)
    kinds = [d for d in now.kv_dtypes if d != "auto"]
    for dtype in (*now.dtypes, *kinds):
        for size in now.block_sizes:
            spec = KVSpec(num_layers=1, num_kv_heads=2, head_dim=32, block_size=size, dtype=dtype)
            yield attempt(f"KV of {dtype}, blocks of {size}", _writes, kit, spec)


def _computes(backend: Backend, dtype: str) -> str | None:
    tensor = torch.arange(6, dtype=torch.float32).to(getattr(torch, dtype))
    got = backend.fetch([(tensor.to(backend.caps.input_device) * 2).float()])()[0]
    return None if got.tolist() == [0, 2, 4, 6, 8, 10] else f"2 * [0..5] is {got.tolist()}"


def _writes(kit: Kit, spec: KVSpec) -> str | None:
    kv = kit.open().alloc_kv(spec, 6)
    touch(kv, 1.0)
    return None if len(kv) == 1 else f"alloc_kv gave {len(kv)} layers, not 1"


def has_collectives(caps: Caps) -> str | None:
    """Asked where groups of devices are claimed."""
    return None if caps.dist is not None else "Caps.dist is not set"


@check(
    "C18.collectives",
    "A group of one rank reduces to what it holds.",
    asked=has_collectives,
)
def collectives(kit: Kit) -> Iterator[Case]:
    """communicator() for one rank, then all_reduce. More ranks need more devices."""
    yield attempt("all_reduce of one rank", _alone, kit.open())


def _alone(backend: Backend) -> str | None:
    import torch.distributed as dist

    with tempfile.TemporaryDirectory(prefix="conform-") as scratch:
        method = f"file://{Path(scratch) / 'group'}"
        group = backend.communicator(GroupSpec(ranks=(0,), rank=0, init_method=method))
        try:
            tensor = torch.arange(4.0).to(backend.caps.input_device)
            dist.all_reduce(tensor, group=group)
            got = backend.fetch([tensor])()[0].tolist()
        finally:
            dist.destroy_process_group()
    return None if got == [0, 1, 2, 3] else f"[0, 1, 2, 3] became {got}"


CHECKS: tuple[Check, ...] = (probe, patch, refused, caps, dtypes, collectives)
