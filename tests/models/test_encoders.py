"""Encoders give what transformers gives, for ragged texts side by side, whatever they are padded
to.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tokenry.backend.base import Backend, StepBatch
from tokenry.backend.contract import Bucket
from tokenry.backend.ops import OpTable
from tokenry.errors import ModelLoadError, UnknownArchitecture
from tokenry.models.config import read_config
from tokenry.models.encoder import TOKEN_TYPES
from tokenry.models.encoder_spec import load_encoder
from tokenry.models.head import Head
from tokenry.models.pooling import plan_pooling

VOCAB = 160
TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 96, "initializer_range": 0.15,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2,
}  # fmt: skip
DISTIL = {
    "vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4,
    "max_position_embeddings": 96, "initializer_range": 0.15,
}  # fmt: skip
FAMILIES = {
    "BertConfig": {"type_vocab_size": 2},
    "RobertaConfig": {"type_vocab_size": 1},
    "XLMRobertaConfig": {"type_vocab_size": 1},
    "DistilBertConfig": {},
    "MPNetConfig": {},
    "ModernBertConfig": {"local_attention": 8, "global_attn_every_n_layers": 2},
}
METHODS = ("cls", "mean", "last")


def make(path: Path, config: str, kind: str = "AutoModel", **fields: Any) -> Any:
    """A random model in fp32, saved to `path`."""
    torch.manual_seed(1)
    tiny = DISTIL if config == "DistilBertConfig" else TINY
    made = getattr(transformers, config)(**{**tiny, **FAMILIES[config], **fields})
    model = getattr(transformers, kind).from_config(made, attn_implementation="eager")
    model = model.eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model


def run(
    path: Path, backend: Backend, texts: Sequence[Sequence[int]], *, pad: int = 0,
    method: str = "auto", second: Sequence[int] = (), empty_rows: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Pooled rows of the texts in one launch; `second`: where the second text of a pair begins."""
    model = read_config(path)
    pooling = plan_pooling(path, model, method=method)
    assert pooling is not None
    length = model.max_len - 1
    spec = load_encoder(path, model, pooling, dtype="float32", max_model_len=length)
    weights = spec.weights(lambda share: None)
    step = backend.build_model(spec, weights, OpTable(backend.ops()))
    L, S = max(map(len, texts)) + pad, len(texts) + empty_rows
    ids, types = np.zeros((2, S, L), np.int32)
    positions, lens = np.zeros((S, L), np.int32), np.zeros(S, np.int32)
    for i, text in enumerate(texts):
        ids[i, : len(text)], lens[i] = text, len(text)
        positions[i, : len(text)] = np.arange(len(text))
        if second:
            types[i, second[i] : len(text)] = 1
    empty = torch.zeros(0, dtype=torch.int32)
    batch = StepBatch(
        bucket=Bucket("prefill", S, S * L, 0),
        token_ids=torch.from_numpy(ids.reshape(-1)),
        positions=torch.from_numpy(positions.reshape(-1)),
        slots=empty, seq_lens=empty, block_table=empty, logit_rows=empty,
        q_start=torch.arange(S + 1, dtype=torch.int32) * L,
        q_lens=torch.from_numpy(lens),
        extra={TOKEN_TYPES: torch.from_numpy(types.reshape(-1))},
    )  # fmt: skip
    with torch.inference_mode():
        rows = step(batch, [])
    assert rows.shape == (S, 32) and rows.dtype == torch.float32 and rows.isfinite().all()
    return rows[: len(texts)]


@torch.no_grad()
def oracle(model: Any, text: Sequence[int], method: str) -> torch.Tensor:
    rows = model(input_ids=torch.tensor([list(text)])).last_hidden_state[0]
    return {"cls": rows[0], "mean": rows.mean(0), "last": rows[-1]}[method]


@pytest.fixture
def texts(prompts: list[list[int]]) -> list[list[int]]:
    return prompts


