"""Which kernels a GPU's backend runs: Triton's or plain torch's, whose attention, who tunes.

In: what the plugin knows of the device, the options. Out: ops by name, and the tuner.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tokenry.backend import reference
from tokenry.backend.base import Op
from tokenry.errors import ConfigError
from tokenry_triton.gpu.ops import torch_ops
from tokenry_triton.gpu.options import GpuOptions
from tokenry_triton.gpu.providers import MakeProvider, Provided

if TYPE_CHECKING:
    from tokenry_triton.tune import Tuner

log = logging.getLogger("tokenry.gpu")
RUNS = 7
"""Of which the median is a tile's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a plugin knows of the device.

    arch       of the kernels' launch tables: sm_90, gfx942, ...
    attention  libraries whose attention may stand before the own one, by the option's value
    """

    backend: str
    index: int
    arch: str
    dtypes: tuple[str, ...]
    fp8: Literal["none", "e4m3fn", "e4m3fnuz"]
    attention: Mapping[str, MakeProvider] = field(default_factory=dict)


def pick_ops(gpu: Gpu, options: GpuOptions, tuner: Tuner | None = None) -> Mapping[str, Op]:
    """Triton's kernels where they are wanted and installed, over those of plain torch, with a
    library's attention before them where that was asked for. Raises ConfigError.
    """
    plain = torch_ops(gpu.fp8, fp8_linear=options.linear == "fp8")
    if options.kernels == "torch":
        return _with_attention(plain, gpu, options)
    missing = missing_kernels()
    if missing:
        text = f"The {gpu.backend} backend has no Triton kernels here ({missing} is missing)"
        needing = {
            "kernels=triton": options.kernels == "triton",
            "deterministic=true": options.deterministic == "true",
            "tune=true": options.tune == "true",
        }
        asked = [name for name, given in needing.items() if given]
        if asked:
            mend = f"pip install triton, or leave out {' and '.join(asked)}"
            raise ConfigError(f"{text}.", mend=mend)
        log.warning("%s: plain torch computes instead, more slowly.", text)
        return _with_attention(plain, gpu, options)
    from tokenry_triton.ops import triton_ops

    found = dict(triton_ops(gpu.arch, {"deterministic": options.deterministic}, tuner))
    if options.linear == "fp8":
        found.pop("linear", None)  # torch's own FP8 product
    return _with_attention({**plain, **found}, gpu, options)


def missing_kernels() -> str | None:
    """What Triton's kernels lack."""
    return next((m for m in ("triton", "tokenry_triton.ops") if find_spec(m) is None), None)


def _with_attention(ops: Mapping[str, Op], gpu: Gpu, options: GpuOptions) -> Mapping[str, Op]:
    """Say what was chosen: nobody has run it on hardware."""
    if options.attention == "auto":
        return ops
    make = gpu.attention.get(options.attention)
    if make is None:
        raise ConfigError(
            f"--backend-option attention={options.attention}: the {gpu.backend} backend has "
            f"{', '.join(['auto', *gpu.attention])}.",
            mend="leave it out",
        )
    own = ops["attention"]
    write: Any = reference.write_kv
    if not type(own).__module__.startswith("tokenry_triton.gpu"):
        from tokenry_triton.attention import write_kv as write
    provider = make(gpu.arch, own, write)
    log.warning("attention: %s where it can, else tokenry's own kernels.", provider.name)
    return {**ops, "attention": provider}


def block_sizes(ops: Mapping[str, Op]) -> tuple[int, ...]:
    """Tokens of a block that the chosen attention can have, the preferred first."""
    attention = ops["attention"]
    own = attention.block_sizes if isinstance(attention, Provided) else None
    return own or (16, 32, 64)


def tuner_of(gpu: Gpu, options: GpuOptions) -> Tuner | None:
    """The tuner where tiles are to be measured and there are kernels that have some."""
    if options.tune == "false" or options.kernels == "torch" or missing_kernels():
        return None
    from tokenry_triton.tune import Tuner

    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Tuner(gpu.arch, cache / "tokenry" / "tiles", milliseconds)


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a launch, by events on the current stream, after one that compiles it."""
    new_event: Any = torch.cuda.Event
    call()
    times: list[float] = []
    for _ in range(RUNS):
        begin, end = new_event(enable_timing=True), new_event(enable_timing=True)
        begin.record(torch.cuda.current_stream())
        call()
        end.record(torch.cuda.current_stream())
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[RUNS // 2]
