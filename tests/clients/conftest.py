"""Real clients against `tokenry serve demo`. Run by `make test-clients`; the end is a matrix.

A test is named test_cNN_CLIENT_what: NN is the check, CLIENT the library that makes it.
"""

import importlib.util
import re
import signal
import sys
from pathlib import Path

import httpx2
import psutil
import pytest

# The clients are an extra: without a word for this directory nothing here is collected.
if not any("clients" in Path(arg).parts for arg in sys.argv[1:]):
    collect_ignore_glob = ["*test_*.py"]  # in folders below, too

_NAME = re.compile(r"test_c(\d\d)_([a-z]+)_")
_SIGNS = {"passed": "pass", "failed": "FAIL", "skipped": "skip"}
_CELLS: dict = {}
_SUMMARY: list = []
"""What schemathesis says at its end."""


def _server_class():
    path = Path(__file__).parents[1] / "api" / "conftest.py"
    spec = importlib.util.spec_from_file_location("api_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Server


@pytest.fixture(scope="session")
def start_server():
    server_class, running = _server_class(), []

    def start(*options, model="demo"):
        command = [sys.executable, "-m", "tokenry", "serve", model, "--backend", "cpu"]
        command += ["--port", "0", *options]
        command += ["--kv-cache-bytes", "64MiB"] if model == "demo" else []
        core = str(Path(__file__).parents[2] / "core")
        running.append(server_class(command, {"HF_HUB_OFFLINE": "1", "PYTHONPATH": core}))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.close()


@pytest.fixture(scope="session")
def server(start_server, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    return start_server("--data-dir", str(data)).wait_ready()


@pytest.fixture(scope="session")
def url(server):
    return server.url


@pytest.fixture(scope="session")
def kill_engine():
    """Ends a server's engine process as the kernel would for want of memory."""

    def kill(server):
        for child in psutil.Process(server.process.pid).children():
            child.send_signal(signal.SIGKILL)

    return kill


@pytest.fixture
def http(url):
    with httpx2.Client(base_url=url, timeout=120) as client:
        yield client


MESSAGES = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def messages():
    return [dict(message) for message in MESSAGES]


@pytest.fixture(scope="session")
def openai_client(url):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pytest_runtest_logreport(report):
    found = _NAME.search(report.nodeid)
    if found is None or (report.when != "call" and report.passed):
        return
    cell = _CELLS.setdefault((int(found[1]), found[2]), [])
    cell.append(_SIGNS[report.outcome])
    if found[2] == "schemathesis":
        _SUMMARY[:] = re.findall(r"^=+ SUMMARY =+$.*", report.capstdout, re.MULTILINE | re.DOTALL)


def pytest_terminal_summary(terminalreporter):
    if not _CELLS:
        return
    clients = sorted({client for _, client in _CELLS})
    width = max(9, *(len(client) for client in clients)) + 2
    for summary in _SUMMARY:
        terminalreporter.section("schemathesis against /openapi.json")
        for line in summary.splitlines()[1:]:
            terminalreporter.line(line)
    terminalreporter.section("check x client")
    terminalreporter.line("     " + "".join(client.ljust(width) for client in clients))
    for check in sorted({check for check, _ in _CELLS}):
        row = [_cell(_CELLS.get((check, client), [])) for client in clients]
        terminalreporter.line(f"C{check:<4}" + "".join(cell.ljust(width) for cell in row))


def _cell(outcomes):
    if not outcomes:
        return "."
    if "FAIL" in outcomes:
        return "FAIL"
    if "skip" in outcomes:
        return "skip"
    return "pass" if len(outcomes) == 1 else f"pass ({len(outcomes)})"