@pytest.mark.parametrize("config", FAMILIES)
def test_an_encoder_gives_what_transformers_gives(
    tmp_path: Path, backend: Backend, texts: list[list[int]], config: str
) -> None:
    model = make(tmp_path, config)
    for method in METHODS:
        rows = run(tmp_path, backend, texts, method=method)
        for row, text in zip(rows, texts, strict=True):
            torch.testing.assert_close(row, oracle(model, text, method), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", ["BertConfig", "ModernBertConfig", "MPNetConfig"])
def test_a_text_gives_the_same_bits_whatever_its_neighbours(
    tmp_path: Path, backend: Backend, texts: list[list[int]], config: str
) -> None:
    make(tmp_path, config)
    texts = [text[:17] for text in texts]  # all are padded to one length
    together = run(tmp_path, backend, texts, method="mean", empty_rows=3)
    longest = max(map(len, texts))
    for row, text in zip(together, texts, strict=True):
        alone = run(tmp_path, backend, [text], method="mean", pad=longest - len(text), empty_rows=0)
        assert torch.equal(row, alone[0])


@pytest.mark.parametrize("config", ["MPNetConfig", "ModernBertConfig"])
def test_tokens_far_from_each_other_are_seen_as_trained(
    tmp_path: Path, backend: Backend, config: str
) -> None:
    model = make(tmp_path, config, max_position_embeddings=402)
    ids = torch.randint(5, VOCAB, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    rows = run(tmp_path, backend, [ids, ids[:201]], method="last", pad=7)
    for row, text in zip(rows, (ids, ids[:201]), strict=True):
        torch.testing.assert_close(row, oracle(model, text, "last"), atol=1e-5, rtol=1e-5)


def test_the_texts_of_a_pair_are_told_apart(
    tmp_path: Path, backend: Backend, texts: list[list[int]]
) -> None:
    model = make(tmp_path, "BertConfig")
    texts = [text for text in texts if len(text) > 1]
    second = [len(text) // 2 for text in texts]
    rows = run(tmp_path, backend, texts, method="cls", second=second)
    for row, text, at in zip(rows, texts, second, strict=True):
        types = torch.tensor([[0] * at + [1] * (len(text) - at)])
        with torch.no_grad():
            want = model(input_ids=torch.tensor([text]), token_type_ids=types)
        torch.testing.assert_close(row, want.last_hidden_state[0, 0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(row, oracle(model, text, "cls"), atol=1e-3)


@pytest.mark.parametrize("config", FAMILIES)
@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_gives_transformers_logits(
    tmp_path: Path, backend: Backend, texts: list[list[int]], config: str, labels: int
) -> None:
    kind = "AutoModelForSequenceClassification"
    model = make(tmp_path, config, kind, num_labels=labels)
    plan = plan_pooling(tmp_path, read_config(tmp_path))
    assert plan is not None and plan.width == labels and len(plan.labels) == labels
    head = Head(plan)
    for row, text in zip(run(tmp_path, backend, texts), texts, strict=True):
        with torch.no_grad():
            want = model(input_ids=torch.tensor([text])).logits[0]
        torch.testing.assert_close(head(row), want, atol=1e-5, rtol=1e-5)


def test_what_is_no_encoder_of_ours_is_said(tmp_path: Path) -> None:
    make(tmp_path, "BertConfig", is_decoder=True)
    model = read_config(tmp_path)
    pooling = plan_pooling(tmp_path, model)
    assert pooling is not None
    load: Callable[..., Any] = load_encoder
    with pytest.raises(ModelLoadError, match="is_decoder"):
        load(tmp_path, model, pooling, dtype="float32", max_model_len=8)
    make(tmp_path, "RobertaConfig")
    with pytest.raises(ModelLoadError, match="has 94 positions, 96 are asked for"):
        load(tmp_path, read_config(tmp_path), pooling, dtype="float32", max_model_len=96)
    text = (tmp_path / "config.json").read_text().replace("RobertaModel", "BertGenerationEncoder")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnknownArchitecture, match="BertModel"):
        load(tmp_path, read_config(tmp_path), pooling, dtype="float32", max_model_len=8)
