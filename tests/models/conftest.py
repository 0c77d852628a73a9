"""Tiny random transformers models, and a driver that runs our step over paged KV in shuffled
blocks.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tokenry.backend.base import Backend, StepBatch
from tokenry.backend.contract import Bucket, HostBatch, KVSpec, MemoryInfo
from tokenry.backend.ops import OpTable
from tokenry.models.registry import load_spec
from tokenry_cpu.backend import CpuBackend, CpuOptions

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 160
TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 4, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip
TINY_GPT2 = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "bos_token_id": 0, "eos_token_id": 4, "initializer_range": 0.15,
}  # fmt: skip
BLOCK_SIZE = 16
NUM_BLOCKS = 48


class PlainBackend(Backend):
    """Reference ops and the default KV."""

    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=2**34, free=2**34, used=0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend whose ops run here."""
    return PlainBackend() if request.param == "reference" else CpuBackend(CpuOptions(threads=1))


class Driver:
    """A loaded model that computes whole texts, in chunks, several at a time."""

    def __init__(
        self, path: Path, backend: Backend | None = None, dtype: str = "float32", **options: Any
    ):
        backend = backend or PlainBackend()
        self.spec = load_spec(path, dtype=dtype, **options)
        self.backend = backend
        self.ops = OpTable(backend.ops())
        weights = self.spec.weights(lambda share: None)
        self.step = backend.build_model(self.spec, weights, self.ops)
        kv_spec = KVSpec(
            num_layers=self.spec.num_layers, num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim, block_size=BLOCK_SIZE, dtype=dtype,
        )  # fmt: skip
        self.kv = backend.alloc_kv(kv_spec, NUM_BLOCKS)
        self._free = (1 + np.random.default_rng(0).permutation(NUM_BLOCKS - 1)).tolist()
        self._tables: list[list[int]] = []

    def open(self, count: int, length: int) -> None:
        """Blocks for `count` texts of up to `length` tokens."""
        blocks = -(-length // BLOCK_SIZE)
        self._tables = [[self._free.pop() for _ in range(blocks)] for _ in range(count)]

    def close(self) -> None:
        """The blocks are free again, with what is in them."""
        self._free += [block for table in self._tables for block in table]
        self._tables = []

    def run(self, chunks: Sequence[tuple[int, Sequence[int], int]]) -> list[torch.Tensor]:
        """One step: (text, its new tokens, tokens before them) -> logits of all new rows, per
        text. Two rows of padding follow.
        """
        lengths = [len(tokens) for _, tokens, _ in chunks]
        T, S = sum(lengths) + 2, len(chunks) + 1
        at = [np.arange(start, start + len(tokens)) for _, tokens, start in chunks]
        tables = [np.array(self._tables[text]) for text, _, _ in chunks]
        slots = [
            t[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for t, p in zip(tables, at, strict=True)
        ]
        pad = [np.zeros(2, int)]
        starts = np.cumsum([0, *lengths])
        host = HostBatch(
            bucket=Bucket("mixed", S, T, 0, "all"),
            token_ids=_int32(np.concatenate([*(np.array(t) for _, t, _ in chunks), *pad])),
            positions=_int32(np.concatenate(at + pad)),
            slots=_int32(np.concatenate(slots + pad)),
            q_start=_int32([*starts, starts[-1]]),
            q_lens=_int32([*lengths, 0]),
            seq_lens=_int32([*(p[-1] + 1 for p in at), 0]),
            block_table=_int32(np.stack([*tables, np.zeros_like(tables[0])])),
            logit_rows=_int32(np.arange(T)),
            prev_row=_int32(np.full(T, -1)),
        )
        logits = self.step(self._to_step(host), self.kv)
        assert logits.shape == (T, self.spec.vocab_size) and logits.dtype == torch.float32
        return list(logits[: starts[-1]].clone().split(lengths))

    def _to_step(self, host: HostBatch) -> StepBatch:
        names = [f.name for f in dataclasses.fields(StepBatch) if f.name not in ("bucket", "extra")]
        extra = {k: torch.from_numpy(v) for k, v in self.backend.attn_inputs(host).items()}
        tensors = {name: torch.from_numpy(getattr(host, name)) for name in names}
        return StepBatch(bucket=host.bucket, extra=extra, **tensors)

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int) -> list[torch.Tensor]:
        """Logits of every row of every prompt, all prompts advancing together by `chunk` tokens."""
        parts: list[list[torch.Tensor]] = [[] for _ in prompts]
        for start in range(0, max(map(len, prompts)), chunk):
            live = [i for i, p in enumerate(prompts) if start < len(p)]
            done = self.run([(i, prompts[i][start : start + chunk], start) for i in live])
            for i, logits in zip(live, done, strict=True):
                parts[i].append(logits)
        return [torch.cat(p) for p in parts]

    def greedy(
        self, prompts: Sequence[Sequence[int]], count: int, chunk: int = 13
    ) -> tuple[list[torch.Tensor], list[list[int]]]:
        """(logits of the prompts' rows, `count` greedy tokens of each)."""
        self.open(len(prompts), max(map(len, prompts)) + count)
        logits = self.prefill(prompts, chunk)
        answers = [[int(rows[-1].argmax())] for rows in logits]
        while len(answers[0]) < count:
            before = [len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True)]
            step = [(i, a[-1:], before[i]) for i, a in enumerate(answers)]
            for answer, rows in zip(answers, self.run(step), strict=True):
                answer.append(int(rows[-1].argmax()))
        self.close()
        return logits, answers


