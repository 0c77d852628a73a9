"""`tokenry quantize MODEL --report`: what quantised weights cost in quality, on the user's text.

In: a model, a text, formats. Out: a table of the text's perplexity with each, and how often the
most likely next token stays the same. Each window is scored from its own beginning.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from tokenry.bench.outputs import Outputs
from tokenry.config import EngineConfig, load
from tokenry.config import add_arguments as add_config
from tokenry.errors import ConfigError
from tokenry.llm import LLM
from tokenry.params import SamplingParams

FORMATS = ("none", "int8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("model", help="model directory, hub id or demo")
    parser.add_argument("--report", action="store_true", help="measure and print the table")
    parser.add_argument(
        "--text", help="UTF-8 text to score, some thousand words of the kind served"
    )
    parser.add_argument(
        "--formats", nargs="+", default=list(FORMATS), choices=FORMATS, help="rows of the table"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens scored at once")
    parser.add_argument("--max-tokens", type=int, default=50_000, help="most tokens of the text")
    parser.add_argument("--json", help="file for the figures")
    add_config(parser, EngineConfig, skip=("model", "quantization", "max_model_len"))
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of one format: the mean negative log-likelihood, its tokens, the most likely ids."""

    loss: float
    tokens: int
    likeliest: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """E to the loss."""
        return math.exp(self.loss)


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    with Outputs.open(args) as outputs:
        return _report(args, outputs)


def _report(args: argparse.Namespace, outputs: Outputs) -> int:
    if not args.report:
        raise ConfigError(
            "tokenry quantises weights while it loads them; no quantised model is written.",
            mend=f"tokenry serve {args.model} --quantization int8, or --report for its cost",
        )
    if args.text is None:
        raise ConfigError("--report needs a text to score.", mend="--text FILE")
    if args.window < 2 or args.max_tokens < args.window:
        raise ConfigError(f"--window is {args.window}, --max-tokens {args.max_tokens}.")
    text = _read(Path(args.text))
    values = {k: v for k, v in vars(args).items() if k in EngineConfig.__dataclass_fields__}
    values |= {"model": args.model, "max_model_len": args.window + 1}
    found: dict[str, Scores] = {}
    print(f"{'weights':8} {'tokens':>8} {'perplexity':>11} {'change':>9} {'same top token':>15}")
    for format in args.formats:
        config = load(
            EngineConfig, {**values, "quantization": None if format == "none" else format}
        )
        found[format] = score(config, text, window=args.window, max_tokens=args.max_tokens)
        first, here = next(iter(found.values())), found[format]
        same = sum(a == b for a, b in zip(first.likeliest, here.likeliest, strict=True))
        print(
            f"{format:8} {here.tokens:8} {here.perplexity:11.4f} "
            f"{here.perplexity / first.perplexity - 1:+9.2%} {same / here.tokens:15.2%}",
            flush=True,
        )
    outputs.json({f: {"perplexity": s.perplexity, "tokens": s.tokens} for f, s in found.items()})
    return 0


def score(config: EngineConfig, text: str, *, window: int, max_tokens: int) -> Scores:
    """Every token of the text's windows but their first, given those before it in the window."""
    values = {f: getattr(config, f) for f in config.__dataclass_fields__}
    with LLM(values.pop("model"), **values) as llm:
        ids = llm.get_tokenizer().encode(text)[:max_tokens]
        parts = [ids[i : i + window] for i in range(0, len(ids), window)]
        prompts = [{"prompt_token_ids": part} for part in parts if len(part) > 1]
        if not prompts:
            raise ConfigError("The text has less than 2 tokens.", mend="--text FILE with more")
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        answers = llm.generate(prompts, params)
    total, likeliest = 0.0, []
    for output in answers:
        scored = output.prompt_logprobs or ()
        for token, entry in zip(output.prompt_token_ids[1:], scored[1:], strict=True):
            if entry is None:
                continue
            total -= entry[token].logprob
            likeliest.append(max(entry, key=lambda t: entry[t].logprob))
    return Scores(loss=total / len(likeliest), tokens=len(likeliest), likeliest=tuple(likeliest))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {error}.") from None
