"""Compiling: once per grammar, in bounded time and memory, each error to its own request."""

import json
import re
import time

import llguidance
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from tokenry.errors import RequestError
from tokenry.grammar.compiler import GrammarCompiler, Vocabulary
from tokenry.grammar.trial import Trial
from tokenry.hub import find_model
from tokenry.structured import StructuredOutputs, Thinking, is_one_token, structured_outputs
from tokenry.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(find_model("demo"))
EOS = TOKENIZER.eos_token_ids[0]
MODEL_VOCAB = 4200  # larger than the tokenizer's
BOMB = {"type": "string", "allOf": [{"pattern": f"(.*a){{{i}}}"} for i in range(20)]}


def vocabulary():
    return Vocabulary(
        tokenizer_json=TOKENIZER.core.to_str(),
        vocab_size=MODEL_VOCAB,
        eos_token_ids=TOKENIZER.eos_token_ids,
        special_ids={},
    )


@pytest.fixture(scope="module")
def compiler():
    compiler = GrammarCompiler(vocabulary, lambda: Trial(limit_s=1.0))
    yield compiler
    compiler.close()


def matcher_of(compiler, **wanted):
    compiling = compiler.start(StructuredOutputs(**wanted))
    compiling.wait(30)
    assert compiling.done()
    return compiling.matcher()


def allowed(matcher):
    bits = np.unpackbits(matcher.mask()().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def walk(matcher, rng, most=200):
    """A random text of the grammar; None if it is longer than `most` tokens."""
    text = b""
    for _ in range(most):
        tokens = allowed(matcher)
        assert len(tokens)
        token = int(rng.choice(tokens))
        if token == EOS:
            assert matcher.accept(token)
            return text.decode()
        text += TOKENIZER.token_bytes(token)
        if matcher.accept(token):
            return text.decode()
    return None


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["[a-c]{0,5}x?", "(ab|ba)+", "yes|no|maybe", "é+ü?", r"\d{1,3}/\d"]),
    st.integers(0, 2**32 - 1),
)
def test_every_way_through_the_masks_matches_and_ends_are_allowed_only_then(
    compiler, pattern, seed
):
    matcher = matcher_of(compiler, regex=pattern)
    rng, text = np.random.default_rng(seed), b""
    for _ in range(60):
        tokens = set(allowed(matcher).tolist())
        whole = text == b"" or text.decode(errors="ignore").encode() == text
        matches = whole and re.fullmatch(pattern, text.decode()) is not None
        assert (EOS in tokens) == matches
        assert max(tokens) < TOKENIZER.vocab_size  # ids beyond the tokenizer's are masked
        rest = sorted(tokens - {EOS})
        if not rest:
            return
        token = int(rng.choice(rest))
        text += TOKENIZER.token_bytes(token)
        if matcher.accept(token):
            assert re.fullmatch(pattern, text.decode())
            return


def test_json_of_a_schema_is_valid_and_its_whitespace_is_bounded(compiler):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", 1, None]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    texts = [
        walk(matcher_of(compiler, json=schema), np.random.default_rng(seed)) for seed in range(12)
    ]
    for text in filter(None, texts):
        value = json.loads(text)
        assert isinstance(value["a"], bool)
        assert value["b"] in ("x", 1, None)
    assert None not in texts  # no endless blanks
    tight = matcher_of(compiler, json=schema, disable_any_whitespace=True)
    text = walk(tight, np.random.default_rng(0))
    assert text == json.dumps(json.loads(text), separators=(",", ":"))


def test_each_request_has_its_own_place_in_one_grammar(compiler):
    first = matcher_of(compiler, choice=("ab", "cd"))
    second = matcher_of(compiler, choice=("ab", "cd"))
    (a,) = TOKENIZER.encode("a", add_special_tokens=False)
    before = set(allowed(second))
    first.accept(a)
    assert set(allowed(second)) == before
    assert set(allowed(first)) != before


def test_a_grammar_is_compiled_once_whatever_field_it_came_in(compiler):
    wanted = StructuredOutputs(regex="once{3}", param="guided_regex")
    first = compiler.start(wanted)
    first.wait(30)
    again = compiler.start(StructuredOutputs(regex="once{3}"))
    assert again.done()
    again.matcher()


def test_errors_name_the_field_of_the_request_that_asks(compiler):
    for param in ("guided_regex", "structured_outputs"):
        compiling = compiler.start(StructuredOutputs(regex="a(", param=param))
        compiling.wait(30)
        with pytest.raises(RequestError, match=f"^{param}: this regular expression") as caught:
            compiling.matcher()
        assert caught.value.param == param


