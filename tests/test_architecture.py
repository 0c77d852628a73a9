"""The laws of the house and the arrows between its rooms, read from the code and compared with
core/README.md.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "tokenry"
VENDORS = re.compile(r"\b(cuda|rocm|hpu|habana|neuron|triton|xla|gaudi|trainium)\b", re.IGNORECASE)
SIMULATED = re.compile(r"\bsim-[a-z]+\b")


def generator():
    """docs/generate.py, which reads the arrows from the code."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arrows():
    return {(a, b) for a, targets in generator().arrows().items() for b in targets}


def drawn_arrows():
    """The table "Import arrows" of core/README.md."""
    text = (ROOT / "core" / "README.md").read_text()
    table = text.split("## Import arrows")[1].split("\n## ")[0]
    found = set()
    for line in table.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if len(cells) == 2 and re.fullmatch(r"[a-z_]+", cells[0]) and cells[0] != "room":
            found |= {(cells[0], to) for to in re.findall(r"[a-z_]+", cells[1])}
    return found


def test_the_map_shows_the_arrows_that_the_code_has(arrows):
    drawn = drawn_arrows()
    assert arrows == drawn, f"not drawn: {arrows - drawn}; drawn only: {drawn - arrows}"


def test_no_room_imports_itself_by_way_of_others(arrows):
    reached = {a: {b for x, b in arrows if x == a} for a, _ in arrows}
    for _ in reached:
        for targets in reached.values():
            targets |= {c for b in targets for c in reached.get(b, ())}
    assert not [room for room, targets in reached.items() if room in targets]


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("engine", {"errors", "messages", "params", "plan", "pooling", "structured"}),
        ("runner", {"backend", "errors", "models", "params", "plan", "pooling"}),
        ("models", {"backend", "errors", "pooling"}),
        ("backend", {"errors"}),
        ("text", {"errors", "messages", "outputs", "params", "plan", "pooling", "structured"}),
    ],
)
def test_rooms_know_only_what_they_may(arrows, room, allowed):
    assert {b for a, b in arrows if a == room} <= allowed


def test_fronts_reach_the_engine_only_through_assemble(arrows):
    fronts = {"api", "async_engine", "cli", "llm", "bench"}
    assert not {(a, b) for a, b in arrows if a in fronts and b in {"engine", "runner", "models"}}
    assert {a for a, b in arrows if b == "conformance"} <= {"cli"}


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda p: str(p.relative_to(CORE)))
def test_the_core_names_no_vendor(path):
    assert not VENDORS.findall(SIMULATED.sub("", path.read_text()))


@pytest.mark.parametrize(
    "module",
    [
        "tokenry", "tokenry.cli", "tokenry.engine.core", "tokenry.text.outputs", "tokenry.api.app",
        "tokenry.async_engine", "tokenry.backend.contract", "tokenry.backend.discovery",
        "tokenry.hub",
    ],
)  # fmt: skip
def test_rooms_above_the_wall_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_answers_help_without_the_heavy_libraries():
    code = (
        "import sys\nfrom tokenry.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "names = {'torch', 'numpy', 'transformers', 'starlette', 'zmq', 'tokenizers'}\n"
        "heavy = names & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_the_environment_is_read_in_one_place():
    readers = {
        str(path.relative_to(CORE))
        for path in CORE.rglob("*.py")
        if re.search(r"os\.environ|os\.getenv", path.read_text())
    }
    # a child process inherits its parent's environment: handing it on is not reading it
    # the conformance kit compares it before and after a plugin ran, and heeds no variable
    allowed = {"config/load.py", "async_engine.py", "bench/cli.py", "conformance/child.py"}
    assert readers <= allowed


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda p: str(p.relative_to(CORE)))
def test_files_stay_readable(path):
    """The guide's 400 lines, without exception: what grows beyond is two things."""
    assert len(path.read_text().splitlines()) <= 400
