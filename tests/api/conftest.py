"""A server that really runs, in a process of its own, on a free port."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

TOY = (
    "import sys; from tokenry.api.server import serve; "
    "from tokenry.config import EngineConfig, ServerConfig, load; import json; "
    "given = json.loads(sys.argv[1]); "
    "sys.exit(serve(EngineConfig(model='demo', backend='cpu', max_num_seqs=64), "
    "load(ServerConfig, given), factory='toy_engine:make'))"
)


class Server:
    def __init__(self, command, environ=None):
        path = str(Path(__file__).parent)
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(environ or {})},
        )
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.url = None
        self.listening = threading.Event()
        self.reader.start()
        self.listening.wait(60)
        if self.url is None:
            raise AssertionError("".join(self.lines))
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    def _read(self):
        """All that the server says, so that it never waits for its reader."""
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (\S+),", line):
                self.url = found[1]
                self.listening.set()
        self.listening.set()

    def end(self):
        """End the server; all lines that it said."""
        assert self.close() == 0
        self.reader.join(20)
        return self.lines

    def wait_ready(self):
        for _ in range(600):
            if self.http.get("/readyz").status_code == 200:
                return self
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)
        raise AssertionError("not ready")

    def close(self):
        self.http.close()
        self.process.terminate()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="session")
def start_server():
    def start(command, **environ):
        return Server([sys.executable, *command], environ)

    return start


@pytest.fixture(scope="session")
def start_toy(start_server):
    import json

    def start(options=None, **environ):
        return start_server(["-c", TOY, json.dumps({"port": 0, **(options or {})})], **environ)

    return start


@pytest.fixture(scope="session")
def toy(start_toy):
    """A toy model: errors, transport and life cycle do not depend on weights."""
    server = start_toy(TOY_STEP_S="0.002").wait_ready()
    yield server
    server.close()
