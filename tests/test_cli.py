"""The command line: quick help, one cause per error, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import tokenry
from tokenry.cli import main


def run(*args, **more):
    command = [sys.executable, "-m", "tokenry", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)


@pytest.mark.parametrize("args", [["--help"], ["serve", "--help"], ["chat", "--help"]], ids=str)
def test_help_imports_nothing_heavy(args):
    script = (
        "import sys; from tokenry.cli import main\n"
        f"try: main({args!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'starlette', 'tokenizers', 'zmq'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: tokenry" in done.stdout


def test_version():
    assert run("version").stdout.strip() == tokenry.__version__


def test_no_command_prints_help_and_is_an_error(capsys):
    assert main([]) == 2
    assert "serve" in capsys.readouterr().out


def test_devices_lists_the_cpu_and_with_all_the_simulators(capsys):
    assert main(["devices"]) == 0
    assert "cpu" in capsys.readouterr().out
    assert main(["devices", "--all"]) == 0
    assert "sim-" in capsys.readouterr().out


def test_wrong_value_is_one_cause_without_traceback():
    done = run("serve", "demo", "--port", "eighty")
    assert done.returncode == 2
    assert done.stderr.strip() == "ConfigError: --port: 'eighty' is not a whole number."


def test_unknown_key_of_the_config_file_is_named(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("model: demo\nprot: 8000\n")
    done = run("serve", "--config", str(file))
    assert done.returncode == 2
    assert "unknown key 'prot'" in done.stderr
    assert "'port'" in done.stderr


@pytest.mark.parametrize("command", ["serve", "generate", "compile", "bench"])
def test_unknown_backend_is_refused_before_anything_starts(command):
    rest = {"generate": ["demo", "hi"], "bench": ["throughput", "demo"]}.get(command, ["demo"])
    done = run(command, *rest, "--backend", "nope")
    assert done.returncode == 2
    assert "There is no backend 'nope'" in done.stderr
    assert "cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert "starting the engine process" not in done.stderr


def test_a_device_that_the_backend_does_not_have_is_refused():
    done = run("generate", "demo", "hi", "--backend", "cpu", "--device-index", "4")
    assert done.returncode == 2
    assert "one device" in done.stderr
    assert "--device-index 0" in done.stderr


def test_serve_without_a_model_says_so():
    done = run("serve")
    assert done.returncode == 2
    assert "model" in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_without_a_server_says_how_to_start_one():
    done = run("chat", "--url", "http://127.0.0.1:9", input="hello\n")
    assert done.returncode == 1
    assert "No server answers at http://127.0.0.1:9" in done.stderr
    assert "tokenry serve" in done.stderr


def test_chat_streams_from_a_server(tmp_path):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Canned(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if self.headers["authorization"] == "Bearer wrong":
                self.send_response(401)
                self.end_headers()
                self.wfile.write(b'{"error":{"message":"The key is wrong."}}')
                return
            self.send_response(200)
            self.end_headers()
            for text in ("Once ", "upon"):
                self.wfile.write(
                    b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % text.encode()
                )
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *args):
            pass

    bodies = []
    server = HTTPServer(("127.0.0.1", 0), Canned)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    done = run("chat", "--url", url, input="hello\n")
    assert (done.returncode, done.stdout) == (0, "Once upon\n")
    done = run("chat", "--url", url, "tales", input="hello\n")
    assert (done.returncode, done.stdout) == (0, "Once upon\n")
    assert [body.get("model") for body in bodies] == [None, "tales"]
    done = run("chat", "--url", url, "--api-key", "wrong", input="hello\n")
    server.shutdown()
    assert done.returncode == 1
    assert "The key is wrong." in done.stderr
    assert "--api-key" in done.stderr


def test_compile_makes_the_programs_of_a_device(capsys):
    flags = ["--max-num-seqs=1", "--max-num-batched-tokens=32", "--max-model-len=32"]
    assert main(["compile", "demo", "--backend=sim-neuron", "--dtype=float32", *flags]) == 0
    said = capsys.readouterr().out
    assert "programs of LlamaForCausalLM (float32) for sim-neuron" in said


def test_compile_refuses_a_backend_that_keeps_no_programs(capsys):
    assert main(["compile", "demo", "--backend=cpu"]) == 2
    assert "does not compile ahead of time" in capsys.readouterr().err
