"""What several tests install: wheels built from copies of the sources, each once per test session.

Builds in the sources themselves would share setuptools' build folder: two workers of one session
fell over each other's half-made wheel there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
CPU, DEMO = ROOT / "plugins" / "cpu", ROOT / "demo"
TEMPLATE = ROOT / "examples" / "backend_template"
ABOUT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
MADE = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "*.so", "*.o")


def run(*command, **options):
    """The command's output; its own text if it fails."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, python=sys.executable):
    """The output of pip with these arguments."""
    return run(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def wheels(tmp_path_factory, *sources):
    """A new directory with the wheels of the sources: ROOT, CPU, DEMO, TEMPLATE or a folder."""
    out, shared = tmp_path_factory.mktemp("wheels"), tmp_path_factory.getbasetemp()
    if shared.name.startswith("popen-"):  # a worker of pytest-xdist: its session's folder
        shared = shared.parent
    for source in sources:
        name = "core" if source == ROOT else source.name
        made = shared / "wheelhouse" / name
        with FileLock(shared / f"wheelhouse-{name}.lock"):
            if not list(made.glob("*.whl")):
                copy = _copy(source, made.with_name(f"{name}-source"))
                pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", made, copy)
        shutil.copy(next(made.glob("*.whl")), out)
    return out


def link_dependencies(folder):
    """All that is installed here, but for tokenry and its plugins, in a folder of links."""
    folder.mkdir()
    for site in dict.fromkeys(p for p in sys.path if Path(p).name.endswith("-packages")):
        for entry in Path(site).iterdir():
            if not _is_ours(entry.name) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def _is_ours(name):
    return re.match(r"(editable|tokenry|distutils-precedence|pip\b)", name.lstrip("_"))


def _copy(source, copy):
    """The source without what was built from it, but for compiled files (setup.py knows which of
    them still hold); of the repository only what the core needs.
    """
    shutil.rmtree(copy, ignore_errors=True)
    if source != ROOT:
        shutil.copytree(source, copy, ignore=MADE)
        objects = Path("build") / "objects"
        if (source / objects).is_dir():
            shutil.copytree(source / objects, copy / objects)
        return copy
    shutil.copytree(ROOT / "core", copy / "core", ignore=MADE)
    for name in ABOUT:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy)
    return copy