def _int32(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """`make("LlamaConfig", **fields)` -> (directory, the transformers model), random, in fp32."""

    def build(config_name: str, **fields: Any) -> tuple[Path, Any]:
        tiny = TINY_GPT2 if config_name == "GPT2Config" else TINY
        torch.manual_seed(1)
        config = getattr(transformers, config_name)(**{**tiny, **fields})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.eval().float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "ln_" in name or name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        return tmp_path, model

    return build


@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged prompts, longer than a chunk, than a block, than the tests' sliding windows, and one
    token.
    """
    ids = torch.randint(5, VOCAB, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    return [ids, ids[3:4], ids[20:37]]


@torch.no_grad()
def oracle(
    model: Any, prompts: Sequence[Sequence[int]], count: int
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """What transformers says: (logits of the prompts' rows, greedy tokens), without any cache."""
    logits, answers = [], []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            rows = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
            if len(ids) == len(prompt):
                logits.append(rows)
            ids.append(int(rows[-1].argmax()))
        answers.append(ids[len(prompt) :])
    return logits, answers


@pytest.fixture
def same_as_transformers(
    backend: Backend, prompts: list[list[int]]
) -> Callable[[Path, Any], Driver]:
    """Logits within 1e-4 and 16 greedy tokens equal, chunked, batched, over shuffled blocks."""

    def check(path: Path, model: Any) -> Driver:
        driver = Driver(path, backend)
        want_logits, want_tokens = oracle(model, prompts, 16)
        logits, tokens = driver.greedy(prompts, 16)
        for got, want in zip(logits, want_logits, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert tokens == want_tokens
        return driver

    return check


@pytest.fixture
def drive() -> type[Driver]:
    """`drive(path, backend=reference ops, dtype="float32", **load_spec options)`."""
    return Driver


@pytest.fixture
def ask_transformers() -> Callable[..., tuple[list[torch.Tensor], list[list[int]]]]:
    """`oracle`."""
    return oracle


@pytest.fixture
def edit() -> Callable[..., None]:
    """Change the tensors of a saved model: `edit(path, add={...}, drop=[...])`."""

    def change(
        path: Path, *, add: Mapping[str, torch.Tensor] | None = None, drop: Sequence[str] = ()
    ) -> None:
        file = path / "model.safetensors"
        tensors = {k: v.clone() for k, v in load_file(file).items() if k not in drop}
        save_file({**tensors, **(add or {})}, file)

    return change
