"""Launch parameters of each architecture, as data: no kernel asks what it runs on.

Every figure here is derived (shared memory, registers, warps that hide the latency), checked by
compiling for the architecture (`tests/test_triton_aot.py`, `tests/budgets.json`); none has been
tuned on hardware yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenry.errors import BackendError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One kernel's launch: rows x columns of a program, warps, stages of its pipeline."""

    m: int
    n: int
    k: int = 0
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """One architecture.

    decode, prefill  attention: m rows (query heads of tokens), n keys; by head dim up to which the
                     entry holds, ascending.
    split            keys of one program of a long decode: fixed, so that the order of a row's sum
                     is its own affair.
    small, large     matrix products with few rows (16 or fewer) and with many.
    fp8              torch's name of the encoding that its matrix units take, None: weights only.
    """

    name: str
    decode: Mapping[int, Tile]
    prefill: Mapping[int, Tile]
    split: int
    small: Tile
    large: Tile
    fp8: str | None

    def attention(self, *, head_dim: int, decode: bool) -> Tile:
        """The tile for a head dim; raises KeyError beyond the last."""
        table = self.decode if decode else self.prefill
        return next(tile for dim, tile in table.items() if head_dim <= dim)


_NVIDIA_DECODE = {
    128: Tile(m=16, n=64, warps=4, stages=3),
    256: Tile(m=16, n=32, warps=4, stages=3),
}
_AMD_DECODE = {
    128: Tile(m=16, n=64, warps=4, stages=1),
    256: Tile(m=16, n=32, warps=4, stages=1),
}
_AMD_PREFILL = {
    128: Tile(m=64, n=64, warps=4, stages=1),
    256: Tile(m=64, n=32, warps=4, stages=1),
}
_AMD_SMALL = Tile(m=16, n=32, k=128, warps=4, stages=2)
_AMD_LARGE = Tile(m=64, n=128, k=64, warps=8, stages=2)

_SM_80 = Arch(
    name="sm_80", decode=_NVIDIA_DECODE, split=512, fp8=None,
    prefill={
        64: Tile(m=64, n=64, warps=4), 128: Tile(m=64, n=32, warps=4),
        256: Tile(m=64, n=32, warps=8),
    },
    small=Tile(m=16, n=32, k=128, warps=4, stages=3),
    large=Tile(m=64, n=128, k=64, warps=4, stages=3),
)  # fmt: skip

ARCHS: Mapping[str, Arch] = {
    arch.name: arch
    for arch in (
        _SM_80,
        replace(_SM_80, name="sm_89", fp8="float8_e4m3fn"),  # 99 KiB of shared memory
        Arch(
            name="sm_90", decode=_NVIDIA_DECODE, split=512, fp8="float8_e4m3fn",
            prefill={128: Tile(m=128, n=64, warps=8), 256: Tile(m=64, n=32, warps=8)},
            small=Tile(m=16, n=32, k=128, warps=4, stages=4),
            large=Tile(m=128, n=128, k=64, warps=8, stages=3),
        ),
        Arch(
            name="sm_100", decode=_NVIDIA_DECODE, split=512, fp8="float8_e4m3fn",
            prefill={128: Tile(m=128, n=64, warps=8), 256: Tile(m=64, n=32, warps=8)},
            small=Tile(m=16, n=32, k=128, warps=4, stages=4),
            large=Tile(m=128, n=128, k=64, warps=8, stages=3),
        ),
        replace(_SM_80, name="sm_120", fp8="float8_e4m3fn"),  # as sm_89
        Arch(
            name="gfx90a", decode=_AMD_DECODE, split=512, fp8=None,
            prefill=_AMD_PREFILL, small=_AMD_SMALL, large=_AMD_LARGE,
        ),
        Arch(
            name="gfx942", decode=_AMD_DECODE, split=512, fp8="float8_e4m3fnuz",
            prefill=_AMD_PREFILL, small=_AMD_SMALL, large=_AMD_LARGE,
        ),
        Arch(
            name="gfx950", decode=_AMD_DECODE, split=512, fp8="float8_e4m3fn",
            prefill=_AMD_PREFILL, small=_AMD_SMALL, large=_AMD_LARGE,
        ),
    )
}  # fmt: skip


def arch_of(name: str) -> Arch:
    """The table's entry for an architecture, or that of the newest older one of the same maker.

    Raises BackendError for one that is older than all.
    """
    if name in ARCHS:
        return ARCHS[name]
    older = [a for a in ARCHS if a[:2] == name[:2] and _number(a) <= _number(name)]
    if not older:
        raise BackendError(
            f"There are no kernels for {name}; the table has {', '.join(ARCHS)}.",
            mend="a device of one of these architectures, or a newer one",
        )
    return ARCHS[max(older, key=_number)]


def _number(name: str) -> int:
    """sm_90a -> 90, gfx90a -> 0x90a: the order in which they came."""
    if name.startswith("gfx"):
        return int(name[3:], 16)
    return int("".join(c for c in name if c.isdigit()) or 0)
