"""How an answer is marked, so that it can be told later.

In: a scheme's settings. Out: `Watermark`. The marks themselves are made in runner/sampling.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tokenry.errors import RequestError
from tokenry.params.checks import check_range


class Watermark(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """How an answer is marked so that who has the key can tell it (see `tokenry watermark`).

    scheme    kgw: of each context, gamma of the tokens are green and get delta more (arXiv
              2301.10226); gumbel: the token with the largest r ** (1 / p) is taken (Aaronson 2022).
    key       of the hash, 64 bits.   context: how many tokens before are hashed with it.
    """

    scheme: Literal["kgw", "gumbel"]
    key: int = 0
    gamma: float = 0.25
    delta: float = 2.0
    context: int = 1

    def __post_init__(self) -> None:
        if self.scheme not in ("kgw", "gumbel"):
            text = f"The watermark scheme must be kgw or gumbel, got {self.scheme!r}."
            raise RequestError(text, param="watermark.scheme")
        check_range("watermark.key", self.key, 0, 2**64 - 1, whole=True)
        check_range("watermark.gamma", self.gamma, 0, 0.99, open_low=True)
        check_range("watermark.delta", self.delta, 0, 100, open_low=True)
        check_range("watermark.context", self.context, 1, 16, whole=True)


def as_watermark(given: dict[str, Any]) -> Watermark:
    """From a dict of its fields. Raises RequestError."""
    try:
        return Watermark(**given)
    except TypeError as error:
        raise RequestError(f"watermark: {error}.", param="watermark") from error
