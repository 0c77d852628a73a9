"""Checks of the ops other than attention, each against the reference op in float32 on the host.

An op that the backend does not offer is the reference op on the backend's device, and is tried all
the same: a device whose plain torch is wrong is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import Backend, Op
from tokenry.backend.ops import OpTable
from tokenry.backend.reference import REFERENCE_OPS
from tokenry.conformance.attention import invariance_claimed
from tokenry.conformance.check import Case, Check, attempt, check, product
from tokenry.conformance.compare import difference, same_bits
from tokenry.conformance.kit import Kit
from tokenry.conformance.paged import fetched, tensors_in

ROWS = (1, 2, 5, 16, 33)
Tensors = Mapping[str, Tensor]


class Bench:
    """A backend's op, and the reference on the same values."""

    def __init__(self, backend: Backend, name: str, **meta: Any) -> None:
        self.backend, self.name = backend, name
        self.op: Op = OpTable(backend.ops()).resolve(name, **meta)
        self.reference: Op = REFERENCE_OPS[name]
        self.device = backend.caps.input_device

    def compare(
        self,
        run: Callable[[Op, Callable[[Tensor], Tensor]], Tensor | tuple[Tensor, ...]],
        dtype: str,
    ) -> str | None:
        """`run(op, put)` calls the op on tensors that went through `put`; all results compared."""
        with torch.inference_mode():
            got = run(self.op, lambda t: t.to(self.device))
            want = run(self.reference, _wide)
        gots = got if isinstance(got, tuple) else (got,)
        wants = want if isinstance(want, tuple) else (want,)
        if len(gots) != len(wants):
            return f"gave {len(gots)} results, not {len(wants)}"
        for i, (a, b) in enumerate(zip(gots, wants, strict=True)):
            if a.dtype != getattr(torch, dtype):
                return f"result {i} is {a.dtype}, not {dtype}"
            wrong = difference(fetched(self.backend, a), b.double().numpy(), dtype)
            if wrong is not None:
                return f"result {i}: {wrong}"
        return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def randn(shape: tuple[int, ...], dtype: str, *, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random values, rounded to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))


@check("C03.linear", "linear is x @ weight.T + bias.")
def linear(kit: Kit) -> Iterator[Case]:
    """1 to 33 rows; inner and outer sizes that are and are not multiples of 16; with and without
    bias; every dtype.
    """
    backend = kit.open()
    for dtype in kit.caps.dtypes:
        for inner, outer in ((64, 96), (40, 100), (256, 48), (17, 33)):
            bench = Bench(backend, "linear", dtype=dtype, in_features=inner, out_features=outer)
            for bias, rows in ((True, 5), *((False, n) for n in ROWS)):
                weights = {"weight": randn((outer, inner), dtype, seed=1, scale=inner**-0.5)}
                if bias:
                    weights["bias"] = randn((outer,), dtype, seed=2)
                x = randn((rows, inner), dtype, seed=3)

                def run(op: Op, put: Any, weights: Tensors = weights, x: Tensor = x) -> Tensor:
                    y: Tensor = op(put(x), op.pack({n: put(w) for n, w in weights.items()}))
                    return y

                yield attempt(
                    f"linear {dtype} [{rows}, {inner}] -> {outer}{' + bias' if bias else ''}",
                    bench.compare,
                    run,
                    dtype,
                )


@check("C03.rms_norm", "rms_norm normalises in float32; with a residual it also gives the sum.")
def rms_norm(kit: Kit) -> Iterator[Case]:
    """Rows and heads ([T, E]; a view [T, H, D] of a wider product), float32 and model-dtype
    weights, with and without residual, very small and very large values.
    """
    backend = kit.open()
    for dtype in kit.caps.dtypes:
        bench = Bench(backend, "rms_norm", dtype=dtype, size=48)
        for shape, scale, residual in (
            ((1, 48), 1.0, False), ((7, 48), 1.0, True), ((5, 4, 48), 1.0, False),
            ((3, 48), 1e-3, True), ((3, 48), 100.0, True), ((33, 48), 1.0, True),
        ):  # fmt: skip
            for weight_dtype in {dtype, "float32"}:

                def run(
                    op: Op, put: Any, shape: Any = shape, scale: float = scale,
                    residual: bool = residual, dtype: str = dtype, weight: str = weight_dtype,
                ) -> Any:  # fmt: skip
                    x = put(randn(shape, dtype, scale=scale))
                    if len(shape) == 3:  # heads of q are a part of the product of q, k and v
                        x = torch.cat((x, x + 1), dim=1)[:, : shape[1]]
                    w = put(1 + randn((48,), weight, seed=1, scale=0.3))
                    if residual:
                        return op(x, w, 1e-5, put(randn(shape, dtype, seed=2, scale=scale)))
                    return op(x, w, 1e-5)

                extra = " + residual" if residual else ""
                yield attempt(
                    f"rms_norm {dtype} {list(shape)} * {scale:g}{extra}, weight {weight_dtype}",
                    bench.compare,
                    run,
                    dtype,
                )


