"""A checkpoint's tensors on their way to being packed, without the file staying in memory.

The core maps weight files and hands out tensors that lie in the mapping. Whatever has been read of
it stays resident until the file is closed, so that a model would be in memory twice at the end of
loading. Here the pages are let go after some tensors; a part that keeps its tensor (an embedding)
gets those that it touches again from the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tokenry.backend.base import WeightIter
from tokenry_cpu import native

MAPS = Path("/proc/self/maps")
BATCH_BYTES = 16 * 2**20
"""Bytes of tensors after which what was read of the file is given back."""
TRIM_BATCHES = 2
"""Batches after which holes in the heap are given back, too: the next tensors fit into those that
the last ones left, and memory that comes anew from the kernel takes longer than a copy into it.
"""


def let_go(weights: WeightIter) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; as the next ones are asked for, the file of the last ones leaves memory."""
    library, read, batches = native.library(), 0, 0
    last: Tensor | None = None
    span: tuple[int, int] | None = None

    def flush(*, trim: bool) -> None:
        if span is not None:
            library.tk_let_go(span[0], span[1] - span[0])
        if trim:
            library.tk_trim()  # copies on the way leave holes in the heap

    for name, tensor in weights:
        yield name, tensor
        at = tensor.data_ptr()
        if span is None or not span[0] <= at < span[1]:
            if span is not None:
                flush(trim=True)
            span = mapping_of(at)
            last = None if span is None else tensor  # as long as it is here, so is the mapping
        read += tensor.nbytes
        if read > BATCH_BYTES:
            batches += 1
            flush(trim=batches % TRIM_BATCHES == 0)
            read = 0
    flush(trim=True)
    del last


def mapping_of(address: int) -> tuple[int, int] | None:
    """Begin and end of the mapped file in which an address lies, None if it is in none.

    Only private mappings: nobody writes into a checkpoint's tensors, so what is let go is what the
    file has. (proc(5): address range, permissions, offset, device, inode, path. The path is the
    real one, in a hub's cache a name without .safetensors.)
    """
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        span, permissions, _, _, inode, *path = line.split(None, 5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            mapped = inode != "0" and permissions.endswith("p") and path[0].startswith("/")
            return (begin, end) if mapped else None
    return None
