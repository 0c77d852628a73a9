"""What a person meets on a terminal: words instead of tracebacks, and nothing printed too early."""

import os
import subprocess
import sys

import pytest

SMALL = ["--backend", "cpu", "--max-model-len", "64", "--num-kv-blocks", "32", "--quiet"]


def run(*args, environ=None, **more):
    command = [sys.executable, "-m", "tokenry", *args]
    options = {"capture_output": True, "text": True, "timeout": 60, **more}
    return subprocess.run(command, check=False, env={**os.environ, **(environ or {})}, **options)


def test_generate_takes_its_model_from_the_environment():
    done = run("generate", "Once", *SMALL, "--max-tokens", "2", environ={"TOKENRY_MODEL": "demo"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once")


def test_generate_without_any_model_says_so():
    done = run("generate", "Once")
    assert done.returncode == 2
    assert "No model is named" in done.stderr
    assert "TOKENRY_MODEL" in done.stderr


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_answer_that_cannot_fit_is_refused_before_anything_is_printed(command):
    rest = ["Once", "The wolf"] if command == "generate" else []
    done = run(command, "demo", *rest, *SMALL, "--max-tokens", "99999", input="hello\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "maximum context length is 64 tokens" in done.stderr


def test_prompt_that_cannot_fit_is_refused_before_anything_is_printed():
    done = run("generate", "demo", "Once", "the wolf " * 99, *SMALL)
    assert (done.returncode, done.stdout) == (1, "")
    assert "maximum context length is 64 tokens" in done.stderr


@pytest.mark.parametrize("args", [["devices"], ["generate", "demo", "Once", *SMALL]], ids=str)
def test_full_disk_is_one_line(args):
    with open("/dev/full", "w") as full:  # noqa: PTH123  # a device
        done = run(*args, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_unknown_flag_names_the_nearest_and_the_commands_usage():
    done = run("serve", "demo", "--max-model-length", "5")
    assert done.returncode == 2
    assert "usage: tokenry serve" in done.stderr
    assert "--max-model-length" in done.stderr
    assert "did you mean --max-model-len?" in done.stderr
    done = run("bench", "latency", "--roonds=3")
    assert done.returncode == 2
    assert "usage: tokenry bench latency" in done.stderr
    assert "did you mean --rounds?" in done.stderr


def test_several_names_may_follow_one_flag():
    done = run("serve", "demo", "--served-model-name", "a", "b", "--port", "80x")
    assert done.stderr.strip() == "ConfigError: --port: '80x' is not a whole number."
    done = run("serve", "--served-model-name", "a", "demo")
    assert "No model is named" in done.stderr
    assert "before --served-model-name" in done.stderr


def test_chat_here_knows_its_words_and_ends_with_quit():
    lines = "/help\nhello\n/new\n/quit\nnever\n"
    done = run("chat", "demo", *SMALL, "--max-tokens", "3", input=lines)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("/quit") == 1
    assert len(done.stdout.splitlines()) == 1


def test_chat_with_a_server_takes_no_options_of_an_engine():
    done = run("chat", "--url", "http://127.0.0.1:9", "--backend", "cpu", input="hello\n")
    assert done.returncode == 2
    assert "--backend" in done.stderr
    assert "--url" in done.stderr
