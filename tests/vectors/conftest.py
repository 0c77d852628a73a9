"""Tiny random models that give vectors, with tokenizers, saved as sentence-transformers or
transformers saves them.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from tokenry import LLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WORDS = 150
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
TINY = {
    "vocab_size": WORDS + len(SPECIAL), "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96,
    "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = {**TINY, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
DISTIL = {
    "vocab_size": TINY["vocab_size"], "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
    "max_position_embeddings": 96, "initializer_range": 0.15,
}  # fmt: skip
QUIET = {"backend": "cpu", "progress": False, "backend_option": ("threads=1",)}


def text(*words: int) -> str:
    """`text(3, 4)` -> "w3 w4"."""
    return " ".join(f"w{word}" for word in words)


def write_tokenizer(path: Path, *, encoder: bool) -> None:
    """One token per word; an encoder's text stands between [CLS] and [SEP], a decoder's has [SEP]
    at its end.
    """
    vocab = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(WORDS))])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(SPECIAL))
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]" if encoder else "$A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1" if encoder else "$A $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    core.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]",
              "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]",
              "model_max_length": 96,
              "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def write_modules(
    path: Path, method: str, *, dense: int | None = None, normalize: bool = True,
    max_len: int | None = None,
) -> None:  # fmt: skip
    """modules.json and the folders it names."""
    kinds = ["Transformer", "Pooling"]
    kinds += ["Dense"] * (dense is not None) + ["Normalize"] * normalize
    modules = []
    for i, kind in enumerate(kinds):
        folder = f"{i}_{kind}" if i else ""
        modules.append({"idx": i, "name": str(i), "path": folder,
                        "type": f"sentence_transformers.models.{kind}"})  # fmt: skip
        (path / folder).mkdir(exist_ok=True)
        if kind == "Pooling":
            names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
            raw: dict[str, Any] = {f"pooling_mode_{n}": m == method for m, n in names.items()}
            raw["word_embedding_dimension"] = 32
            (path / folder / "config.json").write_text(json.dumps(raw))
        if kind == "Dense" and dense is not None:
            raw = {"in_features": 32, "out_features": dense, "bias": True,
                   "activation_function": "torch.nn.modules.activation.Tanh"}  # fmt: skip
            (path / folder / "config.json").write_text(json.dumps(raw))
            g = torch.Generator().manual_seed(3)
            tensors = {"linear.weight": torch.randn(dense, 32, generator=g) * 0.3,
                       "linear.bias": torch.randn(dense, generator=g) * 0.3}  # fmt: skip
            save_file(tensors, path / folder / "model.safetensors")
    (path / "modules.json").write_text(json.dumps(modules))
    said = {"max_seq_length": max_len or 90, "do_lower_case": False}
    (path / "sentence_bert_config.json").write_text(json.dumps(said))


MakeModel = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """`make_model("BertConfig", kind="AutoModel", **fields)` -> (directory, the model in fp32)."""

    def make(config: str, kind: str = "AutoModel", **fields: Any) -> tuple[Path, Any]:
        path = tmp_path_factory.mktemp(config)
        torch.manual_seed(1)
        encoder = "Bert" in config or "Roberta" in config or "MPNet" in config
        tiny = DISTIL if config == "DistilBertConfig" else TINY if encoder else DECODER
        made = getattr(transformers, config)(**{**tiny, **fields})
        model = getattr(transformers, kind).from_config(made, attn_implementation="eager")
        model = model.eval().float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name.lower() or name.endswith("bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(path)
        write_tokenizer(path, encoder=encoder)
        return path, model

    return make


@pytest.fixture(scope="session")
def bert(make_model: MakeModel) -> tuple[Path, Any]:
    """An embedder: mean, length 1, at most 40 tokens."""
    path, model = make_model("BertConfig")
    write_modules(path, "mean", max_len=40)
    return path, model


@pytest.fixture(scope="session")
def cross(make_model: MakeModel) -> tuple[Path, Any]:
    """A cross-encoder."""
    return make_model("BertConfig", "AutoModelForSequenceClassification", num_labels=1)


@pytest.fixture(scope="session")
def classes(make_model: MakeModel) -> tuple[Path, Any]:
    """A classifier of three."""
    names = {0: "good", 1: "bad", 2: "ugly"}
    return make_model("XLMRobertaConfig", "AutoModelForSequenceClassification", id2label=names)


@pytest.fixture(scope="session")
def qwen(make_model: MakeModel) -> tuple[Path, Any]:
    """A decoder that embeds by its last token, as Qwen3-Embedding is stored."""
    path, model = make_model("Qwen3Config", "AutoModelForCausalLM", tie_word_embeddings=True)
    write_modules(path, "last", max_len=100)
    return path, model


@pytest.fixture
def open_llm() -> Any:
    """`open_llm(path, **config)`: an LLM that is closed at the end."""
    opened: list[LLM] = []

    def start(path: Path, **config: Any) -> LLM:
        opened.append(LLM(str(path), **{**QUIET, **config}))
        return opened[-1]

    yield start
    for llm in opened:
        llm.close()


@torch.no_grad()
def hidden(model: Any, ids: Sequence[int], types: Sequence[int] | None = None) -> torch.Tensor:
    """What transformers computes of one text: [tokens, hidden]."""
    more = {} if types is None else {"token_type_ids": torch.tensor([list(types)])}
    base = getattr(model, model.base_model_prefix, model)
    return base(input_ids=torch.tensor([list(ids)]), **more).last_hidden_state[0].float()


@pytest.fixture
def words() -> Callable[..., str]:
    """`text`."""
    return text


@pytest.fixture
def ask() -> Callable[..., torch.Tensor]:
    """`hidden`."""
    return hidden


@pytest.fixture(scope="session")
def modules() -> Callable[..., None]:
    """`write_modules`."""
    return write_modules


JUDGE = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "no", "yes")
USUAL = "Given a web search query, retrieve relevant passages that answer the query"


def judge_prompt(query: str, document: str, instruction: str = USUAL) -> str:
    """As Qwen3-Reranker's model card writes it."""
    return (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        f"<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def write_judge_tokenizer(path: Path, *, without: str = "") -> None:
    """A token per word of the prompt, and the special ones."""
    known = [word for word in JUDGE if word != without]
    words = judge_prompt(" ", " ").replace("<|", " <|").replace("|>", "|> ").split()
    words += [f"w{i}" for i in range(60)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", *known, *words]))}
    vocab.pop(without, None)
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([word for word in known if word.startswith("<")])
    core.save(str(path / "tokenizer.json"))


@torch.no_grad()
def judgement(judge: tuple[Path, Any], prompt: str) -> tuple[list[int], torch.Tensor]:
    """The ids of the whole prompt, and transformers' logits of no and yes after it."""
    core = tokenizers.Tokenizer.from_file(str(judge[0] / "tokenizer.json"))
    ids = core.encode(prompt, add_special_tokens=False).ids
    logits = judge[1](torch.tensor([ids])).logits[0, -1].float()
    return ids, logits[[core.token_to_id("no"), core.token_to_id("yes")]]


@pytest.fixture(scope="session")
def make_judge(make_model: MakeModel) -> MakeModel:
    """`make_judge(tied=...)`: a reranker in the form of Qwen3-Reranker."""

    def make(*, tied: bool) -> tuple[Path, Any]:
        fields = {"vocab_size": 200, "tie_word_embeddings": tied}
        path, model = make_model("Qwen3Config", "AutoModelForCausalLM", **fields)
        write_judge_tokenizer(path)
        return path, model

    return make


@pytest.fixture(scope="session")
def judging() -> Any:
    """`judge_prompt`, `judgement` and `write_judge_tokenizer`."""
    return SimpleNamespace(prompt=judge_prompt, of=judgement, write_tokenizer=write_judge_tokenizer)
