"""`tokenry embed`: vectors of texts, here, without a server.

In: a model, texts or lines of stdin. Out: one JSON object per text on stdout, in their order.
"""

from __future__ import annotations

import argparse
import json
import sys

from tokenry.config import EngineConfig, add_arguments, check_file_keys, load
from tokenry.errors import ConfigError
from tokenry.pooling import PoolingParams


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="directory, hub id or installed model")
    parser.add_argument(
        "text", nargs="+", help="one or more texts; '-' reads one per line of stdin"
    )
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    text = "the embeddings' first so many values, of a matryoshka model"
    parser.add_argument("--dimensions", type=int, help=text)
    text = "cut longer texts to so many tokens, -1: to what the model takes"
    parser.add_argument("--truncate-prompt-tokens", type=int, help=text)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_arguments(parser, EngineConfig, skip=("model",))
    parser.set_defaults(run=run_embed)


def run_embed(args: argparse.Namespace) -> int:
    """Print an embedding, or a classifier's probabilities, per text."""
    from tokenry.llm import LLM

    names = set(EngineConfig.__dataclass_fields__)
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.config:
        check_file_keys(args.config)
    config = load(EngineConfig, given, file=args.config)
    texts = [line for text in args.text for line in _lines(text)]
    if not texts:
        raise ConfigError("There is no text: stdin is empty.", mend="tokenry embed MODEL TEXT")
    params = PoolingParams(dimensions=args.dimensions)
    options = {name: getattr(config, name) for name in names}
    with LLM(**options, progress=not args.quiet) as llm:
        found = llm.encode(
            texts,
            pooling_params=params,
            truncate_prompt_tokens=args.truncate_prompt_tokens,
            use_tqdm=not args.quiet,
        )
        vectors = llm.ready.limits.vectors
        labels = () if vectors is None else vectors.labels
    for text, one in zip(texts, found, strict=True):
        values = list(one.outputs.data)
        what = (
            {"probs": dict(zip(labels, values, strict=True))} if labels else {"embedding": values}
        )
        print(json.dumps({"text": text, **what}, ensure_ascii=False))
    return 0


def _lines(text: str) -> list[str]:
    if text != "-":
        return [text]
    return [line for line in sys.stdin.read().splitlines() if line.strip()]
