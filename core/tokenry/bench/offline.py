"""`tokenry bench throughput` and `latency`: a model in this process, without HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import random
import resource
import time

from tokenry.bench.figures import Spread
from tokenry.bench.outputs import Outputs
from tokenry.config import EngineConfig
from tokenry.llm import LLM
from tokenry.params import SamplingParams


def throughput(args: argparse.Namespace, outputs: Outputs) -> int:
    """Serve all prompts at once; tokens per second."""
    llm = _open(args)
    prompts = _prompts(llm, args.num_prompts, args.input_len)
    begin = time.perf_counter()
    answers = llm.generate(prompts, _params(args), use_tqdm=True)
    seconds = time.perf_counter() - begin
    drawn = sum(len(o.outputs[0].token_ids) for o in answers)
    read = sum(len(o.prompt_token_ids) for o in answers)
    figures = {
        "requests_per_s": len(answers) / seconds,
        "input_tokens_per_s": read / seconds,
        "output_tokens_per_s": drawn / seconds,
        "total_tokens_per_s": (read + drawn) / seconds,
        "seconds": seconds,
        "peak_memory_mib": _peak_mib(),
    }
    _show(llm, args, figures, outputs)
    llm.close()
    return 0


def latency(args: argparse.Namespace, outputs: Outputs) -> int:
    """Serve one batch several times after a warm-up; seconds of a round."""
    llm = _open(args)
    rounds = []
    for i in range(args.rounds + 1):
        llm.reset_prefix_cache()
        prompts = _prompts(llm, args.batch_size, args.input_len, seed=i)
        begin = time.perf_counter()
        llm.generate(prompts, _params(args), use_tqdm=False)
        rounds.append(time.perf_counter() - begin)
    spread = Spread.of(rounds[1:])
    figures = {
        "mean_s": spread.mean,
        "p50_s": spread.p50,
        "p99_s": spread.p99,
        "output_tokens_per_s": args.batch_size * args.output_len / spread.p50,
        "peak_memory_mib": _peak_mib(),
    }
    _show(llm, args, figures, outputs)
    llm.close()
    return 0


def _open(args: argparse.Namespace) -> LLM:
    names = {f.name for f in dataclasses.fields(EngineConfig)} - {"model"}
    return LLM(args.model, **{k: v for k, v in vars(args).items() if k in names})


def _prompts(llm: LLM, count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    top = llm.ready.vocab_size
    return [[rng.randrange(top // 10, top) for _ in range(length)] for _ in range(count)]


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=args.output_len, ignore_eos=True, detokenize=False
    )


def _peak_mib() -> float:
    """Largest resident set of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _show(llm: LLM, args: argparse.Namespace, figures: dict[str, float], outputs: Outputs) -> None:
    ready = llm.ready
    print(
        f"{args.model}: {ready.architecture}, {ready.dtype}, {ready.device_name} ({ready.backend})"
    )
    for name, value in figures.items():
        print(f"{name:<22}{value:>12.2f}")
    outputs.json({"model": args.model, "backend": ready.backend, **figures})
