"""Attention tried on a KV of its own: requests with old tokens in it, one launch, and the dense
answer in float64.

In: a backend and an `AttentionCase`. Out: what the op gave for the live rows, what it should have
given, and which elements of the KV changed. Knows the layout of the KV only by finding, among its
axes, the one for blocks and the one for offsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import Backend
from tokenry.backend.contract import KVSpec
from tokenry.backend.ops import OpTable
from tokenry.conformance.check import NotAsked
from tokenry.conformance.scenes import Packed, Scene, Work, on_device

GARBAGE = 1e3
"""What blocks hold that nobody wrote: finite, as in service, and large enough to be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """One launch. works: (cached tokens, new tokens) of each request."""

    works: tuple[tuple[int, int], ...]
    dtype: str = "float32"
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    window: int | None = None
    softcap: float | None = None
    spare: bool = False
    garbage: float = GARBAGE
    num_blocks: int = 0
    seed: int = 0

    def __str__(self) -> str:
        rows = " ".join(f"{cached}+{new}" for cached, new in self.works)
        options = "".join(
            f" {name}={getattr(self, name)}"
            for name in ("window", "softcap")
            if getattr(self, name) is not None
        )
        return (
            f"attention {self.dtype} H={self.num_heads} KH={self.num_kv_heads} D={self.head_dim} "
            f"block={self.block_size}{options}{' padded' if self.spare else ''} "
            f"cached+new: {rows}"
        )


@dataclass(slots=True)
class Tried:
    """Live rows of every launch of a case: got and want [rows, H * D]; stray: what was written
    elsewhere.
    """

    got: list[NDArray[np.float64]] = field(default_factory=list)
    want: list[NDArray[np.float64]] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)


