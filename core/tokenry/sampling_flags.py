"""Sampling parameters as flags of a command, and back.

In: an argparse parser. Out: the fields of SamplingParams that were given; those that were not are
left to the model's own defaults. Names and ranges are those of SamplingParams, which checks them.
"""

from __future__ import annotations

import argparse
from typing import Any

from tokenry.config import flag_of

_WHOLE = {
    "max_tokens": "longest answer (default: {longest})",
    "seed": "same seed, same text",
    "top_k": "draw from the k most likely tokens, 0: from all",
    "mirostat": "2: keep the surprise near --mirostat-tau",
    "dry_allowed_length": "repeats shorter than this are free (default: 2)",
    "dry_range": "tokens in which repeats are looked for, 0: all",
    "no_repeat_ngram_size": "no n-gram of this size comes twice, 0: off",
}
_NUMBER = {
    "temperature": "0 is greedy, at most 100, with a server 2 (default: the model's, else 1)",
    "top_p": "draw from the most likely tokens that hold this mass",
    "min_p": "draw from tokens of at least this share of the most likely one's probability",
    "typical_p": "draw from the most typical tokens that hold this mass",
    "top_n_sigma": "draw from logits within so many standard deviations of the largest",
    "xtc_probability": "how often the most likely of the tokens above --xtc-threshold are left out",
    "xtc_threshold": "see --xtc-probability (default: 0.1)",
    "mirostat_tau": "surprise to keep, in bits (default: 5)",
    "mirostat_eta": "how fast it is corrected (default: 0.1)",
    "repetition_penalty": "divides the logits of tokens that came before",
    "presence_penalty": "subtracted from the logits of tokens in the answer",
    "frequency_penalty": "the same, per occurrence",
    "dry_multiplier": "penalty of what would go on with a repeat, 0: off",
    "dry_base": "its growth per repeated token (default: 1.75)",
}
NAMES = (*_WHOLE, *_NUMBER)


def add_sampling_flags(parser: argparse.ArgumentParser, *, longest: str) -> None:
    """One flag per parameter, none with a default. `longest`: the answer's length without one."""
    group = parser.add_argument_group("sampling options")
    for kind, table in ((int, _WHOLE), (float, _NUMBER)):
        for name, text in table.items():
            group.add_argument(
                flag_of(name),
                type=kind,
                metavar=kind.__name__.upper(),
                help=text.format(longest=longest),
            )


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of SamplingParams by name, those that were given. Raises RequestError for a wrong
    one, before a model is loaded.
    """
    from tokenry.params import SamplingParams

    given = {name: value for name in NAMES if (value := getattr(args, name)) is not None}
    SamplingParams(**given)
    return given
