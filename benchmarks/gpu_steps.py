"""How long the device waits between steps, and how much of a step it works: the cost of the host.

    python benchmarks/gpu_steps.py MODEL [--backend cuda] [--batches 1 256] [--prompt 128]
        [--output 256] [--overlap both|on|off] [--deterministic both|on|off]
        [--load-format dummy] [--backend-option K=V ...] [--limit KEY=VALUE ...] [--json FILE]

For each batch size, that many requests are answered at once, all of one length, so that all steps
but the first few are decode steps of the whole batch. On the device's stream an event stands before
the inputs of each step and one behind its results. Per step, in milliseconds:

    period  from the end of one step to the end of the next
    gap     of it, until the next step's inputs begin to be copied: what the device waited for the
            host between steps (the host was late; 0 where it was ahead)
    busy    of the period, the share that kernels and copies ran, from torch's profiler in a second
            run (it slows the host, so `gap` is not taken there); "-" where it cannot tell

The first and the last tenth of the steps are left out. Medians, and the 90th percentile of the gap.
The aim: gap / period and 1 - busy below 5 %, at batch 1 and at 256. With --overlap off the gap
is the time that planning and waiting take when they are not hidden. With --deterministic both the
pair of overlapped runs shows what that mode costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenry import LLM, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; times in milliseconds."""

    batch: int
    overlap: bool
    deterministic: bool
    steps: int
    tokens_per_s: float
    period: float
    gap: float
    gap_p90: float
    busy: float | None

    @property
    def share(self) -> float:
        """Of the period that is gap."""
        return self.gap / self.period if self.period else 0.0


@dataclass
class Marks:
    """Wraps a runner's `run`: an event before and one behind each launched step."""

    run: Callable[..., Any]
    new_event: Callable[[], Any]
    begins: list[Any] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)

    def __call__(self, plan: Any) -> Any:
        """Launch the step between two marks."""
        begin, end = self.new_event(), self.new_event()
        stream = torch.cuda.current_stream()
        begin.record(stream)
        wait = self.run(plan)
        end.record(stream)
        self.begins.append(begin)
        self.ends.append(end)
        return wait

    def times(self) -> tuple[list[float], list[float]]:
        """Periods and gaps of the steps in the middle."""
        self.ends[-1].synchronize()
        cut = len(self.ends) // 10
        steps = range(1 + cut, len(self.ends) - cut)
        periods = [self.ends[i - 1].elapsed_time(self.ends[i]) for i in steps]
        gaps = [self.ends[i - 1].elapsed_time(self.begins[i]) for i in steps]
        return periods, gaps


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    rows = []
    for overlap, deterministic in ways(args):
        own = {"overlap": overlap, "deterministic": deterministic}
        with LLM(args.model, **limits(args), **own) as llm:
            for batch in args.batches:
                rows.append(measure(llm, args, batch, **own))
                print(line(rows[-1]), flush=True)
    if args.json is not None:
        found = {"facts": facts(args), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Gaps between steps on a GPU.")
    parser.add_argument("model")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--overlap", choices=("both", "on", "off"), default="both")
    parser.add_argument("--deterministic", choices=("both", "on", "off"), default="off")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--backend-option", action="append", default=[])
    parser.add_argument("--limit", action="append", default=[], help="an engine option, KEY=VALUE")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def ways(args: argparse.Namespace) -> list[tuple[bool, bool]]:
    """(overlap, deterministic) of each run; without overlap only one of the two modes."""
    chosen = {"both": (True, False), "on": (True,), "off": (False,)}
    overlaps = chosen[args.overlap]
    modes = sorted(chosen[args.deterministic])
    return [(o, d) for o in overlaps for d in modes if o == overlaps[0] or d == modes[0]]


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """Of the engine."""
    more: dict[str, Any] = {}
    for text in args.limit:
        key, _, value = text.partition("=")
        more[key] = int(value) if value.lstrip("-").isdecimal() else value
    return {
        "backend": args.backend,
        "backend_option": tuple(args.backend_option),
        "dtype": args.dtype,
        "load_format": args.load_format,
        "max_num_seqs": max(args.batches),
        "max_model_len": args.prompt + args.output + 1,
        "enable_prefix_caching": False,
        **more,
    }


def measure(
    llm: LLM, args: argparse.Namespace, batch: int, *, overlap: bool, deterministic: bool
) -> Row:
    """One batch size: once to warm up, once with marks, once with the profiler."""
    runner = llm._assembled.runner
    plain = runner.run
    answer(llm, args, batch, seed=0)
    marks = Marks(plain, lambda: torch.cuda.Event(enable_timing=True))
    runner.run = marks
    try:
        answer(llm, args, batch, seed=1)
    finally:
        runner.run = plain
    periods, gaps = marks.times()
    period = statistics.median(periods)
    return Row(
        batch=batch,
        overlap=overlap,
        deterministic=deterministic,
        steps=len(periods),
        tokens_per_s=1000 * batch / period if period else 0.0,
        period=period,
        gap=max(0.0, statistics.median(gaps)),
        gap_p90=max(0.0, sorted(gaps)[int(0.9 * len(gaps))]),
        busy=busy_share(lambda: answer(llm, args, batch, seed=2)),
    )


def answer(llm: LLM, args: argparse.Namespace, batch: int, *, seed: int) -> None:
    """Requests of random tokens, answered at once."""
    draw = random.Random(seed)
    vocab = llm._assembled.ready.vocab_size
    prompts = [
        {"prompt_token_ids": [draw.randrange(vocab) for _ in range(args.prompt)]}
        for _ in range(batch)
    ]
    params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)


def busy_share(work: Callable[[], None]) -> float | None:
    """Of the time between the first and the last kernel of the middle of the run, the share that
    some kernel or copy ran; None where the profiler sees none.
    """
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    if not set(kinds) <= torch.profiler.supported_activities():
        work()
        return None
    with torch.profiler.profile(activities=kinds) as profiler:
        work()
    on_device = torch.autograd.DeviceType.CUDA
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == on_device
    )
    spans = spans[len(spans) // 10 : len(spans) - len(spans) // 10]
    return union(spans)


def union(spans: Sequence[tuple[float, float]]) -> float | None:
    """Share of the whole that the spans (sorted by their starts) cover."""
    if not spans:
        return None
    covered, until = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - spans[0][0]
    return covered / whole if whole else None


def line(row: Row) -> str:
    """For people."""
    busy = "-" if row.busy is None else f"{100 * row.busy:.1f} %"
    how = "overlap" if row.overlap else "no overlap"
    how += ", deterministic" * row.deterministic
    return (
        f"batch {row.batch:4d} {how:10s} {row.steps:5d} steps  period {row.period:8.3f} ms  "
        f"gap {row.gap:7.4f} ms ({100 * row.share:.2f} %, p90 {row.gap_p90:.4f})  busy {busy}  "
        f"{row.tokens_per_s:9.1f} tokens/s"
    )


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "arguments": {k: str(v) for k, v in vars(args).items()},
    }


if __name__ == "__main__":
    main()
