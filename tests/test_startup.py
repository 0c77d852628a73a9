"""What a start tells: the same on every front, and never silently another thing."""

import gc
import io
import subprocess
import sys

import pytest

from tokenry import LLM, SamplingParams
from tokenry.messages import Ready
from tokenry.startup import StartLog, collector_paused, describe

READY = Ready(
    max_model_len=100,
    num_blocks=26,
    block_size=16,
    vocab_size=10,
    backend="cpu",
    device_name="a CPU",
    architecture="LlamaForCausalLM",
    dtype="float32",
    ledger={"runtime": 3 * 2**30, "weights": 5 * 2**20, "kv": 7},
    notes=("max_model_len fitted to 100 of the model's 200",),
)


def test_the_description_has_the_ledger_the_room_and_every_note():
    assert describe(READY) == [
        "LlamaForCausalLM in float32 on a CPU (cpu)",
        "memory: runtime 3.0 GiB, weights 5.0 MiB, kv 7 B",
        "context 100 tokens, KV cache for 400 tokens: 4.0 requests of that length at once",
        "note: max_model_len fitted to 100 of the model's 200",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_line_that_changes():
    out = Terminal()
    log = StartLog(out)
    for share in (0.0, 0.25, 0.5, 1.0):
        log("loading weights", share)
    log.say("done")
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().split("\r\x1b[K") == [
        "", "  loading weights ...", "  loading weights ... 25%", "  loading weights ... 50%",
        "  loading weights ...", "done\n",
    ]  # fmt: skip


def test_a_file_gets_few_lines_with_the_share():
    out, now = io.StringIO(), [0.0]
    log = StartLog(out, clock=lambda: now[0])
    for i in range(1000):
        now[0] += 0.02
        log("loading weights", i / 1000)
    log("warming up", 0.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "  loading weights ..."
    assert lines[1:4] == [f"  loading weights ... {p}%" for p in (25, 50, 75)]
    assert lines[4:] == ["  warming up ..."]


def test_a_log_that_is_not_shown_says_nothing():
    out = Terminal()
    log = StartLog(out, shown=False)
    log("loading weights", 0.5)
    log.say("done")
    assert out.getvalue() == ""


FEW = {"backend": "cpu", "num_kv_blocks": 9, "max_num_seqs": 4, "max_num_batched_tokens": 32}
FITTED = "note: max_model_len fitted to 128 of the model's "


def test_the_python_api_tells_on_stderr_and_can_be_quiet(capfd):
    with LLM("demo", **FEW) as llm:
        said = capfd.readouterr()
        assert said.out == ""
        assert "  loading weights ..." in said.err
        assert all(line in said.err.splitlines() for line in describe(llm.ready))
        assert FITTED in said.err
    with LLM("demo", progress=False, **FEW):
        assert capfd.readouterr() == ("", "")


def test_ops_on_the_reference_are_told_with_their_count(capfd):
    with LLM("demo", backend="sim-opaque", max_num_seqs=4, max_num_batched_tokens=32) as llm:
        llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)
    assert "note: ops on the reference (slow, right): act_mul x5" in capfd.readouterr().err


@pytest.mark.parametrize("quiet", [False, True])
def test_the_command_line_tells_on_stderr_and_answers_on_stdout(quiet):
    flags = ["--num-kv-blocks", "9", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
    command = [sys.executable, "-m", "tokenry.cli", "generate", "demo", "Once", "--backend", "cpu"]
    command += ["--max-tokens", "2", *flags] + ["--quiet"] * quiet
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.startswith("Once")
    assert (FITTED in done.stderr) is not quiet
    assert ("memory: runtime " in done.stderr) is not quiet
    assert quiet is (done.stderr == "")


def test_the_collector_runs_again_after_it_was_paused():
    assert gc.isenabled()
    with pytest.raises(ValueError, match="wrong"), collector_paused():
        assert not gc.isenabled()
        raise ValueError("wrong")
    assert gc.isenabled()
    with collector_paused():
        ring = [object() for _ in range(9)]
        ring.append(ring)
    assert any(x is ring for x in gc.get_objects(generation=2))
    assert not gc.get_freeze_count()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()


@pytest.mark.parametrize("on", [True, False])
def test_a_public_name_leaves_the_collector_as_it_was(on):
    code = f"import gc; {'' if on else 'gc.disable()'}\nimport tokenry; tokenry.SamplingParams\n"
    code += "try: tokenry.Nothing\nexcept AttributeError: print(gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == f"{on}\n"