class Paged:
    """A case set up on a backend; `run` launches it."""

    def __init__(self, backend: Backend, case: AttentionCase) -> None:
        self.backend, self.case = backend, case
        rng = np.random.default_rng(case.seed)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        lengths = [cached + new for cached, new in case.works]
        self.scene = Scene(
            backend.caps,
            [[1] * length for length in lengths],
            block_size=case.block_size,
            num_blocks=case.num_blocks,
            seed=case.seed,
        )
        D = case.head_dim
        self.q, self.k, self.v = (
            [self._random(rng, (n, heads, D)) for n in lengths]
            for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)
        )
        spec = KVSpec(
            num_layers=1,
            num_kv_heads=case.num_kv_heads,
            head_dim=D,
            block_size=case.block_size,
            dtype=case.dtype,
        )
        self.kv = backend.alloc_kv(spec, self.scene.num_blocks)
        self._check_layout(spec)
        self.op = OpTable(backend.ops()).resolve(
            "attention",
            dtype=case.dtype,
            head_dim=D,
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            window=case.window,
            softcap=case.softcap,
        )

    def _check_layout(self, spec: KVSpec) -> None:
        """The reference op reads one layout of the KV only; a backend with another and no op of its
        own has attention inside build_model. Raises NotAsked.
        """
        if "attention" in self.backend.ops():
            return
        want = (2, self.scene.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        if not isinstance(self.kv[0], Tensor) or tuple(self.kv[0].shape) != want:
            raise NotAsked("attention is inside build_model: neither an op nor the contract's KV")

    def run(self, *, watch: bool = False) -> Tried:
        """Old tokens first, then the works; `watch` compares the KV before and after."""
        with torch.inference_mode():
            for tensor in tensors_in(self.kv[0]):
                tensor.fill_(self.case.garbage)
                found = self.axes(tensor.shape)
                if found is not None and np.isnan(self.case.garbage):
                    tensor.select(found[0], 0).fill_(GARBAGE)  # the null block stays finite
            old = [Work(i, 0, c) for i, (c, _) in enumerate(self.case.works) if c]
            for packed in self.scene.launches(old) if old else ():
                self.launch(packed)
            works = [Work(i, c, n) for i, (c, n) in enumerate(self.case.works)]
            tried = Tried()
            for packed in self.scene.launches(works, spare=self.case.spare):
                before = self.snapshot() if watch else []
                got = self.launch(packed)
                if watch:
                    tried.stray += self._stray(packed, before, self.snapshot())
                tried.got.append(got)
                tried.want.append(self.expected(packed))
        return tried

    def launch(self, packed: Packed) -> NDArray[np.float64]:
        """The op on one batch: its live rows."""
        case, T = self.case, packed.host.bucket.tokens
        widths = [case.num_heads * case.head_dim, *[case.num_kv_heads * case.head_dim] * 2]
        fused = torch.full((T, sum(widths)), 7.0, dtype=self.dtype)
        rows = torch.from_numpy(packed.rows)
        for part, source in zip(
            fused.split_with_sizes(widths, dim=1), (self.q, self.k, self.v), strict=True
        ):
            values = torch.stack([source[r][p] for r, p in packed.owners])
            part[rows] = values.flatten(1)
        # views of one product, as a layer hands them over
        q, k, v = (
            part.view(T, -1, case.head_dim)
            for part in fused.to(self.backend.caps.input_device).split_with_sizes(widths, dim=1)
        )
        out = self.op(
            q, k, v, self.kv[0], on_device(packed.host, self.backend),
            scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap,
        )  # fmt: skip
        if tuple(out.shape) != (T, widths[0]) or out.dtype != self.dtype:
            raise ValueError(
                f"gave {list(out.shape)} {out.dtype}, not {[T, widths[0]]} {self.dtype}"
            )
        return fetched(self.backend, out)[packed.rows]

    def expected(self, packed: Packed) -> NDArray[np.float64]:
        """Dense attention in float64, row by row."""
        case = self.case
        group = case.num_heads // case.num_kv_heads
        rows = []
        for request, position in packed.owners:
            first = 0 if case.window is None else max(0, position + 1 - case.window)
            keys, values = (
                x[request][first : position + 1].double().numpy().repeat(group, axis=1)
                for x in (self.k, self.v)
            )
            query = self.q[request][position].double().numpy()
            scores = np.einsum("hd,lhd->hl", query, keys) * case.head_dim**-0.5
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            p = np.exp(scores - scores.max(1, keepdims=True))
            rows.append(np.einsum("hl,lhd->hd", p / p.sum(1, keepdims=True), values).reshape(-1))
        return np.stack(rows)

    def snapshot(self) -> list[NDArray[np.float64]]:
        """The KV's tensors on the host."""
        return [fetched(self.backend, t) for t in tensors_in(self.kv[0])]

    def axes(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Which axis counts blocks and which offsets; None if it cannot be told."""
        blocks = [i for i, n in enumerate(shape) if n == self.scene.num_blocks]
        offsets = [i for i, n in enumerate(shape) if n == self.case.block_size]
        if len(blocks) != 1 or len(offsets) != 1:
            return None
        return blocks[0], offsets[0]

    def _stray(
        self, packed: Packed, before: list[NDArray[Any]], after: list[NDArray[Any]]
    ) -> Iterator[str]:
        """What changed outside the slots of the live rows and the null block."""
        slots = {int(s) for s in packed.host.slots[packed.rows]}
        size = self.case.block_size
        for old, new in zip(before, after, strict=True):
            found = self.axes(old.shape)
            changed = np.argwhere(~((old == new) | (np.isnan(old) & np.isnan(new))))
            if found is None:
                most = (len(slots) + size) * old.size // (self.scene.num_blocks * size)
                if len(changed) > most:
                    yield f"{len(changed)} elements of the KV changed, {most} could at most"
                continue
            where = {int(b) * size + int(o) for b, o in changed[:, list(found)]}
            bad = sorted(slot for slot in where - slots if slot >= size)
            if bad:
                last = ", ".join(map(str, bad[:4]))
                yield (
                    f"{len(bad)} slots changed that are no row's, among them {last}; the live rows "
                    f"write to {', '.join(map(str, sorted(slots)[:6]))}"
                )

    def _random(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(self.dtype)


def tensors_in(thing: Any) -> list[Tensor]:
    """Every tensor of a KV layer, whatever holds them."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        return [tensor for part in thing for tensor in tensors_in(part)]
    return []


def fetched(backend: Backend, tensor: Tensor) -> NDArray[np.float64]:
    """A tensor's values, by the backend's own way out."""
    wide = tensor.float() if tensor.is_floating_point() else tensor
    values: NDArray[np.float64] = backend.fetch([wide])()[0].astype(np.float64)
    return values