def test_what_takes_too_long_is_ended_and_the_next_grammar_is_served(compiler):
    begun = time.monotonic()
    with pytest.raises(RequestError, match="takes longer than 1 s"):
        matcher_of(compiler, json=BOMB)
    assert time.monotonic() - begun < 20
    assert matcher_of(compiler, regex="after{2}")


def test_what_takes_too_much_memory_is_ended():
    trial = Trial(limit_s=20, limit_bytes=400 * 2**20)
    try:
        assert trial(json.dumps({"grammars": [{"lark_grammar": 'start: "a"'}]})) is None
        why = trial('{"grammars": [{"lark_grammar": "start: /a/ ' + "#" * 200 * 2**20 + '"}]}')
        assert why is not None and "MiB" in why
        assert trial(json.dumps({"grammars": [{"lark_grammar": 'start: "a"'}]})) is None
    finally:
        trial.close()


def test_a_compiler_can_be_closed_amid_a_grammar():
    compiler = GrammarCompiler(vocabulary, lambda: Trial(limit_s=60))
    compiling = compiler.start(StructuredOutputs(json=BOMB))
    compiling.wait(0.5)
    begun = time.monotonic()
    compiler.close()
    compiling.wait(20)
    assert time.monotonic() - begun < 20
    with pytest.raises(RequestError):
        compiling.matcher()


def test_a_tokenizer_that_cannot_be_bound_is_told():
    broken = GrammarCompiler(
        lambda: Vocabulary(tokenizer_json="{}", vocab_size=10, eos_token_ids=(1,), special_ids={})
    )
    try:
        with pytest.raises(RequestError, match="tokenizer") as caught:
            matcher_of(broken, regex="a", param="guided_regex")
        assert caught.value.param == "guided_regex"
    finally:
        broken.close()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice"),
        ({"regex": ""}, "empty"),
        ({"choice": []}, "at least one"),
        ({"choice": ["a"] * 5000}, "at most"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "whitespace_pattern"),
        ({"json": "x" * 600_000}, "bytes"),
        ({"json": {"a": {1, 2}}}, "JSON"),
        ({"regex": "\ud800"}, "Unicode"),
        ({"colour": "red"}, "colour"),
        ("a+", "dict"),
    ],
)
def test_what_is_no_shape_at_sight_is_refused(value, text):
    with pytest.raises(RequestError, match=text) as caught:
        structured_outputs(value)
    assert caught.value.param.startswith("structured_outputs")


def test_deep_json_is_refused():
    deep = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="deeply"):
        StructuredOutputs(json=deep)


def test_added_tokens_are_known_as_the_library_knows_them():
    """A tokenizer as Llama's and Qwen's: byte fallback, added tokens special and not."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    core.add_special_tokens(["<unk>", "</s>", "[CALLS]"])
    core.add_tokens(["<think>", "</think>", "◁think▷", "[PLAIN]"])
    library = llguidance.LLTokenizer(core.to_str(), eos_token=[1])
    added = core.get_added_tokens_decoder()
    for i, token in added.items():
        assert library.is_special_token(i) == is_one_token(token.content, token.special), token
    ids = {t.content: i for i, t in added.items() if is_one_token(t.content, t.special)}
    compiler = GrammarCompiler(
        lambda: Vocabulary(
            tokenizer_json=core.to_str(), vocab_size=400, eos_token_ids=(1,), special_ids=ids
        )
    )
    try:
        thinking = Thinking(begin="<think>", end="</think>")
        matcher = matcher_of(compiler, choice=("a b",), thinking=thinking)
        assert {ids["<think>"], pieces.index("a")} <= set(allowed(matcher))
        assert pieces.index("b") not in allowed(matcher)
        for token in (ids["<think>"], pieces.index("b"), ids["</think>"], pieces.index("a")):
            assert token in allowed(matcher)
            assert not matcher.accept(token)
        assert max(allowed(matcher)) < len(pieces)
    finally:
        compiler.close()


def test_a_grammar_that_got_stuck_is_compiled_anew():
    compiler = GrammarCompiler(vocabulary)
    try:
        first = matcher_of(compiler, regex="stuck{2}")
        shared = compiler.start(StructuredOutputs(regex="stuck{2}"))
        assert shared.done()
        assert not first.accept(EOS)  # a token that the mask does not have
        with pytest.raises(RequestError, match=r"^structured_outputs: this regular expression"):
            first.mask()()
        again = compiler.start(StructuredOutputs(regex="stuck{2}"))
        assert again._future is not shared._future
        assert len(allowed(shared.matcher()))  # those who had it are not touched
    finally:
        compiler.close()
