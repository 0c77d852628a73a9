"""Weights from disk, one tensor at a time.

In: a directory with *.safetensors (one file, or several with an index). Out: (name, tensor) pairs
on the host, memory-mapped, so that no more than one tensor is copied at once. Knows nothing of what
a model makes of them; every error names the file and the tensor.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenry.errors import ModelLoadError
from tokenry.models.config import read_json

INDEX = "model.safetensors.index.json"
Progress = Callable[[float], None]
AGAIN = "download it again: huggingface-cli download <model> --force-download"
MAX_HEADER = 100 * 2**20
"""The format's own limit on a header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weight files of a model. `files` is tensor name -> file, in the order they are read."""

    path: Path
    files: Mapping[str, Path]
    num_bytes: int

    def where(self, name: str) -> str:
        """The file of a tensor, or the directory if none has it."""
        return str(self.files.get(name, self.path))

    def stream(self, progress: Progress = lambda share: None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, file by file. Raises ModelLoadError for one that is not finite."""
        done = 0
        for file in dict.fromkeys(self.files.values()):
            names = [name for name, at in self.files.items() if at == file]
            with _open(file) as tensors:
                for name in names:
                    tensor = _read(file, tensors, name)
                    done += tensor.nbytes
                    yield name, tensor
                    progress(min(1.0, done / max(1, self.num_bytes)))
        progress(1.0)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in directory `path`; only headers are read."""
    wanted = _wanted(path)
    files: dict[str, Path] = {}
    num_bytes = 0
    for file in sorted(wanted):
        names, size = read_header(file)
        num_bytes += size
        files.update(dict.fromkeys(names, file))
    for file, names in wanted.items():
        lacking = [name for name in names if name not in files]
        if lacking:
            raise ModelLoadError(
                f"{path / INDEX} says that {file.name} holds {lacking[0]!r}, but it does not.",
                mend=AGAIN,
            )
    return Checkpoint(path=path, files=files, num_bytes=num_bytes)


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of the checkpoint. Raises ModelLoadError if there is none of that name."""
    file = checkpoint.files.get(name)
    if file is None:
        raise ModelLoadError(
            f"{checkpoint.path} has no tensor {name}.",
            mend="are config.json and the weights of one model, and is the download complete?",
        )
    with _open(file) as tensors:
        return _read(file, tensors, name)


def stream_weights(
    path: Path, progress: Progress = lambda share: None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint in directory `path`, file by file."""
    yield from open_checkpoint(path).stream(progress)


def weight_bytes(path: Path) -> int:
    """Bytes of all tensors on disk, from the headers."""
    return open_checkpoint(path).num_bytes


def _wanted(path: Path) -> dict[Path, list[str]]:
    """The files to read, each with the tensors that an index promises of it."""
    index = path / INDEX
    if index.is_file():
        table = read_json(index, mend=AGAIN).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ModelLoadError(f"{index} has no weight_map.", mend=AGAIN)
        wanted: dict[Path, list[str]] = {}
        for name, file in table.items():
            wanted.setdefault(path / str(file), []).append(name)
        missing = [file.name for file in sorted(wanted) if not file.is_file()]
        if missing:
            raise ModelLoadError(
                f"{path} lacks {len(missing)} of {len(wanted)} weight files: "
                f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}.",
                mend=AGAIN,
            )
        return wanted
    single = path / "model.safetensors"
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if files:
        return {file: [] for file in files}
    pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")) + sorted(path.glob("*.pth"))
    if pickled:
        raise ModelLoadError(
            f"{path} has its weights as {pickled[0].name}, which can run code when it is read.",
            mend='convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}').save_pretrained('{path}')\"",
        )
    raise ModelLoadError(
        f"{path} has no *.safetensors.",
        mend="download the weights, or --load-format dummy for random ones",
    )


def read_header(file: Path) -> tuple[list[str], int]:
    """Names and bytes of a file's tensors. Raises ModelLoadError if it is cut short.

    Format: 8 bytes little-endian length, a JSON object, then the data
    (huggingface.co/docs/safetensors).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
            text = stream.read(length) if length <= min(size, MAX_HEADER) else b""
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror}.", mend=AGAIN) from error
    try:
        header = json.loads(text)
        ends = {n: t["data_offsets"] for n, t in header.items() if n != "__metadata__"}
        last = max((end for _, end in ends.values()), default=0)
        total = sum(end - begin for begin, end in ends.values())
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"{file} ({size} bytes) is no safetensors file, or cut short in its header.", mend=AGAIN
        ) from error
    if 8 + length + last > size:
        raise ModelLoadError(
            f"{file} is cut short: {size} bytes, its header promises {8 + length + last}.",
            mend=AGAIN,
        )
    return list(ends), total


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} cannot be opened: {error}.", mend=AGAIN) from error


def _read(file: Path, tensors: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = tensors.get_tensor(name)
    except SafetensorError as error:
        raise ModelLoadError(f"{file}: {name} cannot be read: {error}.", mend=AGAIN) from error
    if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
        low, high = torch.aminmax(tensor)  # both are NaN if any element is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ModelLoadError(
                f"{file}: {name} holds NaN or infinite values.",
                mend=f"{AGAIN}; if they come back, the training went wrong",
            )
    return tensor


def dummy_weights(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, progress: Progress = lambda share: None
) -> Iterator[tuple[str, Tensor]]:
    """Random tensors of the given shapes, always the same: scales are 1, biases 0, the rest small.

    For benchmarks, where the values do not matter but NaN would.
    """
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    for at, (name, shape) in enumerate(shapes.items()):
        progress(at / len(shapes))
        if len(shape) > 1:
            value = torch.randn(shape, generator=generator).mul_(0.02).to(kind)
        else:
            value = torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=kind)
        yield name, value
    progress(1.0)
