"""`--backend-option` of the GPU backends, from strings. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tokenry.errors import ConfigError

CHOICES: Mapping[str, tuple[str, ...]] = {
    "kernels": ("auto", "triton", "torch"),
    "graphs": ("capture", "none"),
    "linear": ("model", "fp8"),
    "deterministic": ("false", "true"),
    "attention": ("auto", "flash", "flashinfer", "aiter"),
    "tune": ("false", "true"),
}

NUMBERS: Mapping[str, int] = {"graph_tokens": 256, "graph_memory": 1024}
"""An example of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOptions:
    """What can be chosen; the rest follows from the device.

    kernels  triton, torch (plain, for finding errors); auto: triton's where it is installed
    graphs   capture: programs are recorded once and replayed; none: every kernel by itself
    linear   model: in the model's dtype; fp8: weights quantised at load, one scale per output row,
             activations as they come, one scale per token
    deterministic  true: Triton's kernels in shapes that do not depend on the batch, so that a
             request's bits do not either
    attention  auto: the kernels' own; else a library's where it can (a vendor has some of them)
    tune     true: tiles of Triton's kernels are measured in warm-up and kept in a file
    graph_tokens  mixed steps (prompts beside answers) of up to so many tokens are captured, too
    graph_memory  MiB kept for programs when the KV is planned; 0: as much as the largest step took
    """

    kernels: str = "auto"
    graphs: str = "capture"
    linear: str = "model"
    deterministic: str = "false"
    attention: str = "auto"
    tune: str = "false"
    graph_tokens: int = 128
    graph_memory: int = 0

    @classmethod
    def parse(cls, backend: str, options: Mapping[str, str]) -> GpuOptions:
        """Raises ConfigError for a name or a value that is none."""
        values: dict[str, Any] = dict(options)
        known = [f.name for f in fields(cls)]
        for key, value in options.items():
            if key not in known:
                raise ConfigError(
                    f"The {backend} backend has no option {key!r}, it has {', '.join(known)}.",
                    mend="--backend-option kernels=auto",
                )
            if key in CHOICES and value not in CHOICES[key]:
                raise ConfigError(
                    f"--backend-option {key}={value}: it is one of {', '.join(CHOICES[key])}.",
                    mend=f"--backend-option {key}={CHOICES[key][0]}",
                )
        foreign = {"kernels": "torch", "linear": "fp8", "tune": "true"}
        if values.get("deterministic") == "true" and (
            any(values.get(key) == value for key, value in foreign.items())
            or values.get("attention", "auto") != "auto"
        ):
            raise ConfigError(
                "--backend-option deterministic=true is for Triton's kernels with the table's "
                "tiles: others choose their sums by the number of rows.",
                mend="leave out kernels=torch, linear=fp8, attention and tune",
            )
        if values.get("tune") == "true" and values.get("kernels") == "torch":
            raise ConfigError(
                "--backend-option tune=true: kernels=torch has no tiles.",
                mend="leave one of them out",
            )
        for key, example in NUMBERS.items():
            text = values.get(key, "0")
            if not (text.isascii() and text.isdecimal()):
                raise ConfigError(
                    f"--backend-option {key}={text}: not a whole number of at least 0.",
                    mend=f"--backend-option {key}={example}",
                )
            if key in values:
                values[key] = int(text)
        return cls(**values)
