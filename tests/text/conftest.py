"""Small tokenizers of every kind that a model may bring."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

from tokenry.hub import find_model
from tokenry.text.tokenizer import Tokenizer

WORDS = [
    "once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "king",
    "prin",
    "cess",
    "é",
    "你",
    "好",
    ".",
    ",",
]


def sentencepiece_core() -> Core:
    """Llama-2's kind: BPE over "▁", byte fallback, first space stripped."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for token in ["▁", *WORDS, *("▁" + w for w in WORDS), *"abcdefghijklmnopqrstuvwxyz"]:
        vocab.setdefault(token, len(vocab))
    core = Core(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


def metaspace_core() -> Core:
    vocab = {"<s>": 0, "</s>": 1}
    for token in ["▁", *WORDS, *("▁" + w for w in WORDS), *"abcdefghijklmnopqrstuvwxyz"]:
        vocab.setdefault(token, len(vocab))
    core = Core(models.BPE(vocab=vocab, merges=[], fuse_unk=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<s>", "</s>"])
    return core


def wordpiece_core() -> Core:
    vocab = {"[UNK]": 0, "</s>": 1}
    for token in [*WORDS, *("##" + w for w in WORDS), *"abcdefghijklmnopqrstuvwxyz"]:
        vocab.setdefault(token, len(vocab))
    core = Core(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens(["[UNK]", "</s>"])
    return core


def bpe_suffix_core() -> Core:
    """GPT-1's kind: "</w>" ends a word, so a token's text depends on whether it is the last."""
    vocab = {"<unk>": 0}
    for token in [*WORDS, *(w + "</w>" for w in WORDS), *"abcdefghijklmnopqrstuvwxyz"]:
        vocab.setdefault(token, len(vocab))
    core = Core(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    core.decoder = decoders.BPEDecoder()
    core.add_special_tokens(["<unk>"])
    return core


def byte_level_core() -> Core:
    """Every byte is a token; some tokens that only look like bytes; one special token inside the
    alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    core.add_tokens([AddedToken("é€"), AddedToken("Ã©"), AddedToken("ĠHello")])
    return core


CORES = {
    "byte-level": byte_level_core,
    "sentencepiece": sentencepiece_core,
    "metaspace": metaspace_core,
    "wordpiece": wordpiece_core,
    "bpe-suffix": bpe_suffix_core,
}


def save(core: Core, path: Path, **config: object) -> Path:
    """A model directory with the tokenizer's files in it."""
    path.mkdir(parents=True, exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session", params=list(CORES))
def any_tokenizer(request, tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(save(CORES[request.param](), tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(save(sentencepiece_core(), tmp_path_factory.mktemp("sp")))


@pytest.fixture(scope="session")
def demo() -> Tokenizer:
    return Tokenizer.load(find_model("demo"))


@pytest.fixture(scope="session")
def core_of():
    """A fresh core of the kind that is named."""
    return lambda kind: CORES[kind]()


@pytest.fixture(scope="session")
def save_core():
    """`save`, for tests that write their own directory."""
    return save
