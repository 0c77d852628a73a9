"""The wall between the core and a device: all that either side may know of the other.

In: facts about a device (`DeviceRef`, `Caps`, `MemoryInfo`). Out: what the core asks of it
(`Hooks`, `Bucket`, `HostBatch`, `KVSpec`, ...). Data only, and importing it imports neither torch
nor a driver; the base class with a default for every method is in `base.py`, the ops and their
oracle in `reference.py`.

Version rule: `CONTRACT = (major, minor)`. A minor only adds (a field with a conservative default, a
method with a default, an optional op). The core serves majors M and M-1, of every minor.
1.1: `ShapeRules.mixed_tokens`; of `Caps` `pinned_inputs`, `overlap_pays` and `invariant_option`; of
ops `sinks=` (attention), `takes_narrow` (linear) and `checked` (sample).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pluggy
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenry.backend.base import Backend

CONTRACT = (1, 1)
ENTRY_POINTS = "tokenry.backends"
"""Entry-point group under which a distribution names its hooks object: `cpu = "tokenry_cpu"`."""

hookspec = pluggy.HookspecMarker("tokenry")
hookimpl = pluggy.HookimplMarker("tokenry")

IntArray = NDArray[np.int32]
Phase = Literal["prefill", "decode", "mixed"]
NULL_BLOCK = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRef:
    """What a probe found. score 0: present but unusable, `why` says so; the highest score wins; the
    CPU says 1.
    """

    backend: str
    index: int
    name: str
    score: int
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRules:
    """Which shapes a program may have.

    static        only buckets that were warmed may reach a program.
    uniform_q     tokens == seqs * q: rows are right-padded to one length, so a [seqs, q] view is
                  legal.
    kv_axis       which axis of the KV is a bucket: none (block_table is always max_blocks wide),
                  per_seq (widest block table of the batch), total (sum of blocks over the batch).
    multiple_of   axis name ("tokens" is per row if uniform_q, "seqs", "kv_blocks") -> step of the
                  bucket values.
    max_programs  most programs that the device should hold; the core coarsens its buckets to stay
                  below.
    mixed_tokens  where not static: programs are made for mixed steps of up to so many tokens, too
                  (0: for decode only; larger steps run as they are).
    """

    static: bool = False
    uniform_q: bool = False
    kv_axis: Literal["none", "per_seq", "total"] = "none"
    multiple_of: Mapping[str, int] = field(default_factory=dict)
    max_programs: int = 64
    mixed_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRules:
    """Which rows may share a program.

    mixed             prefill and decode rows together.
    chunked           prefill rows may have cached context.
    max_prefill_seqs  most rows in one prefill program, None: no limit.
    max_decode_q      tokens a row may have and still count as decode (more than 1: speculative
                      verification).
    """

    mixed: bool = True
    chunked: bool = True
    max_prefill_seqs: int | None = None
    max_decode_q: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What a device can do, as data. Every default is the conservative one.

    contract          version the backend was tested with.
    input_device      torch device of the packed inputs and of the KV ("cpu" for opaque devices).
    dtypes            model dtypes, preferred first (the first that the checkpoint can be cast to is
                      `auto`).
    kv_dtypes         what alloc_kv can hold; the core asks for "auto", the model's dtype, so this
                      must be among them.
    fp8               the encoding of the device's own fp8 kernels, for the plugin and those who ask
                      for its facts; the core asks for none.
    block_sizes       tokens per KV block, preferred first.
    graphs            none | capture (replay of recorded launches) | aot (compiled before service).
    kv_baked          a program depends on num_blocks, so the KV is planned, without a device,
                      before compile.
    sampling          logits: the core samples with the `sample` op; tokens: the program returns
                      token ids (refused at open: the core cannot drive such a device yet).
    sample_max_top_k  requests beyond it are refused, None: no limit.
    token_feedback    the next step can take its token ids from the previous one on the device.
    pinned_inputs     a step's inputs are copied from page-locked memory: elsewhere the driver may
                      wait for the steps before it.
    overlap_pays      whether steps should be planned while one runs: not where the host's own cores
                      do the device's work, which the planning would take from it.
    batch_invariant   a claim, tested if made: the bits of a row do not depend on the other rows or
                      on chunking.
    invariant_option  where it is not claimed: the `key=value` option with which the backend, opened
                      anew, claims it; None: it has no such mode.
    """

    contract: tuple[int, int] = CONTRACT
    input_device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    kv_dtypes: tuple[str, ...] = ("auto",)
    fp8: Literal["none", "e4m3fn", "e4m3fnuz", "e4m3_240"] = "none"
    block_sizes: tuple[int, ...] = (16,)
    shapes: ShapeRules = ShapeRules()
    phases: PhaseRules = PhaseRules()
    graphs: Literal["none", "capture", "aot"] = "none"
    kv_baked: bool = False
    sampling: Literal["logits", "tokens"] = "logits"
    sample_max_top_k: int | None = None
    token_feedback: bool = True
    pinned_inputs: bool = False
    overlap_pays: bool = True
    dist: str | None = None
    quant: frozenset[str] = frozenset()
    batch_invariant: bool = False
    invariant_option: str | None = None


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The only Python values that a program may depend on.

    tokens   rows of the packed inputs, over all requests.   seqs      rows of block_table and
             seq_lens.
    kv_blocks  padded length of the KV axis (0 where kv_axis is "none").
    logits   "last": logit_rows has `seqs` entries; "all": it has `tokens` entries (prompt log-
             probabilities).
    """

    phase: Phase
    seqs: int
    tokens: int
    kv_blocks: int
    logits: Literal["last", "all"] = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """The KV that one model needs: per layer, key and value of [num_kv_heads, head_dim] for each
    token.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, key and value."""
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8": 1}[self.dtype]
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInfo:
    """Bytes of the device (for the CPU: of the cgroup). exact=False where the device can only
    estimate.
    """

    total: int
    free: int
    used: int
    exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPlan:
    """How many blocks, and where every byte goes: weights, activations, programs, margin, kv."""

    num_blocks: int
    ledger: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBatch:
    """One launch as numpy arrays on the host, int32, padded to `bucket` by the core.

    T = bucket.tokens, S = bucket.seqs, R = S or T (bucket.logits).
    token_ids   [T]      padding 0
    positions   [T]      position of the token in its request; padding 0
    slots       [T]      block_id * block_size + offset, where this token's KV goes; padding: slots
                of block 0
    q_start     [S+1]    first row of each request; request i owns rows q_start[i] .. q_start[i] +
                its new tokens - 1
                         (with uniform_q the rest up to q_start[i+1] is padding)
    q_lens      [S]      new tokens of each request; padding 0
    seq_lens    [S]      cached + new tokens of each request; padding 0
    block_table [S, MB]  block ids, padding 0 (the null block)
    logit_rows  [R]      which rows of the T need logits; padding 0
    prev_row    [T]      >= 0: take this token from that row of the previous launch's sampled
                tokens; else -1
    extra                what `Backend.attn_inputs` added
    """

    bucket: Bucket
    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    q_start: IntArray
    q_lens: IntArray
    seq_lens: IntArray
    block_table: IntArray
    logit_rows: IntArray
    prev_row: IntArray
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Hooks:
    """What a plugin implements; called at start-up only, never in a step."""

    @hookspec
    def tokenry_probe(self) -> DeviceRef | None:
        """Facts only: no torch import, no driver context, no environment writes, under 200 ms.
        None: not here.
        """

    @hookspec(firstresult=True)
    def tokenry_open(
        self, device: DeviceRef, options: Mapping[str, str], contract: tuple[int, int]
    ) -> Backend | None:
        """Open the device; None if it is another plugin's. `options` are the `--backend-option
        key=value` pairs.
        """
