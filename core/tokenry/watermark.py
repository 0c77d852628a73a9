"""`tokenry watermark detect` tells whether a text carries a mark made with a key.

In: a text, a tokenizer, the scheme and its key. Out: z-score and p-value: the chance that a text
without the mark scores as high. Repeated stretches of a text are counted once, for only then are
its tokens independent evidence. Needs no model and no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tokenry.errors import ConfigError
from tokenry.params import Watermark
from tokenry.runner.sampling.marks import context_hash, green, numbers

LIKELY, CERTAIN = 1e-2, 1e-4
"""p-values below which a text is called suspect, and marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a text scores.

    num_scored  tokens that counted, of num_tokens.
    score       green tokens, or the sum of -ln(1 - r).
    z_score     in standard deviations above what unmarked text scores on average.
    """

    scheme: str
    num_tokens: int
    num_scored: int
    score: float
    z_score: float
    p_value: float


def detect(token_ids: Sequence[int], mark: Watermark) -> Finding:
    """Look for the mark in tokens. Raises ConfigError if there are too few."""
    found: list[float] = []
    seen: set[tuple[int, ...]] = set()
    for i in range(mark.context, len(token_ids)):
        context, token = tuple(token_ids[i - mark.context : i]), token_ids[i]
        once = (*context, token) if mark.scheme == "kgw" else context
        if once in seen:
            continue
        seen.add(once)
        state, one = context_hash(mark.key, context), np.array([token])
        if mark.scheme == "kgw":
            found.append(float(green(state, one, mark.gamma)[0]))
        else:
            found.append(-math.log1p(-float(numbers(state, one)[0])))
    count, score = len(found), sum(found)
    if not count:
        raise ConfigError(
            f"The text has {len(token_ids)} tokens, more than {mark.context} are needed.",
            mend="a longer text: 100 tokens tell something, 200 nearly everything",
        )
    if mark.scheme == "kgw":
        gamma = mark.gamma
        z_score = (score - gamma * count) / math.sqrt(count * gamma * (1 - gamma))
        p_value = binomial_tail(count, gamma, round(score))
    else:
        z_score = (score - count) / math.sqrt(count)
        p_value = gamma_tail(count, score)
    return Finding(
        scheme=mark.scheme,
        num_tokens=len(token_ids),
        num_scored=count,
        score=score,
        z_score=z_score,
        p_value=p_value,
    )


def binomial_tail(count: int, share: float, least: int) -> float:
    """P(at least `least` of `count` independent tokens are green)."""
    if least <= 0:
        return 1.0
    whole = math.lgamma(count + 1)
    logs = [
        whole - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(share) + (count - k) * math.log1p(-share)
        for k in range(least, count + 1)
    ]  # fmt: skip
    return min(1.0, _sum_of_exp(logs))


def gamma_tail(count: int, score: float) -> float:
    """P(a sum of `count` unit exponentials is at least `score`): a Poisson's lower tail."""
    if score <= 0:
        return 1.0
    logs = [k * math.log(score) - score - math.lgamma(k + 1) for k in range(count)]
    return min(1.0, _sum_of_exp(logs))


def _sum_of_exp(logs: Sequence[float]) -> float:
    most = max(logs)
    return math.exp(most) * sum(math.exp(x - most) for x in logs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`tokenry watermark detect`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    text = "tell whether a text was marked with this key"
    command = commands.add_parser("detect", help=text, description=text)
    command.add_argument("file", nargs="+", help="text file(s), UTF-8; '-' reads stdin")
    command.add_argument("--model", required=True, help="the model whose tokenizer made the text")
    command.add_argument("--scheme", required=True, choices=("kgw", "gumbel"))
    command.add_argument("--key", type=int, default=0, help="the secret key (default: 0)")
    text = "kgw: share of green tokens, as the server has it (default: 0.25)"
    command.add_argument("--gamma", type=float, default=0.25, help=text)
    text = "tokens that were hashed with the key (default: 1)"
    command.add_argument("--context", type=int, default=1, help=text)
    command.add_argument("--json", action="store_true", help="one JSON object per file")
    command.set_defaults(parser=command, run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line per file; exit code 0, whatever was found."""
    from tokenry.hub import find_model
    from tokenry.text.tokenizer import Tokenizer

    mark = Watermark(scheme=args.scheme, key=args.key, gamma=args.gamma, context=args.context)
    tokenizer = Tokenizer.load(find_model(args.model))
    for name in args.file:
        text = sys.stdin.read() if name == "-" else _read(name)
        finding = detect(tokenizer.encode(text, add_special_tokens=False), mark)
        if args.json:
            print(json.dumps({"file": name, **asdict(finding)}))
        else:
            print(f"{name}: {_verdict(finding)}")
    return 0


def _verdict(finding: Finding) -> str:
    p = finding.p_value
    word = "marked" if p < CERTAIN else "perhaps marked" if p < LIKELY else "no mark found"
    return (
        f"{word} (z = {finding.z_score:.2f}, p = {p:.2g}, {finding.num_scored} of "
        f"{finding.num_tokens} tokens counted, scheme {finding.scheme})"
    )


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read as text: {error}.") from error
