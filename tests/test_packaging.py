"""What a user installs: wheels, built here, in clean environments."""

import subprocess
import venv
import zipfile

import pytest
import wheelhouse
from wheelhouse import CPU, DEMO, ROOT, pip, run

pytestmark = pytest.mark.slow
CONSTRAINTS = str(ROOT / "constraints.txt")

BROKEN = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "broken-backend"
version = "9.9"
[project.entry-points."tokenry.backends"]
broken = "broken_backend"
[tool.setuptools]
py-modules = ["broken_backend"]
""",
    "broken_backend.py": 'raise ImportError("libbroken.so.7 is missing")\n',
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Directory with the wheels of core, CPU backend and demo, and of a broken third-party
    backend.
    """
    broken = tmp_path_factory.mktemp("broken")
    for name, text in BROKEN.items():
        (broken / name).write_text(text)
    return wheelhouse.wheels(tmp_path_factory, ROOT, CPU, DEMO, broken)


@pytest.fixture
def environment(tmp_path, wheels):
    """environment(*requirements) -> bin directory of a clean venv with them, from our wheels."""

    def make(*requirements):
        venv.create(tmp_path / "venv")
        python = tmp_path / "venv" / "bin" / "python"
        # a pip of its own and the bytecode of all of torch would be half of the test's time
        options = ("-q", "--no-compile", "-c", CONSTRAINTS, "-f", wheels)
        pip("--python", python, "install", *options, *requirements)
        return python.parent

    return make


def test_the_core_wheel_is_small_and_holds_no_model(wheels):
    core = next(wheels.glob("tokenry-0*.whl"))
    names = zipfile.ZipFile(core).namelist()
    assert core.stat().st_size < 2**20
    assert not [n for n in names if n.endswith(".safetensors")]
    assert {"tokenry/py.typed", "tokenry/api/page/index.html", "tokenry/api/page/chat.js"} <= set(
        names
    )
    assert "tokenry/backend/known_backends.toml" in names


def test_the_core_alone_runs_its_client_commands_without_torch(environment):
    bin_ = environment("tokenry", "broken-backend")
    assert run(
        bin_ / "python", "-c", "import importlib.util as u; print(u.find_spec('torch'))"
    ) == ("None\n")
    assert "serve" in run(bin_ / "tokenry", "--help")
    table = run(bin_ / "tokenry", "devices")
    assert "libbroken.so.7 is missing" in table
    assert "tokenry[cpu]" in table
    done = subprocess.run(
        [bin_ / "tokenry", "chat", "--url", "http://127.0.0.1:9", "hello"],
        capture_output=True,
        text=True,
        check=False,
        input="Once upon a time\n",
    )
    assert done.returncode == 1
    assert "No server answers at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_cpu_extra_generates_text_beside_a_broken_plugin(environment):
    bin_ = environment("tokenry[cpu,demo]", "broken-backend")
    text = run(
        bin_ / "tokenry", "generate", "demo", "Once upon a time", "--backend", "cpu",
        "--max-model-len", "128",
    )  # fmt: skip
    assert len(text.split()) > 5
