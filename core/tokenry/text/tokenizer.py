"""Text to token ids and back, exactly as transformers does it, without importing transformers.

In: a model's directory. Out: `Tokenizer`, immutable once loaded, so any thread may use it. The work
is done by the `tokenizers` library; here is only what stands around tokenizer.json: special tokens,
BOS/EOS rules, end tokens, limits. Directories that hold only tokenizer.model or vocab files are
converted through transformers (extra `hf`). Knows nothing of requests, and never imports torch.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from tokenry.errors import ModelLoadError, RequestError
from tokenry.text.byte_level import byte_level_bytes
from tokenry.text.chat import ChatTemplate, read_templates

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_LEGACY_FILES = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "spiece.model",
    "tokenizer.bin",
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONG = 4096
"""Characters from which on a text is encoded while other threads run."""
FAR, SLACK = 16, 1024
"""Characters per token of the context from which on a prompt is looked at piecewise; tokens that a
cut may add.
"""
_UNLIMITED = 10**9
"""transformers writes 1e30 for "no limit"; nothing real is above this."""


class Tokenizer:
    """A model's tokenizer, with its chat template. Make it with `load`."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        path: Path,
        special_tokens: dict[str, str],
        eos_token_ids: tuple[int, ...],
        max_len: int | None,
        model_vocab_size: int | None,
        chat_template: ChatTemplate,
    ) -> None:
        self.core = core
        self.path = path
        self.special_tokens = special_tokens
        self.eos_token_ids = eos_token_ids
        self.max_len = max_len
        self.model_vocab_size = model_vocab_size
        self.chat_template = chat_template
        self.context: int | None = None
        vocab = core.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        self.byte_level = is_byte_level(core)
        self.puts_spaces = _decoder_types(core) in ([], ["WordPiece"])
        self.byte_ids: dict[int, int] = {}
        if "ByteFallback" in _decoder_types(core):
            matches = ((_BYTE_TOKEN.fullmatch(text), i) for text, i in vocab.items())
            self.byte_ids = {i: int(m[1], 16) for m, i in matches if m}
        added = core.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model_path: str | Path | None = None,
        chat_template_file: str | Path | None = None,
    ) -> Tokenizer:
        """The tokenizer in the directory; raises ModelLoadError that names the file at fault.

        model_path           the model's directory, if it is another: its config.json has the size
                             of the vocabulary, which the tokenizer must match, and end tokens.
        chat_template_file   used instead of the tokenizer's own templates.
        """
        path = Path(path)
        model_path = Path(model_path or path)
        config = _read_json(path / "tokenizer_config.json")
        legacy = _read_json(path / "special_tokens_map.json")
        core = _load_core(path)
        special = _special_tokens(config, legacy)
        _add_missing_tokens(core, config, special)
        core.no_truncation()
        core.no_padding()
        model_config = _read_json(model_path / "config.json")
        model_config = {**model_config, **(model_config.get("text_config") or {})}
        limit = config.get("model_max_length")
        vocab_size = model_config.get("vocab_size")
        templates = read_templates(path, config, chat_template_file)
        tokenizer = cls(
            core,
            path=path,
            special_tokens=special,
            eos_token_ids=_eos_ids(core, model_path, model_config, special),
            max_len=int(limit) if isinstance(limit, (int, float)) and limit < _UNLIMITED else None,
            model_vocab_size=vocab_size if isinstance(vocab_size, int) else None,
            chat_template=ChatTemplate(templates, special_tokens=special),
        )
        if tokenizer.model_vocab_size is not None:
            tokenizer.check_matches(tokenizer.model_vocab_size)
        return tokenizer

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a prompt, if the model has one."""
        return self.special_tokens.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of `bos_token`."""
        return None if self.bos_token is None else self.core.token_to_id(self.bos_token)

    @property
    def eos_token(self) -> str | None:
        """Text of the tokenizer's own end token; the model may have more, see `eos_token_ids`."""
        return self.special_tokens.get("eos_token")

    def within(self, context: int) -> Tokenizer:
        """The same, for prompts of a model with so long a context: see `encode`."""
        bound = copy.copy(self)
        bound.context = context
        return bound

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        whole: bool = False,
        param: str = "prompt",
    ) -> list[int]:
        """Token ids of the text, with what the model wants around a prompt (BOS) if that is to be
        added. Raises RequestError that names `param` for what is no text, and, unless the `whole`
        is wanted whatever its length, for a prompt that is far beyond the context: it is not read
        to its end, which would take a 30 MB body a minute and gigabytes.
        """
        try:
            if self.context is not None and not whole:
                self._check_far(text, self.context, param)
            return self._ids(text, add_special_tokens)
        except (
            UnicodeEncodeError,
            TypeError,
        ) as error:  # lone surrogates: valid JSON, not valid text
            raise RequestError(
                f"The prompt cannot be encoded as UTF-8: {error}.", param=param
            ) from error

    def _ids(self, text: str, special: bool) -> list[int]:
        if len(text) < _LONG:
            short: list[int] = self.core.encode(text, add_special_tokens=special).ids
            return short
        # the call for several texts lets other threads run meanwhile
        (found,) = self.core.encode_batch_fast([text], add_special_tokens=special)
        return list(found.ids)

    def _check_far(self, text: str, context: int, param: str) -> None:
        """Beginnings of the text, each twice as long, until one has more tokens than fit: where it
        is cut, a beginning may have a few that the whole has not.
        """
        most = FAR * context
        while most < len(text):
            count = len(self._ids(text[:most], special=False)) - SLACK
            if count > context:
                raise RequestError(
                    f"This model's maximum context length is {context} tokens. However, the first "
                    f"{most} of your prompt's {len(text)} characters have more than {count}.",
                    param=param,
                    code="context_length_exceeded",
                    mend=f"shorten the prompt to {context - 1} tokens or fewer",
                )
            most *= 2

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the token ids; ids that the tokenizer does not know give nothing."""
        text: str = self.core.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands inside a text (with its leading space), U+FFFD for part of
        a character.
        """
        text = self._texts.get(token_id)
        if text is None:
            once = self.decode([token_id], skip_special_tokens=False)
            twice = self.decode([token_id, token_id], skip_special_tokens=False)
            # The second occurrence is not at the beginning, where some decoders strip a space.
            text = self._texts[token_id] = twice[len(once) :] if twice.startswith(once) else once
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; part of a character where the token is one."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self.byte_ids:
            return bytes([self.byte_ids[token_id]])
        if self.byte_level:
            token = self.core.id_to_token(token_id)
            return b"" if token is None else byte_level_bytes(token)
        return self.token_text(token_id).encode()

    def check_matches(self, vocab_size: int) -> None:
        """Raises ModelLoadError if the model has no embedding for a token of the tokenizer.

        Added tokens may lie beyond (Gemma 3's text models have one for images); a prompt with one
        is refused then.
        """
        beyond = 0
        if self.vocab_size > vocab_size:
            base = self.core.get_vocab(with_added_tokens=False)
            added = set(self.core.get_added_tokens_decoder())
            beyond = sum(i >= vocab_size and i not in added for i in base.values())
        beyond += sum(i >= vocab_size for i in self.eos_token_ids)
        if self.bos_token_id is not None:
            beyond += self.bos_token_id >= vocab_size
        if beyond:
            raise ModelLoadError(
                f"The tokenizer in {self.path} does not match the model: {beyond} of its "
                "tokens have ids beyond the "
                f"model's vocabulary of {vocab_size} (highest id: {self.vocab_size - 1}).",
                mend="use the tokenizer that came with the model, or --tokenizer DIR",
            )


