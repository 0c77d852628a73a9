"""Compiles a grammar in a process that may be lost: some take exponential time or memory, and a
thread inside the library cannot be stopped.

In: a grammar, on a line of stdin. Out: a line of stdout when it has been compiled, whatever came
of it; no line where it took too long or too much: a timer (of the processor's time, so that a busy
machine makes no grammar a bad one) or the memory limit ends the process, and the next grammar gets
a new one. Run as `python -m tokenry.grammar.trial SECONDS BYTES`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys

TRIAL_LIMIT_S = 4.0
TRIAL_LIMIT_BYTES = 2 * 2**30
PATIENCE = 5
"""How many times the processor's time the clock's may be."""


class Trial:
    """Owned by one compile thread. The process starts with the first grammar."""

    def __init__(
        self, limit_s: float = TRIAL_LIMIT_S, limit_bytes: int = TRIAL_LIMIT_BYTES
    ) -> None:
        self._limit_s = limit_s
        self._limit_bytes = limit_bytes
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, grammar: str) -> str | None:
        """Why the grammar must not be compiled here; None where it can be."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # it has ended: the missing answer tells
            process.stdin.write(json.dumps(grammar) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer:
            return None
        code = process.wait()
        self.close()
        if code in (-signal.SIGPROF, -signal.SIGALRM):
            return f"it takes longer than {self._limit_s:.0f} s to compile"
        return (
            f"compiling it ended the process that tried (exit code {code}); it may need more than "
            f"{self._limit_bytes // 2**20} MiB"
        )

    def close(self) -> None:
        """End the process, even amid a grammar; a later call starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        limits = [str(self._limit_s), str(self._limit_bytes)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokenry.grammar.trial", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        return self._process


def main(limit_s: float, limit_bytes: int) -> None:
    """Compile what comes until the parent is gone."""
    from llguidance import LLMatcher

    from tokenry.grammar.limits import parser_limits

    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the parent ends us
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * limit_s)
        LLMatcher.validate_grammar(json.loads(line), limits=parser_limits())
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("compiled", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
