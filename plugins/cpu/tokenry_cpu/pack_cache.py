"""Packed weights on disk, so that a second start need not pack again (`pack_cache=DIR`).

In: the weights as they are packed, in the order of loading. Out: packed weights, mapped from the
directory where it has them, else packed and written there. A file says in its head all that its
contents depend on: the checkpoint's files (path, size, time of change), the number of the weight in
the order of loading, shape, bytes of some rows, format, layout of the kernels. A file whose head is
another, or that is not whole, is written anew; one that cannot be written is no failure. What was
done is said in one line at the end of loading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import ModelSpec
from tokenry_cpu import native

log = logging.getLogger("tokenry.cpu")
HEAD = 4096
"""Bytes before the packed values: a page, so that these are mapped at the begin of one."""
END = b"tokenry"
SAMPLED_ROWS = 64
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")


class PackCache:
    """The packed weights of one model. Owned by the backend while it builds that model."""

    def __init__(self, directory: Path, identity: str) -> None:
        """identity: what tells this checkpoint from any other."""
        self._directory = directory / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self._identity = identity
        self._count = 0
        self._found = 0
        self._spoilt = 0
        self._failure = ""

    def weight(self, weight: Tensor, bias: Tensor | None, format: str) -> native.Weight:
        """As native.Weight."""
        weight = weight.contiguous()
        head = self._head(weight, format)
        self._count += 1
        file = self._directory / f"{hashlib.blake2b(head, digest_size=16).hexdigest()}.packed"
        mapped = self._mapped(file, head, weight.shape, format)
        if mapped is not None:
            self._found += 1
            return native.Weight(weight, bias, format, memory=mapped, offset=HEAD)
        packed = native.Weight(weight, bias, format)
        if not self._failure:
            self._write(file, head, packed)
        return packed

    def report(self) -> None:
        """Says what was found and what was not."""
        line = f"pack_cache {self._directory}: {self._found} of {self._count} weights were there"
        if self._spoilt:
            line += f", {self._spoilt} files were cut short or foreign and are written anew"
        if self._failure:
            line += f"; the others could not be written: {self._failure}"
        log.log(logging.WARNING if self._spoilt or self._failure else logging.INFO, "%s", line)

    def _head(self, weight: Tensor, format: str) -> bytes:
        rows = torch.linspace(0, weight.shape[0] - 1, min(SAMPLED_ROWS, weight.shape[0])).long()
        sample = weight[rows].contiguous().view(torch.uint8).numpy().tobytes()
        text = json.dumps(
            {
                "tokenry-cpu layout": native.layout(),
                "checkpoint": self._identity,
                "number": self._count,
                "shape": list(weight.shape),
                "dtype": native.name_of(weight.dtype),
                "format": format,
                "rows": hashlib.blake2b(sample, digest_size=16).hexdigest(),
            }
        )
        return hashlib.blake2b(text.encode()).hexdigest().encode() + text.encode()[: HEAD // 2]

    def _mapped(self, file: Path, head: bytes, shape: torch.Size, format: str) -> mmap.mmap | None:
        """The whole file, None where there is none that can be used."""
        size = native.packed_bytes(shape[0], shape[1], format)
        try:
            with file.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size == HEAD + size + len(END):
                    pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                    if pages[:HEAD] == head.ljust(HEAD) and pages[-len(END) :] == END:
                        return pages
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._failure = str(error)
            return None
        self._spoilt += 1
        return None

    def _write(self, file: Path, head: bytes, packed: native.Weight) -> None:
        """Under another name first: a reader never sees half a file."""
        draft = file.with_suffix(f".{os.getpid()}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as stream:
                stream.write(head.ljust(HEAD))
                stream.write(packed.memory())
                stream.write(END)
            draft.replace(file)
        except OSError as error:
            self._failure = str(error)
            with contextlib.suppress(OSError):
                draft.unlink()


def open_cache(directory: str, spec: ModelSpec) -> PackCache | None:
    """The cache of a checkpoint on disk; None, said, for a model without one (dummy weights)."""
    known: list[str] = [f.name for f in fields(spec)] if is_dataclass(spec) else []
    facts: Any = spec
    if not {"path", "dummy"} <= {*known} or facts.dummy:
        log.warning("pack_cache is not used: the weights come from no file")
        return None
    path: Path = facts.path
    files = sorted({file for pattern in WEIGHT_FILES for file in path.glob(pattern)})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = json.dumps([str(path.resolve()), facts.dtype, stats])
    return PackCache(Path(directory).expanduser(), identity)