@check("C03.rope", "rope turns the first dims of each head by the row's own position, half-split.")
def rope(kit: Kit) -> Iterator[Case]:
    """Whole and partial rotation, several head dims, positions in any order and repeated; q and k
    are views of one product.
    """
    backend = kit.open()
    for dtype in kit.caps.dtypes:
        for dim, rot in ((32, 32), (64, 32), (16, 16), (80, 80)):
            bench = Bench(backend, "rope", dtype=dtype, head_dim=dim)
            angles = torch.arange(64)[:, None] / 100 ** (torch.arange(rot // 2) / (rot // 2))
            table = torch.stack((angles.cos(), angles.sin()), dim=1)
            positions = torch.tensor([0, 1, 63, 7, 7, 30, 2], dtype=torch.int32)

            def run(
                op: Op, put: Any, dim: int = dim, table: Tensor = table, p: Tensor = positions,
                dtype: str = dtype,
            ) -> Any:  # fmt: skip
                # views of one product, as a layer hands them over
                q, k, _ = (
                    put(randn((7, 8 * dim), dtype)).view(7, 8, dim).split_with_sizes((4, 2, 2), 1)
                )
                return op(q, k, put(p), put(table))

            yield attempt(
                f"rope {dtype} D={dim}, {rot} of them turned",
                bench.compare,
                run,
                dtype,
            )


@check("C03.act_mul", "act_mul is kind(first half) * second half, for silu, gelu and gelu_tanh.")
def act_mul(kit: Kit) -> Iterator[Case]:
    """Each kind on 1 to 33 rows, values up to +-12."""
    backend = kit.open()
    for case in product(dtype=kit.caps.dtypes, kind=("silu", "gelu", "gelu_tanh"), rows=ROWS):
        dtype, kind, rows = str(case["dtype"]), str(case["kind"]), int(str(case["rows"]))
        bench = Bench(backend, "act_mul", dtype=dtype, kind=kind)

        def run(op: Op, put: Any, kind: str = kind, rows: int = rows, dtype: str = dtype) -> Any:
            return op(put(randn((rows, 96), dtype, scale=3.0)), kind)

        yield attempt(
            f"act_mul {kind} {dtype} [{rows}, 96]",
            bench.compare,
            run,
            dtype,
        )


@check(
    "C03.moe",
    "moe adds up the top_k experts of each row by their softmax weights, renormalised if asked.",
)
def moe(kit: Kit) -> Iterator[Case]:
    """1 to 33 rows over 4 experts, top 1, 2 and all; renormalised and not; two rows with the same
    logits for two experts (the lower one wins).
    """
    backend = kit.open()
    for case in product(
        dtype=kit.caps.dtypes, top_k=(1, 2, 4), renormalize=(True, False), rows=(1, 5, 33)
    ):
        dtype, top_k, rows = str(case["dtype"]), int(str(case["top_k"])), int(str(case["rows"]))
        bench = Bench(backend, "moe", dtype=dtype, num_experts=4, top_k=top_k, kind="silu")
        router = randn((rows, 4), dtype, seed=4, scale=2.0)
        router[0] = torch.tensor([0.5, 2.0, 2.0, -1.0])

        def run(
            op: Op, put: Any, router: Tensor = router, case: Mapping[str, Any] = case,
        ) -> Any:  # fmt: skip
            dtype = str(case["dtype"])
            weights = {
                "w13": put(randn((4, 64, 48), dtype, seed=1, scale=0.15)),
                "w2": put(randn((4, 48, 32), dtype, seed=2, scale=0.15)),
            }
            return op(
                put(randn((case["rows"], 48), dtype)), put(router), op.pack(weights),
                top_k=case["top_k"], renormalize=case["renormalize"], kind="silu",
            )  # fmt: skip

        yield attempt(
            f"moe {dtype} [{rows}, 48] top {top_k}{' renormalised' if case['renormalize'] else ''}",
            bench.compare,
            run,
            dtype,
        )


PACKED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "linear": {"weight": (48, 32), "bias": (48,)},
    "moe": {"w13": (4, 64, 32), "w2": (4, 32, 32)},
}


@check("C25.pack", "pack leaves the weights that it was given as they were, and is deterministic.")
def pack(kit: Kit) -> Iterator[Case]:
    """Linear and moe: the given tensors before and after, bit for bit; two packs of the same
    weights hold the same values; one pack's result is not changed by the next.
    """
    backend = kit.open()
    for dtype in kit.caps.dtypes:
        for name, shapes in PACKED.items():
            yield attempt(
                f"pack of {name} {dtype}",
                _packed,
                backend,
                name,
                shapes,
                dtype,
            )


def _packed(
    backend: Backend, name: str, shapes: Mapping[str, tuple[int, ...]], dtype: str
) -> str | None:
    meta: dict[str, Any] = {"in_features": 32, "out_features": 48}
    if name == "moe":
        meta = {"num_experts": 4, "top_k": 2, "kind": "silu"}
    op = Bench(backend, name, dtype=dtype, **meta).op
    weights = {n: randn(s, dtype, seed=9).to(backend.caps.input_device) for n, s in shapes.items()}
    kept = {n: w.clone() for n, w in weights.items()}
    first = op.pack(weights)
    values = [fetched(backend, t) for t in _plain(first)]
    for n, weight in weights.items():
        wrong = same_bits(fetched(backend, weight), fetched(backend, kept[n]))
        if wrong is not None:
            return f"the given {n} was changed: {wrong}"
    op.pack({n: w + 1 for n, w in weights.items()})
    now = [fetched(backend, t) for t in _plain(first)]
    again = [fetched(backend, t) for t in _plain(op.pack(weights))]
    for what, arrays in (("another pack changed the result", now), ("packed again", again)):
        for a, b in zip(arrays, values, strict=True):
            wrong = same_bits(a, b)
            if wrong is not None:
                return f"{what}: {wrong}"
    return None


def _plain(packed: Any) -> list[Tensor]:
    """The tensors of a pack whose values can be looked at (not a library's own layout)."""
    return [t for t in tensors_in(packed) if t.layout is torch.strided]


@check(
    "C07.ops",
    "The bits of a row of linear, rms_norm, act_mul and moe do not depend on the other rows.",
    asked=invariance_claimed,
)
def invariance(kit: Kit) -> Iterator[Case]:
    """Rows of a batch of 33 alone and in slices of 2, 5 and 16: the same bits."""
    backend = kit.open()
    for dtype in kit.caps.dtypes:
        calls = _row_calls(backend, dtype)
        for name, call in calls.items():
            x = randn((33, 64), dtype, seed=6)
            yield attempt(
                f"{name} {dtype} [33, 64]",
                _rows_alone,
                backend,
                call,
                x.to(backend.caps.input_device),
            )


def _row_calls(backend: Backend, dtype: str) -> dict[str, Callable[[Tensor], Tensor]]:
    put = backend.caps.input_device
    lin = Bench(backend, "linear", dtype=dtype, in_features=64, out_features=160).op
    weights = lin.pack({"weight": randn((160, 64), dtype, scale=0.1).to(put)})
    norm = Bench(backend, "rms_norm", dtype=dtype, size=64).op
    scale = randn((64,), dtype).to(put)
    act = Bench(backend, "act_mul", dtype=dtype, kind="silu").op
    experts = Bench(backend, "moe", dtype=dtype, num_experts=4, top_k=2, kind="silu").op
    packed = experts.pack(
        {"w13": randn((4, 96, 64), dtype, scale=0.1).to(put),
         "w2": randn((4, 64, 48), dtype, scale=0.1).to(put)}
    )  # fmt: skip
    return {
        "linear": lambda x: lin(x, weights),
        "rms_norm": lambda x: norm(x, scale, 1e-6),
        "act_mul": lambda x: act(x, "silu"),
        "moe": lambda x: experts(
            x, x[:, :4] * 3, packed, top_k=2, renormalize=True, kind="silu"
        ),
    }  # fmt: skip


def _rows_alone(backend: Backend, call: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    with torch.inference_mode():
        whole = fetched(backend, call(x))
        for rows in (1, 2, 5, 16):
            for start in (0, 7, 33 - rows):
                got = fetched(backend, call(x[start : start + rows]))
                wrong = same_bits(got, whole[start : start + rows])
                if wrong is not None:
                    return f"{rows} rows from row {start}: {wrong}"
    return None


CHECKS: tuple[Check, ...] = (linear, rms_norm, rope, act_mul, moe, pack, invariance)
