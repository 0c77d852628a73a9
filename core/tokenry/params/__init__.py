"""How one request wants its tokens drawn, and when it ends: names and defaults as users of vLLM
know them.

In: keyword arguments from Python or decoded JSON. Out: a frozen, validated struct that crosses
processes as msgpack. Every field that cannot be served is an error that names the field; nothing is
dropped in silence.

A new parameter is one field, its meaning and its range in sampling.py.
"""

from tokenry.params.checks import check_whole
from tokenry.params.sampling import (
    MAX_LOGPROBS,
    NEEDS_LOGITS,
    SamplingParams,
    default_params,
)
from tokenry.params.watermark import Watermark

__all__ = [
    "MAX_LOGPROBS",
    "NEEDS_LOGITS",
    "SamplingParams",
    "Watermark",
    "check_whole",
    "default_params",
]
