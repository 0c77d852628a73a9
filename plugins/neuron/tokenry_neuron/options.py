"""`--backend-option key=value` of this backend, as frozen data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenry.errors import ConfigError

HBM_GIB: Mapping[str, float] = {"trn2": 24.0, "trn3": 36.0}
"""GiB per logical core at the default of two physical cores each: 96 or 144 GiB per chip, 4 logical
cores (vendor's architecture pages).
"""
KINDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "target": ("|".join(HBM_GIB), str),
    "hbm_gib": (r"\d+(\.\d+)?", float),
    "kv_fraction": (r"0?\.\d+|1", float),
    "cache_dir": (".+", Path),
    "require_compiled": ("true|false", "true".__eq__),
}
"""Name -> the values that it may have, what makes them of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronOptions:
    """What plan and programs depend on; none of it is asked of the device.

    target             the chip that programs are for: trn2 or trn3.
    hbm_gib            memory of one logical core; 0: the target's.
    kv_fraction        most of the budget that the KV may take; more crowds the compiler's scratch
                       space (0.30 in the vendor's design note on available memory).
    cache_dir          where compiled programs are kept.
    require_compiled   a program that is not in the cache is an error, not a compilation.
    """

    target: str = "trn2"
    hbm_gib: float = 0.0
    kv_fraction: float = 0.3
    cache_dir: Path = Path("~/.cache/tokenry/neuron")
    require_compiled: bool = False

    @property
    def hbm_bytes(self) -> int:
        """Memory of one logical core."""
        return int((self.hbm_gib or HBM_GIB[self.target]) * 2**30)

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> NeuronOptions:
        """Options from strings. Raises ConfigError for a name or a value that is none."""
        values: dict[str, Any] = {}
        for key, text in options.items():
            if key not in KINDS:
                raise ConfigError(
                    f"The neuron backend has no option {key!r}, it has {', '.join(sorted(KINDS))}.",
                    mend="leave it out of --backend-option",
                )
            pattern, make = KINDS[key]
            if not re.fullmatch(pattern, text):
                raise ConfigError(
                    f"--backend-option {key}={text}: its values are {pattern}.",
                    mend=f"--backend-option {key}={getattr(cls(), key)}",
                )
            values[key] = make(text)
        return cls(**values)
