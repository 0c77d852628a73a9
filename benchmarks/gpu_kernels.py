"""Triton's kernels alone, beside what the device can do at most: copies and matrix products.

    python benchmarks/gpu_kernels.py [--tune] [--attention flash ...] [--small] [--json FILE]

Shapes of Llama-3.1-8B, bfloat16: decode attention (bytes of keys and values read, a share of the
measured copy rate), prefill attention (operations below the diagonal, a share of the measured
matrix rate), products with weights in int8, int4 and FP8 for 16 rows (bytes of weights). Times are
medians of seven, after one run. Aims: decode 80 % and prefill 50 %.

--tune       once more, with tiles measured here and kept (they show what the table costs)
--attention  libraries of the plugin's (flash, flashinfer, aiter), beside the own kernels
--small      shapes that a test can run
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import Op, StepBatch
from tokenry.backend.contract import Bucket
from tokenry_triton.attention import write_kv
from tokenry_triton.gpu.choice import milliseconds
from tokenry_triton.ops import triton_ops
from tokenry_triton.tune import Tuner

Call = Callable[[], object]
HEADS, KV_HEADS, DIM, HIDDEN, OUT, BLOCK = 32, 8, 128, 4096, 6144, 16
DECODE = ((64, 4096), (256, 1024), (16, 8192), (1, 32768), (1, 1024))
"""Requests and keys of each; the tuner takes the first. The last fits into the cache of most."""
PREFILL = (1024, 8192)
SMALL_DECODE, SMALL_PREFILL = ((2, 40),), (20,)
PLUGINS = {"flash": "tokenry_cuda", "flashinfer": "tokenry_cuda", "aiter": "tokenry_rocm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A launch: milliseconds, its rate (GB/s or TFLOP/s) and the share of the device's."""

    what: str
    who: str
    ms: float
    rate: float
    unit: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What was measured of the device. copy: GB/s, bytes read and written; matrix: TFLOP/s."""

    copy: float
    matrix: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where and how it is measured; heads, KV heads, head dim."""

    device: str
    timer: Callable[[Call], float]
    sizes: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16

    def peak(self, size: int) -> Peak:
        """From a copy of size MiB and a product of matrices of `size` * 4 rows."""
        source = torch.ones(size << 20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copied = self.timer(lambda: target.copy_(source))
        n = 4 * size
        a, b = (torch.ones(n, n, dtype=self.dtype, device=self.device) for _ in range(2))
        multiplied = self.timer(lambda: torch.mm(a, b))
        return Peak(copy=2 * source.nbytes / copied / 1e6, matrix=2 * n**3 / multiplied / 1e9)

    def attention(
        self,
        op: Op,
        who: str,
        peak: Peak,
        decodes: Sequence[tuple[int, int]],
        prompts: Sequence[int],
    ) -> Iterator[Row]:
        """Decode of so many requests of so many keys, prompts of so many tokens."""
        heads, kv_heads, dim = self.sizes
        for seqs, length in decodes:
            call = self._call(op, [(length - 1, 1)] * seqs)
            size = 2 * seqs * length * kv_heads * dim * self.dtype.itemsize
            yield _row(f"decode {seqs} x {length}", who, self.timer(call), size, peak.copy, "GB/s")
        for tokens in prompts:
            call = self._call(op, [(0, tokens)])
            work = 2 * tokens * (tokens + 1) * heads * dim
            yield _row(f"prefill {tokens}", who, self.timer(call), work, peak.matrix, "TFLOP/s")

    def products(
        self, op: Any, who: str, peak: Peak, hidden: int, out: int, formats: Sequence[str]
    ) -> Iterator[Row]:
        """16 rows with weights [out, hidden] of each format."""
        weight = torch.randn(out, hidden, device=self.device)
        x = torch.randn(16, hidden, device=self.device).to(self.dtype)
        for name in formats:
            packed = op.quantize({"weight": weight}, name)
            held = packed["narrow"]
            size = held.values.nbytes + held.scales.nbytes
            ms = self.timer(lambda packed=packed: op(x, packed))  # type: ignore[misc]
            yield _row(f"linear {name} 16 x {out} x {hidden}", who, ms, size, peak.copy, "GB/s")

    def _call(self, op: Op, works: Sequence[tuple[int, int]]) -> Call:
        """An op's call for requests of (cached, new) tokens in blocks of their own."""
        heads, kv_heads, dim = self.sizes
        widest = max(-(-(cached + new) // BLOCK) for cached, new in works)
        tokens = sum(new for _, new in works)
        kv = torch.randn(2, len(works) * widest + 1, BLOCK, kv_heads, dim, device=self.device)
        product = torch.randn(tokens, heads + 2 * kv_heads, dim, device=self.device).to(self.dtype)
        q, k, v = product.split_with_sizes((heads, kv_heads, kv_heads), 1)
        layer, batch = kv.to(self.dtype), self._batch(works, widest)
        return lambda: op(q, k, v, layer, batch, scale=dim**-0.5)

    def _batch(self, works: Sequence[tuple[int, int]], widest: int) -> StepBatch:
        S = len(works)
        table = 1 + torch.arange(S * widest).view(S, widest)
        positions = torch.cat([torch.arange(cached, cached + new) for cached, new in works])
        lens = torch.tensor([new for _, new in works])
        owner = torch.repeat_interleave(torch.arange(S), lens)
        phase = "decode" if int(lens.max()) == 1 else "prefill"
        parts: Mapping[str, Tensor] = {
            "token_ids": positions, "positions": positions, "block_table": table, "q_lens": lens,
            "slots": table[owner, positions // BLOCK] * BLOCK + positions % BLOCK,
            "q_start": torch.cat((lens.new_zeros(1), lens.cumsum(0))),
            "seq_lens": torch.tensor([cached + new for cached, new in works]),
            "logit_rows": lens.cumsum(0) - 1,
        }  # fmt: skip
        given: dict[str, Any] = {n: t.to(self.device, torch.int32) for n, t in parts.items()}
        bucket = Bucket(phase=phase, seqs=S, tokens=len(positions), kv_blocks=widest)  # type: ignore[arg-type]
        return StepBatch(bucket=bucket, extra={}, **given)


def _row(what: str, who: str, ms: float, amount: float, peak: float, unit: str) -> Row:
    rate = amount / ms / (1e6 if unit == "GB/s" else 1e9)
    return Row(what=what, who=who, ms=ms, rate=rate, unit=unit, share=rate / peak)


def measure(
    bench: Bench,
    arch: str,
    *,
    small: bool = False,
    tune: bool = False,
    libraries: Sequence[str] = (),
) -> tuple[Peak, list[Row]]:
    """Peaks and rows of one device."""
    peak = bench.peak(1 if small else 1024)
    decodes, prompts = (SMALL_DECODE, SMALL_PREFILL) if small else (DECODE, PREFILL)
    hidden, out = (64, 32) if small else (HIDDEN, OUT)
    formats = ["int8", "int4", *(["fp8"] if arch not in ("sm_80", "gfx90a") else [])]
    own = triton_ops(arch)
    rows = [*bench.attention(own["attention"], "table", peak, decodes, prompts)]
    rows += bench.products(own["linear"], "table", peak, hidden, out, formats)
    for name in libraries:
        make = import_module(f"{PLUGINS[name]}.providers").PROVIDERS[name]
        provider = make(arch, own["attention"], write_kv)
        rows += bench.attention(provider, name, peak, decodes, prompts)
    if tune:
        with tempfile.TemporaryDirectory() as folder:
            tuner = Tuner(arch, Path(folder), bench.timer)
            ops = triton_ops(arch, tuner=tuner)
            for _ in range(2):  # the first finds the tiles, the second is what they give
                with tuner.warm_up():
                    found = [*bench.attention(ops["attention"], "tuned", peak, decodes, prompts)]
                    found += bench.products(ops["linear"], "tuned", peak, hidden, out, formats)
            rows += found
            print(tuner.path.read_text())
    return peak, rows


def table(peak: Peak, rows: Sequence[Row]) -> Iterator[str]:
    """Lines."""
    yield f"copy {peak.copy:.0f} GB/s, matrix product {peak.matrix:.0f} TFLOP/s"
    yield f"{'launch':30}{'who':12}{'ms':>10}{'rate':>10}{'':9}{'share':>6}"
    for r in rows:
        yield f"{r.what:30}{r.who:12}{r.ms:10.4f}{r.rate:10.1f} {r.unit:8}{100 * r.share:5.0f} %"


def arch_here() -> str:
    """As the plugins name it."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(0).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{10 * major + minor}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--attention", nargs="*", default=[], choices=sorted(PLUGINS))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    bench = Bench(device="cuda", timer=milliseconds, sizes=(HEADS, KV_HEADS, DIM))
    arch = arch_here()
    with torch.inference_mode():
        peak, rows = measure(
            bench, arch, small=args.small, tune=args.tune, libraries=args.attention
        )
    print("\n".join([f"{torch.cuda.get_device_name()} ({arch})", *table(peak, rows)]))
    if args.json:
        found = {"device": torch.cuda.get_device_name(), "arch": arch, "torch": torch.__version__,
                 "python": platform.python_version(), "peak": asdict(peak),
                 "rows": [asdict(row) for row in rows]}  # fmt: skip
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
