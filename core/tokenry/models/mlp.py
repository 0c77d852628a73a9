"""The parts of a decoder between its attentions: gated and plain MLPs, mixtures of experts.

As in layers.py: plain classes that hold their weights and find their op once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from tokenry.models.layers import Accept, Linear, Loader


class GatedMlp:
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        loader: Loader,
        name: str,
        hidden: int,
        inner: int,
        *,
        kind: str,
        bias: bool = False,
        merged: bool = False,
    ) -> None:
        self._kind = kind
        self._op = loader.ops.resolve("act_mul", dtype=loader.dtype_name, kind=kind)
        if merged:
            self._in = Linear(loader, [f"{name}.gate_up_proj"], [2 * inner], hidden, bias=bias)
        else:
            names = [f"{name}.gate_proj", f"{name}.up_proj"]
            self._in = Linear(loader, names, [inner, inner], hidden, bias=bias)
        self._out = Linear(loader, [f"{name}.down_proj"], [hidden], inner, bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden]."""
        return self._out(self._op(self._in(x), self._kind))


PLAIN_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
"""Of an MLP without a gate, by the `act_mul` op's names."""


class PlainMlp:
    """out(act(in(x))), with biases (GPT-2). sizes: (hidden, inner)."""

    def __init__(
        self, loader: Loader, names: tuple[str, str], sizes: tuple[int, int], *, kind: str
    ) -> None:
        hidden, inner = sizes
        self._act = PLAIN_ACTIVATIONS[kind]
        self._in = Linear(loader, [names[0]], [inner], hidden, bias=True)
        self._out = Linear(loader, [names[1]], [hidden], inner, bias=True)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden]."""
        return self._out(self._act(self._in(x)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoePlan:
    """A mixture of experts and its names in the checkpoint: gate, up and down of an expert."""

    num_experts: int
    top_k: int
    inner: int
    renormalize: bool
    name: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


class Moe:
    """A router and experts through the `moe` op; experts are stacked as they come."""

    def __init__(self, loader: Loader, name: str, hidden: int, plan: MoePlan, kind: str) -> None:
        self._plan, self._kind = plan, kind
        n, inner = plan.num_experts, plan.inner
        self._op = loader.ops.resolve(
            "moe", dtype=loader.dtype_name, num_experts=n, top_k=plan.top_k, kind=kind
        )
        self._router = Linear(loader, [f"{name}.gate"], [n], hidden, bias=False, exact=True)
        self.weights: Any = None
        shapes = {"w13": (n, 2 * inner, hidden), "w2": (n, hidden, inner)}
        raw: dict[str, Tensor] = {}  # only while the experts of this layer come in
        left = 3 * n

        def into(key: str, expert: int, rows: slice) -> Accept:
            def take(tensor: Tensor) -> None:
                nonlocal left
                if key not in raw:
                    raw[key] = tensor.new_empty(shapes[key])
                raw[key][expert, rows].copy_(tensor)
                left -= 1
                if left == 0:
                    whole = {key: raw.pop(key) for key in shapes}
                    self.weights = loader.ops.pack(self._op, whole)

            return take

        gate, up, down = plan.parts
        for e in range(n):
            at = f"{name}.experts.{e}"
            loader.expect(f"{at}.{gate}.weight", (inner, hidden), into("w13", e, slice(0, inner)))
            loader.expect(f"{at}.{up}.weight", (inner, hidden), into("w13", e, slice(inner, None)))
            loader.expect(f"{at}.{down}.weight", (hidden, inner), into("w2", e, slice(None)))

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden]."""
        p = self._plan
        y: Tensor = self._op(
            x,
            self._router(x),
            self.weights,
            top_k=p.top_k,
            renormalize=p.renormalize,
            kind=self._kind,
        )
        return y
