"""A checkpoint's tensors on their way to being packed, without the file staying in memory.

The core maps weight files and hands out tensors that lie in the mapping. Whatever has been read of
it stays resident until the file is closed, so that a model would be in memory twice at the end of
loading. Here the pages are let go tensor by tensor; a part that keeps its tensor (an embedding)
gets those that it touches again from the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tokenry.backend.base import WeightIter
from tokenry_cpu import native

MAPS = Path("/proc/self/maps")
TRIM_BYTES = 16 * 2**20


def let_go(weights: WeightIter) -> Iterator[tuple[str, Tensor]]:
    """The same tensors; when the next one is asked for, the file of the last leaves memory."""
    library, untrimmed = native.library(), 0
    for name, tensor in weights:
        yield name, tensor
        at = mapping_of(tensor.data_ptr())
        if at is not None:
            library.tk_let_go(at[0], at[1] - at[0])
        untrimmed += tensor.nbytes
        if untrimmed > TRIM_BYTES:  # copies on the way leave holes in the heap
            library.tk_trim()
            untrimmed = 0
    library.tk_trim()


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
