"""Checks of what goes to and from the device: `fetch`, `attn_inputs`, the batch's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenry.backend.base import Backend
from tokenry.backend.contract import HostBatch
from tokenry.conformance.attention import rows_of
from tokenry.conformance.check import Case, Check, attempt, check
from tokenry.conformance.compare import same_bits
from tokenry.conformance.kit import Kit
from tokenry.conformance.scenes import Packed, Scene, Work


@check(
    "C21.fetch", "fetch gives the values of the moment when it was called, in arrays of its own."
)
def fetch(kit: Kit) -> Iterator[Case]:
    """Tensors of several kinds and shapes; overwritten after fetch was called and before its answer
    was waited for; two fetches under way at once; the answer asked for twice.
    """
    backend = kit.open()
    samples = {
        "float32 [3, 5]": torch.arange(15, dtype=torch.float32).view(3, 5),
        "int32 [7]": torch.arange(7, dtype=torch.int32),
        "int64 [2, 2]": torch.arange(4).view(2, 2),
        "bool [4]": torch.tensor([True, False, True, True]),
        "float32 []": torch.tensor(2.5),
        "float32 [0, 3]": torch.zeros(0, 3),
        "float32 [5, 3] transposed": torch.arange(15, dtype=torch.float32).view(3, 5).T,
    }
    for name, tensor in samples.items():
        yield attempt(
            name,
            _fetched,
            backend,
            tensor,
        )
    yield attempt("nothing", lambda: _arrays(backend.fetch([])(), []))
    yield attempt(
        "overwritten after the call", lambda: _overwritten(backend, torch.zeros(64, 64), 1.0)
    )
    yield attempt(
        "overwritten after the call, large", lambda: _overwritten(backend, torch.zeros(2**22), 1.0)
    )
    yield attempt("two under way", lambda: _two(backend))
    yield attempt("the answer asked for twice", lambda: _twice(backend))


def _fetched(backend: Backend, tensor: torch.Tensor) -> str | None:
    wait = backend.fetch([tensor.to(backend.caps.input_device)])
    return _arrays(wait(), [tensor.numpy()])


def _arrays(got: list[NDArray[Any]], want: list[NDArray[Any]]) -> str | None:
    if len(got) != len(want):
        return f"gave {len(got)} arrays, not {len(want)}"
    for a, b in zip(got, want, strict=True):
        if not isinstance(a, np.ndarray) or a.dtype != b.dtype:
            return f"gave {getattr(a, 'dtype', type(a).__name__)}, not {b.dtype}"
        wrong = same_bits(a, b)
        if wrong is not None:
            return wrong
    return None


def _overwritten(backend: Backend, values: torch.Tensor, after: float) -> str | None:
    with torch.inference_mode():
        tensor = values.to(backend.caps.input_device).clone()
        wait = backend.fetch([tensor])
        tensor.fill_(after)
        return _arrays(wait(), [values.numpy()])


def _two(backend: Backend) -> str | None:
    first, second = torch.full((9,), 1.0), torch.full((9,), 2.0)
    device = backend.caps.input_device
    waits = [backend.fetch([t.to(device)]) for t in (first, second)]
    got = [waits[1]()[0], waits[0]()[0]]
    return _arrays(got, [second.numpy(), first.numpy()])


def _twice(backend: Backend) -> str | None:
    values = torch.arange(6.0)
    wait = backend.fetch([values.to(backend.caps.input_device)])
    kept = wait()
    backend.fetch([torch.zeros(6).to(backend.caps.input_device)])()
    return _arrays(kept, [values.numpy()]) or _arrays(wait(), [values.numpy()])


@check("C22.attn_inputs", "attn_inputs is a pure function of the host batch, in int32.")
def attn_inputs(kit: Kit) -> Iterator[Case]:
    """For decode, prompts, continued and mixed batches: the same arrays twice, from the same
    backend after other batches; the batch is left as it was; int32 only; where programs have
    fixed inputs, the same names and shapes for every batch of a bucket.
    """
    backend, caps = kit.open(), kit.caps
    block = caps.block_sizes[0]
    seen: dict[Any, tuple[str, dict[str, tuple[int, ...]]]] = {}
    kept: list[tuple[HostBatch, Mapping[str, NDArray[Any]]]] = []
    for name, works in rows_of(caps, block).items():
        longer = [(c + block, n) if c else (c, max(1, n - 1)) for c, n in works]
        texts = [[1] * (c + n + block) for c, n in works]
        for seed, rows in enumerate((works, longer)):
            scene = Scene(caps, texts, block_size=block, seed=seed)
            for packed in scene.launches([Work(i, c, n) for i, (c, n) in enumerate(rows)]):
                label = f"{name} in {packed.host.bucket}, seed {seed}"
                yield attempt(label, _pure, backend, packed, kept)
                if caps.shapes.static or caps.graphs != "none":
                    yield attempt(
                        f"names and shapes of {label}",
                        _fixed,
                        backend,
                        packed,
                        label,
                        seen,
                    )
    for host, want in kept:
        yield attempt(
            f"{host.bucket} again, after all others",
            _again,
            backend,
            host,
            want,
        )


def _pure(
    backend: Backend, packed: Packed, kept: list[tuple[HostBatch, Mapping[str, NDArray[Any]]]]
) -> str | None:
    host = packed.host
    before = {n: a.copy() for n, a in _host_arrays(host).items()}
    first = {n: a.copy() for n, a in backend.attn_inputs(host).items()}
    for name, array in _host_arrays(host).items():
        if not np.array_equal(array, before[name]):
            return f"it changed {name} of the host batch"
    second = backend.attn_inputs(host)
    for name, array in second.items():
        if array.dtype != np.int32:
            return f"{name} is {array.dtype}, not int32"
    wrong = _equal(second, first)
    if wrong is not None:
        return f"the second call differs: {wrong}"
    kept.append((host, first))
    return None


def _host_arrays(host: HostBatch) -> dict[str, NDArray[Any]]:
    named = {f.name: getattr(host, f.name) for f in fields(host)}
    return {name: value for name, value in named.items() if isinstance(value, np.ndarray)}


def _equal(got: Mapping[str, NDArray[Any]], want: Mapping[str, NDArray[Any]]) -> str | None:
    if got.keys() != want.keys():
        return f"names {sorted(got)}, before {sorted(want)}"
    for name, array in want.items():
        wrong = same_bits(got[name], array)
        if wrong is not None:
            return f"{name}: {wrong}"
    return None


def _again(backend: Backend, host: HostBatch, want: Mapping[str, NDArray[Any]]) -> str | None:
    return _equal(backend.attn_inputs(host), want)


def _fixed(
    backend: Backend, packed: Packed, label: str,
    seen: dict[Any, tuple[str, dict[str, tuple[int, ...]]]],
) -> str | None:  # fmt: skip
    shapes = {n: a.shape for n, a in backend.attn_inputs(packed.host).items()}
    key = (packed.host.bucket, packed.host.block_table.shape)
    before = seen.setdefault(key, (label, shapes))
    return None if before[1] == shapes else f"{shapes}, but {before[1]} for {before[0]}"


CHECKS: tuple[Check, ...] = (fetch, attn_inputs)