def is_byte_level(core: tokenizers.Tokenizer) -> bool:
    """Whether the decoder is byte-level BPE's and nothing else, so that a token's bytes do not
    depend on others.
    """
    return _decoder_types(core) == ["ByteLevel"]


def _decoder_types(core: tokenizers.Tokenizer) -> list[str]:
    if core.decoder is None:
        return []
    state = json.loads(core.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps]


def _load_core(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelLoadError(
                f"{file} cannot be read: {error}.",
                mend="download the file again, or update the package: pip install -U tokenizers",
            ) from error
    found = [name for name in _LEGACY_FILES if (path / name).is_file()]
    found += [entry.name for entry in path.glob("*.tiktoken")]
    if not found:
        raise ModelLoadError(
            f"{path} holds no tokenizer: neither tokenizer.json nor {', '.join(_LEGACY_FILES)}.",
            mend=(
                "--tokenizer DIR, the directory or hub id of the model that this one was made from"
            ),
        )
    return _convert(path, found[0])


def _convert(path: Path, file: str) -> tokenizers.Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelLoadError(
            f"{path} holds {file} but no tokenizer.json; to convert it, transformers is needed.",
            mend='pip install "tokenry[hf]"',
        ) from error
    try:
        converted = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # transformers raises whatever its converters raise
        raise ModelLoadError(
            f"{path / file} cannot be converted by transformers: {type(error).__name__}: {error}.",
            mend="pip install sentencepiece protobuf tiktoken, or a directory with tokenizer.json",
        ) from error
    if not converted.is_fast:
        raise ModelLoadError(
            f"{path / file} has only a tokenizer written in Python ({type(converted).__name__}).",
            mend="a directory with tokenizer.json (the hub has one for most models)",
        )
    core: tokenizers.Tokenizer = converted.backend_tokenizer
    return core


def _special_tokens(config: dict[str, Any], legacy: dict[str, Any]) -> dict[str, str]:
    """Named special tokens. The older special_tokens_map.json counts only beside an older config.

    `add_bos_token` is not read: tokenizer.json's post-processor says what stands around a prompt,
    in transformers 5 as here.
    """
    if "added_tokens_decoder" not in config:
        config = {**config, **legacy}
    contents = {name: _token_content(config.get(name)) for name in _NAMED}
    return {name: text for name, text in contents.items() if text is not None}


def _token_content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _add_missing_tokens(
    core: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str]
) -> None:
    """Tokens that only tokenizer_config.json knows get the next ids, as in transformers."""
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder") or {}
    for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            core.add_tokens([tokenizers.AddedToken(**token)])
            known.add(token["content"])
    for text in special.values():
        if text not in known:
            core.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])
            known.add(text)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for value in extra.values() if isinstance(extra, dict) else extra:
        content = _token_content(value)
        if content is not None and content not in known:
            core.add_special_tokens(
                [tokenizers.AddedToken(content, special=True, normalized=False)]
            )
            known.add(content)


def _eos_ids(
    core: tokenizers.Tokenizer, path: Path, model_config: dict[str, Any], special: dict[str, str]
) -> tuple[int, ...]:
    """The tokenizer's end token, then those of generation_config.json or else of config.json."""
    generation = _read_json(path / "generation_config.json")
    ids: list[int] = []
    if "eos_token" in special:
        token_id = core.token_to_id(special["eos_token"])
        ids += [] if token_id is None else [token_id]
    more = generation.get("eos_token_id", model_config.get("eos_token_id"))
    ids += more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys(int(i) for i in ids))


def _read_json(file: Path) -> dict[str, Any]:
    """The file's object; empty if there is no such file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{file} cannot be read as JSON: {error}.", mend="download the file again"
        ) from error
    if not isinstance(data, dict):
        raise ModelLoadError(
            f"{file} holds a {type(data).__name__}, not an object.", mend="download the file again"
        )
    return data
