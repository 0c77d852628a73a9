"""What grammars let be drawn, as -inf on logits: all rows of a launch in one operation.

In: logits [R, vocab], per row a `Mask` of the plan or None. Out: the logits without what may not be
drawn, in place. On a device the shapes depend on the launch's rows and the vocabulary alone, so one
that compiles for shapes meets no new one; on the host each row is done by itself. A mask is waited
for here, after the model was launched: it is made while the model runs. Knows no grammar.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.errors import Refusal, RequestError
from tokenry.plan import Mask

WORD = 32


def apply_masks(out: Tensor, masks: Sequence[Mask | None], device: str) -> dict[int, Refusal]:
    """Rows of `out` [R, vocab] with a mask keep what it allows, the rest becomes -inf, in place.

    Gives, by row, why its grammar cannot go on; such a row is left as it is.
    """
    if not any(masks):
        return {}
    vocab = out.shape[-1]
    packed = np.full((len(masks), -(-vocab // WORD)), -1, np.int32)
    refused: dict[int, Refusal] = {}
    for i, mask in enumerate(masks):
        if mask is None:
            continue
        try:
            bits = mask()
        except RequestError as error:
            refused[i] = Refusal.of(error)
            continue
        known = min(len(bits), packed.shape[1])
        packed[i, :known] = bits[:known]
        packed[i, known:] = 0
    if out.device.type == "cpu":
        _on_host(out, packed, [i for i, mask in enumerate(masks) if mask is not None])
    else:
        on_device(out, packed, device)
    return refused


def _on_host(out: Tensor, packed: NDArray[np.int32], rows: Sequence[int]) -> None:
    vocab = out.shape[-1]
    for i in rows:
        bits = np.unpackbits(packed[i].view(np.uint8), bitorder="little")[:vocab]
        out[i].masked_fill_(torch.from_numpy(bits) == 0, -torch.inf)


def on_device(out: Tensor, packed: NDArray[np.int32], device: str) -> None:
    """All rows at once from [R, num_words] int32; the copy is a bit per token."""
    words = torch.from_numpy(packed).to(device, non_blocking=True)
    shifts = torch.arange(WORD, dtype=torch.int32, device=device)
    allowed = (words[:, :, None] >> shifts) & 1
    out.masked_fill_(allowed.view(len(packed), -1)[:, : out.shape[-1]] == 0, -torch.inf)
