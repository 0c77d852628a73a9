"""`--backend-option key=value` of this backend, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from tokenry.errors import ConfigError

HBM_GIB: Mapping[str, float] = {"trn2": 24.0, "trn3": 36.0}
"""GiB of one logical core at the default of two physical cores each (LNC 2): 96 GiB per Trainium 2
chip, 144 GiB per Trainium 3 chip, 4 logical cores on either (vendor's architecture pages).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronOptions:
    """What the plan and the programs depend on; none of it is asked of the device.

    target             the chip that programs are for: trn2 or trn3.
    hbm_gib            memory of one logical core; 0: the target's with LNC 2.
    kv_fraction        most of the budget that the KV may take. The vendor's own serving plugin has
                       0.30: the compiler refuses programs whose tensors crowd its scratch space.
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
        known = {f.name for f in fields(cls)}
        values: dict[str, str | float | bool | Path] = {}
        for key, text in options.items():
            if key not in known:
                raise ConfigError(
                    f"The neuron backend has no option {key!r}, it has {', '.join(sorted(known))}.",
                    mend="leave it out of --backend-option",
                )
            values[key] = _value(key, text)
        return cls(**values)  # type: ignore[arg-type]  # _value gives each key its type


def _value(key: str, text: str) -> str | float | bool | Path:
    if key == "cache_dir":
        return Path(text)
    if key == "target" and text in HBM_GIB:
        return text
    if key == "require_compiled" and text in ("true", "false"):
        return text == "true"
    if key in ("hbm_gib", "kv_fraction"):
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if number > 0 and (key == "hbm_gib" or number <= 1):
            return number
    wanted = {
        "target": " or ".join(HBM_GIB),
        "require_compiled": "true or false",
        "hbm_gib": "a number of GiB above 0",
        "kv_fraction": "a number above 0, at most 1",
    }[key]
    raise ConfigError(
        f"--backend-option {key}={text}: not {wanted}.", mend=f"--backend-option {key}={wanted}"
    )
