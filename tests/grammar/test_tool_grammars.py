"""What a format's grammar lets a model write, its reader reads: random walks through the masks."""

import json

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.grammar.limits import parser_limits
from tokenry.grammar.source import grammar_of
from tokenry.hub import find_model
from tokenry.structured import StructuredOutputs, Thinking
from tokenry.text.tokenizer import Tokenizer
from tokenry.text.tools import read_tools
from tokenry.text.tools_formats import FORMATS
from tokenry.text.tools_grammar import calls_lark
from tokenry.text.tools_scan import CallArguments, CallBegin, Content, Marks

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "$defs": {"unit": {"enum": ["C", "F"]}},
                "properties": {
                    "city": {"type": "string", "maxLength": 5},
                    "unit": {"$ref": "#/$defs/unit"},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "stop",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"now": {"type": "boolean"}, "why": {"enum": ["a", "b"]}},
                "additionalProperties": False,
            },
        },
    },
]
ARGUMENTS = {
    "json": '{"now": true, "why": "b"}',
    "python": "now=true",
    "tags": "<parameter=now>\ntrue\n</parameter>\n<parameter=why>\nb\n</parameter>\n",
}
WRONG = {"json": '{"now": 1', "python": "now=1", "tags": "<parameter=now>\n1"}
FORMAT_IDS = [known.name for known in FORMATS]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(find_model("demo"))


@pytest.fixture(scope="module")
def library(tokenizer):
    return llguidance.LLTokenizer(
        tokenizer.core.to_str(), eos_token=list(tokenizer.eos_token_ids), n_vocab=4096
    )


def state_of(library, wanted, special_ids=()):
    state = llguidance.LLMatcher(
        library, grammar_of(wanted, dict(special_ids)), log_level=0, limits=parser_limits()
    )
    assert not state.is_error(), state.get_error()
    return state


