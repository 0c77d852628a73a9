"""docs/server.md names every route, and its examples run against a server."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tokenry.api.app import ENDPOINTS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "server.md").read_text()
EXAMPLES = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.S)


def test_every_route_is_in_the_table():
    named = set(re.findall(r"`(GET|POST|DELETE) (/[^`]*)`", TEXT))
    served = {(e.verb, re.sub(r":\w+}", "}", e.path)) for e in ENDPOINTS}
    assert named == served


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    command = ["-m", "tokenry", "serve", "demo", "--backend", "cpu", "--port", "0"]
    command += ["--kv-cache-bytes", "64MiB", "--data-dir", str(tmp_path_factory.mktemp("data"))]
    server = start_server(command).wait_ready()
    yield server
    assert server.close() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code"), EXAMPLES, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(EXAMPLES)]
)
def test_the_examples_run(server, tmp_path, kind, code):
    for module in re.findall(r"^(?:import|from) (\w+)", code, re.M):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    code = code.replace("http://127.0.0.1:8000", server.url)
    if kind == "bash":
        code = code.replace("tokenry ", f"{sys.executable} -m tokenry ")
        code = code.replace("--model demo", "--model demo --backend cpu --kv-cache-bytes 64MiB")
        command = ["bash", "-eo", "pipefail", "-c", code]
    else:
        command = [sys.executable, "-c", code]
    online = os.environ | {"HF_HUB_OFFLINE": "0"}  # its client asks nobody else, not even us
    done = subprocess.run(
        command, cwd=tmp_path, env=online, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "run-batch" in code
    assert '"error":{' not in done.stdout.replace('"error": {', '"error":{')
