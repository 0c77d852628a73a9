"""What runs in a process of its own, so that nothing which another check loaded hides a finding.

In: JSON in argv (sys.path, what to do, backend, options). Out: one line of JSON with what changed
by probing, or by opening and running the backend. Imports nothing at the top that a probe may not.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

START = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path');"
    "from tokenry.conformance.child import main; main(given)"
)
MARK = "conformance: "
HEAVY = ("torch", "jax", "tensorflow")
Namespace = dict[tuple[str, str], object]


def environment_now() -> dict[str, str]:
    """A copy, taken before the backend was first met."""
    return dict(os.environ)


def in_child(
    what: str,
    backend: str,
    options: Mapping[str, str],
    *,
    environment: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    """Run `what` ("probe" or "run") in a fresh interpreter; what it found.

    Raises RuntimeError with the end of its output if it failed.
    """
    given = {"path": sys.path, "what": what, "backend": backend, "options": dict(options), **more}
    done = subprocess.run(
        [sys.executable, "-c", START, json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(environment),
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    raise RuntimeError(f"the process ended with {done.returncode}: {done.stderr[-600:].strip()}")


def main(given: dict[str, Any]) -> None:
    """In the child: do it, and print what was found."""
    found = probed(given) if given["what"] == "probe" else ran(given)
    print(MARK + json.dumps(found), flush=True)


def probed(given: dict[str, Any]) -> dict[str, Any]:
    """Probe twice. heavy: libraries that were loaded by it."""
    from tokenry.backend.discovery import discover

    loaded, environment, argv = set(sys.modules), dict(os.environ), list(sys.argv)
    rows = [discover(given["backend"]) for _ in range(2)]
    heavy = sorted(name for name in HEAVY if name in sys.modules and name not in loaded)
    return {
        "heavy": heavy,
        "environment": changed_variables(environment),
        "argv": sys.argv != argv,
        "rows": [[str(row.device), row.state, row.reason] for turn in rows for row in turn],
    }


def ran(given: dict[str, Any]) -> dict[str, Any]:
    """Open the backend and run a tiny model on it. patched: what of torch or the core is other
    than before; said: what was logged meanwhile.
    """
    from pathlib import Path

    import torch

    from tokenry.conformance.kit import Kit
    from tokenry.conformance.scenes import Work
    from tokenry.conformance.stepping import Stepper, texts_of

    if given.get("compiler"):  # torch's compiler changes torch itself when it is first used
        torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
    heard = Heard()
    logging.getLogger().addHandler(heard)
    logging.getLogger().setLevel(logging.INFO)
    logging.captureWarnings(True)
    before, switches = namespace(), switches_of(torch)
    environment, argv = dict(os.environ), list(sys.argv)
    kit = Kit(given["backend"], options=given["options"], directory=Path(given["scratch"]), steps=0)
    stepper = Stepper(kit, texts_of(2, 40))
    for works in ([Work(0, 0, 20)], [Work(1, 0, 9)], [Work(0, 20, 1), Work(1, 9, 1)]):
        for packed in stepper.scene.launches(works):
            stepper.run(packed)
    stepper.backend.synchronize()
    stepper.backend.memory()
    after = switches_of(torch)
    return {
        "patched": sorted(patched(before, namespace())),
        "switches": [f"{n}: {switches[n]} -> {after[n]}" for n in after if after[n] != switches[n]],
        "environment": changed_variables(environment),
        "argv": sys.argv != argv,
        "said": heard.texts,
        "compiler": "torch._dynamo" in sys.modules,
    }


class Heard(logging.Handler):
    """Remembers what was logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.texts.append(record.getMessage())


def changed_variables(before: Mapping[str, str]) -> dict[str, str]:
    """Variable -> set, changed or removed."""
    now = dict(os.environ)
    found = dict.fromkeys(now.keys() - before.keys(), "set")
    found |= dict.fromkeys(before.keys() - now.keys(), "removed")
    found |= {n: "changed" for n in now.keys() & before.keys() if now[n] != before[n]}
    return found


def switches_of(torch: ModuleType) -> dict[str, str]:
    """Settings of torch that hold for the whole process."""
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": str(torch.is_grad_enabled()),
        "inference mode": str(torch.is_inference_mode_enabled()),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
    }


def namespace() -> Namespace:
    """(module or class, name) -> function or class, of all loaded public modules of torch and all
    of the core's.
    """
    found: Namespace = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or not _watched(name):
            continue
        for attribute, value in list(vars(module).items()):
            if not _kept(value) or isinstance(value, ModuleType):
                continue
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                found.update(_members(f"{name}.{attribute}", value))
    return found


def _members(name: str, cls: type) -> Iterator[tuple[tuple[str, str], object]]:
    for attribute, value in list(vars(cls).items()):
        if _kept(value) or isinstance(value, (property, staticmethod, classmethod)):
            yield (name, attribute), value


def _kept(value: object) -> bool:
    return callable(value) or isinstance(value, FunctionType)


def _watched(name: str) -> bool:
    top, *rest = name.split(".")
    return top == "tokenry" or (top == "torch" and not any(p.startswith("_") for p in rest))


def patched(before: Namespace, after: Namespace) -> Iterator[str]:
    """What was replaced or removed, and what the core got that it did not have."""
    for (owner, name), value in before.items():
        if (owner, name) not in after:
            yield f"{owner}.{name} removed"
        elif after[owner, name] is not value:
            yield f"{owner}.{name} replaced"
    owners = {owner for owner, _ in before}
    for owner, name in after.keys() - before.keys():
        if owner in owners and owner.split(".")[0] == "tokenry" and not name.startswith("__"):
            yield f"{owner}.{name} added"
