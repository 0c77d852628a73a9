"""A tiny model on the backend under test, stepped by hand.

In: a kit. Out: `Stepper`: prompts and single tokens through `build_model` and `compile`, in legal
buckets, with the logits of each row compared with the model on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tokenry.backend.base import Program, StepBatch
from tokenry.backend.contract import Bucket, HostBatch
from tokenry.backend.ops import OpTable
from tokenry.conformance.compare import difference
from tokenry.conformance.kit import Kit
from tokenry.conformance.paged import fetched
from tokenry.conformance.scenes import Packed, Scene, Work, on_device
from tokenry.conformance.tiny import VOCAB, kv_spec

MARGIN = 1.0
"""Logits this close may swap places where a model's tokens, not its logits, are all we see."""


def texts_of(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, all of one length."""
    rng = np.random.default_rng(seed)
    return [[int(t) for t in rng.integers(2, VOCAB, length)] for _ in range(count)]


class Stepper:
    """One backend with the model on it and KV for the texts.

    compiled   each bucket's program is made by `compile` and executed once before it is used; else
               the step runs as `build_model` gave it.
    """

    def __init__(
        self,
        kit: Kit,
        texts: Sequence[Sequence[int]],
        *,
        compiled: bool = True,
        family: str = "llama",
        seed: int = 0,
    ) -> None:
        self.kit, self.compiled = kit, compiled
        self.backend = kit.open()
        self.model = kit.model(family)
        caps = self.backend.caps
        spec = kit.spec(family)
        self.step_fn = self.backend.build_model(
            spec, spec.weights(lambda share: None), OpTable(self.backend.ops())
        )
        self.scene = Scene(caps, texts, block_size=caps.block_sizes[0], seed=seed)
        self.kv = self.backend.alloc_kv(
            kv_spec(spec, self.scene.block_size, kit.dtype), self.scene.num_blocks
        )
        self.programs: dict[Bucket, Program] = {}
        self._want: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def step(self, batch: StepBatch) -> torch.Tensor:
        """The step, bound to the KV."""
        return self.step_fn(batch, self.kv)

    def make(self, host: HostBatch, blank: HostBatch) -> Program:
        """The program of the batch's bucket, made with `blank` the first time."""
        program = self.programs.get(host.bucket)
        if program is None:
            with torch.inference_mode():
                example = on_device(blank, self.backend)
                program = self.backend.compile(self.step, example)
                self.backend.fetch([program(example)])()
            self.programs[host.bucket] = program
        return program

    def run(
        self, packed: Packed, *, example: Callable[[Packed], HostBatch] | None = None
    ) -> NDArray[np.float64]:
        """Results of the live requests, in the order of the packed works."""
        blank = (example or self.scene.blank)(packed)
        program = self.make(packed.host, blank) if self.compiled else self.step
        with torch.inference_mode():
            out = program(on_device(packed.host, self.backend))
        self._check_form(out, packed.host.bucket)
        return fetched(self.backend, out)[: len(packed.works)]

    def _check_form(self, out: torch.Tensor, bucket: Bucket) -> None:
        rows = bucket.seqs if bucket.logits == "last" else bucket.tokens
        tokens = self.backend.caps.sampling == "tokens"
        shape, dtype = ((rows,), torch.int32) if tokens else ((rows, VOCAB), torch.float32)
        if tuple(out.shape) != shape or out.dtype != dtype:
            raise ValueError(
                f"a step in {bucket} gave {list(out.shape)} {out.dtype}, not {list(shape)} {dtype}"
            )

    def wrong(self, packed: Packed, got: NDArray[np.float64]) -> str | None:
        """What of the results differs from the model on the host."""
        want = np.stack([self.expected(work) for work in packed.works])
        if self.backend.caps.sampling == "logits":
            return difference(got, want, self.kit.dtype, whole_model=True)
        for row, token in enumerate(got.astype(int)):
            if want[row].max() - want[row][token] > MARGIN:
                return f"row {row} drew {token}, the best was {int(want[row].argmax())}"
        return None

    def expected(self, work: Work) -> NDArray[np.float32]:
        """[VOCAB] after the work's last token."""
        text = tuple(self.scene.texts[work.request])
        if text not in self._want:
            self._want[text] = self.model.logits(text)
        row: NDArray[np.float32] = self._want[text][work.start + work.count - 1]
        return row

    def go(
        self,
        works: Sequence[Work],
        *,
        spare: bool = False,
        example: Callable[[Packed], HostBatch] | None = None,
    ) -> str | None:
        """Run the works as the core would; what is wrong with the results."""
        for packed in self.scene.launches(works, spare=spare):
            wrong = self.wrong(packed, self.run(packed, example=example))
            if wrong is not None:
                return f"in {packed.host.bucket}: {wrong}"
        return None

    def prompts(self, requests: Sequence[int], count: int) -> str | None:
        """The first `count` tokens of each of the requests, one launch after the other."""
        for request in requests:
            wrong = self.go([Work(request, 0, count)])
            if wrong is not None:
                return wrong
        return None
