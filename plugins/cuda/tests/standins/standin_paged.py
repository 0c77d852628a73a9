"""Attention over paged KV in plain torch, and the refusals that the real libraries make.

Nothing here looks at a value: it runs in a capture. What a request's last page holds beyond its end
is NaN-safe, as in the libraries. CALLS counts what was called.
"""

from __future__ import annotations

from collections import Counter

import torch

CALLS = Counter()


class Refused(TypeError):
    """What the real library would refuse."""


def refuse(wrong, text):
    if wrong:
        raise Refused(text)


def check_kv(q, k, v, table, *, most_dim=256):
    """The checks that all of them have: device, dtype, layout, heads."""
    refuse(q.dtype not in (torch.float16, torch.bfloat16), f"q is {q.dtype}")
    for name, t in {"k": k, "v": v}.items():
        refuse(t.dtype != q.dtype, f"{name} is {t.dtype}, q {q.dtype}")
        refuse(t.device != q.device, f"{name} is on {t.device}")
        refuse(t.ndim != 4, f"{name} {t.shape}: [pages, page, heads, dim]")
        refuse(t.stride(-1) != 1, f"{name}: the last dimension is not contiguous")
    refuse(q.stride(-1) != 1, "q: the last dimension is not contiguous")
    refuse(k.shape != v.shape, f"k {k.shape}, v {v.shape}")
    refuse(q.shape[-1] != k.shape[-1], f"head dim {q.shape[-1]} and {k.shape[-1]}")
    refuse(q.shape[-1] % 8 != 0 or q.shape[-1] > most_dim, f"head dim {q.shape[-1]}")
    refuse(q.shape[-2] % k.shape[-2] != 0, f"{q.shape[-2]} heads over {k.shape[-2]}")
    refuse(table.dtype != torch.int32 or table.ndim != 2, f"table {table.dtype} {table.shape}")
    refuse(table.stride(-1) != 1, "table: the last dimension is not contiguous")


def check_lens(tensor, size, name):
    """int32, contiguous, of the right length."""
    refuse(not isinstance(tensor, torch.Tensor), f"{name} is a {type(tensor).__name__}")
    refuse(tensor.dtype != torch.int32, f"{name} is {tensor.dtype}")
    refuse(tensor.shape != (size,), f"{name} is {tuple(tensor.shape)}, not {size}")
    refuse(not tensor.is_contiguous(), f"{name} is not contiguous")


def check_rule(scale, causal, window, softcap):
    """Python numbers, causal."""
    refuse(type(scale) is not float or type(softcap) is not float, f"{scale!r}, {softcap!r}")
    refuse(causal is not True, "not causal")
    refuse(type(window) is not tuple or len(window) != 2, f"window {window!r}")
    refuse(not all(type(w) is int for w in window), f"window {window!r}")


def check_host(value, name, least):
    """A number that the host knows."""
    refuse(type(value) is not int or value < least, f"{name} is {value!r}")


def attend(q, k, v, table, lens, starts, *, scale, window, softcap=0.0, sinks=None):
    """[T, H, D]; starts [S + 1]: rows of each request, aligned to the end of its keys. Rows of no
    request are NaN: the real ones leave them as they were.
    """
    rows = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    owner = (torch.searchsorted(starts, rows, right=True) - 1).clamp(0, len(lens) - 1)
    position = lens[owner] - (starts[owner + 1] - rows)
    out = torch.full_like(q, torch.nan)
    for i in range(len(lens)):
        keys, values = (t[table[i].long()].flatten(0, 1).float() for t in (k, v))
        at = torch.arange(keys.shape[0], device=q.device)
        inside = (at < lens[i])[:, None, None]
        group = q.shape[1] // k.shape[2]
        keys, values = (
            torch.where(inside, t, 0.0).repeat_interleave(group, 1) for t in (keys, values)
        )
        scores = torch.einsum("thd,lhd->thl", q.float(), keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        seen = at <= position[:, None]
        if window[0] >= 0:
            seen = seen & (at >= position[:, None] - window[0])
        scores = torch.where(seen[:, None], scores, -torch.inf)
        if sinks is not None:
            extra = sinks.float().view(1, -1, 1).expand(len(scores), -1, 1)
            scores = torch.cat((scores, extra), -1)
        p = torch.softmax(scores, -1)[..., : keys.shape[0]]
        p = torch.where((position >= 0)[:, None, None], p, 0.0)  # no key at all: 0
        mine = (owner == i) & (rows < starts[-1])
        found = torch.einsum("thl,lhd->thd", p, values).to(q.dtype)
        out = torch.where(mine[:, None, None], found, out)
    return out