def walk(state, tokenizer, rng, most=300):
    """Text of a random way through the grammar; ends are taken as soon as they may be."""
    text = b""
    for _ in range(most):
        bits = np.frombuffer(state.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        assert len(allowed), state.get_error()
        if set(allowed) & set(tokenizer.eos_token_ids) and rng.random() < 0.7:
            return text.decode()
        plain = [t for t in allowed if t not in tokenizer.eos_token_ids]
        if not plain:
            return text.decode()
        token = int(rng.choice(plain))
        text += tokenizer.token_bytes(token)
        assert state.consume_token(token)
        if state.is_stopped():
            return text.decode()
    return None


def use_of(choice, parallel=True):
    return read_tools(TOOLS, choice, parallel)


def read(wanted, use, text):
    reader = wanted.read(Marks(wanted.marks), use.known)
    pieces = [p for char in text for p in reader.feed(char)] + reader.flush()
    calls, content = [], ""
    for piece in pieces:
        if isinstance(piece, CallBegin):
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            calls[-1][1] += piece.text
        elif isinstance(piece, Content):
            content += piece.text
    return [(name, json.loads(arguments)) for name, arguments in calls], content


def check_arguments(name, arguments):
    if name == "weather":
        assert set(arguments) <= {"city", "unit"}
        assert len(arguments["city"]) <= 5
        assert arguments.get("unit", "C") in ("C", "F")
    else:
        assert set(arguments) <= {"now", "why"}
        assert isinstance(arguments.get("now", True), bool)
        assert arguments.get("why", "a") in ("a", "b")


@pytest.mark.parametrize("wanted", FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("choice", ["required", "named"])
def test_forced_calls_are_read_as_calls(wanted, choice, tokenizer, library):
    asked = {"type": "function", "function": {"name": "stop"}} if choice == "named" else choice
    use = use_of(asked)
    lark = calls_lark(wanted, use, {})
    numbers = set()
    for seed in range(6):
        state = state_of(library, StructuredOutputs(grammar=lark))
        text = walk(state, tokenizer, np.random.default_rng(seed))
        if text is None:
            continue
        calls, content = read(wanted, use, text)
        assert content == ""
        numbers.add(len(calls))
        for name, arguments in calls:
            assert name in use.known
            check_arguments(name, arguments)
    assert numbers and 0 not in numbers
    if choice == "named" or wanted.between is None:
        assert numbers == {1}


@pytest.mark.parametrize("wanted", FORMATS, ids=FORMAT_IDS)
def test_a_call_as_the_format_writes_it_is_in_its_grammar(wanted, tokenizer, library):
    arguments = ARGUMENTS[wanted.arguments]
    head, call = wanted.before, wanted.head.replace("NAME", "stop") + arguments + wanted.tail
    one = head + call + wanted.after
    two = None if wanted.between is None else head + call + wanted.between + call + wanted.after
    for choice, parallel, text, taken in (
        ("required", True, one, True),
        ("required", True, two, True),
        ("required", False, two, False),
        ("required", False, "Hello.", False),
        ("auto", True, one, True),
        ("auto", False, one, True),
    ):
        if text is None:
            continue
        lark = calls_lark(wanted, use_of(choice, parallel), {})
        state = state_of(library, StructuredOutputs(grammar=lark))
        ids = tokenizer.encode(text, add_special_tokens=False)
        accepted = state.validate_tokens(ids) == len(ids)
        if accepted:
            state.consume_tokens(ids)
            accepted = state.is_accepting()
        assert accepted == taken, (choice, parallel, text)


@pytest.mark.parametrize("wanted", FORMATS, ids=FORMAT_IDS)
def test_strict_tools_are_bound_where_the_model_chooses_to_call(wanted, tokenizer, library):
    lark = calls_lark(wanted, use_of("auto"), {})
    final = "<|channel|>final<|message|>" if wanted.name == "harmony" else ""
    wrong = WRONG[wanted.arguments]
    begun = wanted.before + wanted.head.replace("NAME", "stop")
    before = "" if wanted.begins != "mark" else "I look. "
    for text, whole in ((final + "Just text.", True), (before + begun + wrong, False)):
        state = state_of(library, StructuredOutputs(grammar=lark))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (state.validate_tokens(ids) == len(ids)) == whole, text


@pytest.mark.parametrize("wanted", [f for f in FORMATS if f.beside_json], ids=lambda f: f.name)
def test_an_answer_of_a_shape_stands_beside_calls(wanted, tokenizer, library):
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    lark = calls_lark(wanted, use_of("auto"), {}, answer=schema)
    final = "<|channel|>final<|message|>" if wanted.name == "harmony" else ""
    call = wanted.before + wanted.head.replace("NAME", "stop")
    for text, taken in ((final + '{"x": 1}', True), (call, True), (final + "Text", False)):
        state = state_of(library, StructuredOutputs(grammar=lark))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (state.validate_tokens(ids) == len(ids)) == taken, text


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 2**32 - 1))
def test_marks_that_are_special_tokens_are_written_as_tokens(wanted, seed):
    """`<|system|>` stands for a mark here: it is not made of characters."""
    tokenizer = Tokenizer.load(find_model("demo"))
    library = llguidance.LLTokenizer(
        tokenizer.core.to_str(), eos_token=list(tokenizer.eos_token_ids), n_vocab=4096
    )
    if not wanted.marks:
        return
    first = (wanted.before + wanted.head).partition("NAME")[0]
    mark = next((m for m in wanted.marks if first.startswith(m)), None)
    if mark is None:
        return
    lark = calls_lark(wanted, use_of("required"), {mark: 1})
    state = state_of(library, StructuredOutputs(grammar=lark))
    assert state.validate_tokens([1]) == 1 or wanted.begins == "channel"
    assert state.validate_tokens(tokenizer.encode(mark[:3], add_special_tokens=False)) == 0


def test_thinking_comes_before_a_forced_call(tokenizer, library):
    hermes = FORMATS[0]
    lark = calls_lark(hermes, use_of("required"), {})
    wanted = StructuredOutputs(grammar=lark, thinking=Thinking(begin="<think>", end="</think>"))
    call = hermes.head.replace("NAME", "stop") + "{}" + hermes.tail
    for text, taken in (
        (f"<think>\nHm {{ <tool.\n</think>\n\n{call}", True),
        (call, True),
        (f"Hm</think>{call}", False),
        (f"<think>Hm</think>Text{call}", False),
    ):
        state = state_of(library, wanted)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (state.validate_tokens(ids) == len(ids)) == taken, text
