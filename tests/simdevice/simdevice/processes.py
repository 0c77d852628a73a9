"""Fresh processes with the device present, for tests.

In: a device's name and a script. Out: its output and what it reported. The device comes in the way
a vendor's package does: folders on PYTHONPATH whose `torch.backends` entry point torch loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from simdevice.build import build_folder, library

ROOT = Path(__file__).parents[1]
STAND_INS = {"hpu": ROOT / "habana", "neuron": ROOT / "neuron", "cuda": ROOT / "nvidia"}
ANY_NAME = """[torch.backends]
device_backend = simdevice.anyname:load

[torch_dynamo_backends]
{name} = simdevice.anyname:compile_program
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished script; `value` is what it gave to `simdevice.report`, or None."""

    returncode: int
    stdout: str
    stderr: str
    value: object


def folders(name: str) -> list[str]:
    """What has to be on the path: this package and the device's stand-in."""
    if not name.isidentifier():
        raise ValueError(f"a device name is an identifier, not {name!r}")
    return [str(ROOT), str(STAND_INS.get(name) or _named_package(name))]


def _named_package(name: str) -> Path:
    """The metadata of a device without a stand-in: its entry points under this name."""
    folder = build_folder() / f"device-{name}"
    metadata = folder / f"simdevice_{name}-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    for file, text in {
        "METADATA": f"Metadata-Version: 2.1\nName: simdevice-{name}\nVersion: 1.0\n",
        "entry_points.txt": ANY_NAME.format(name=name),
    }.items():
        partial = metadata / f"{file}.{os.getpid()}"
        partial.write_text(text)
        partial.replace(metadata / file)
    return folder


def environment(
    name: str, *, memory: int = 2 << 30, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment in which any Python has the device (and so have its children)."""
    given = {**os.environ, **(env or {})}
    paths = [*folders(name), *filter(None, given.get("PYTHONPATH", "").split(os.pathsep))]
    return given | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "SIMDEVICE_NAME": name,
        "SIMDEVICE_MEMORY": str(memory),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
    }


def run_on_device(
    name: str,
    script: str,
    *,
    memory: int = 2 << 30,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    timeout_s: float = 120,
    check: bool = True,
) -> Run:
    """Runs `script` in a fresh Python with the device present.

    Raises AssertionError with the output when the script fails and `check` holds.
    """
    library()  # not within the script's time
    with tempfile.TemporaryDirectory() as folder:
        report_path = Path(folder, "report.json")
        script_path = Path(folder, "script.py")
        script_path.write_text(script)
        done = subprocess.run(
            [sys.executable, str(script_path), *args],
            env=environment(name, memory=memory, env=env) | {"SIMDEVICE_REPORT": str(report_path)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        value = json.loads(report_path.read_text()) if report_path.exists() else None
    if check and done.returncode != 0:
        raise AssertionError(
            f"the script on {name} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return Run(done.returncode, done.stdout, done.stderr, value)


def report(value: object) -> None:
    """Hands a JSON-able value to the test that started this script."""
    Path(os.environ["SIMDEVICE_REPORT"]).write_text(json.dumps(value))
