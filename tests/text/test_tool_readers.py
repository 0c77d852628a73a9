"""Readers of tool calls and of thinking: texts as the models write them, cut at every place."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.text.reasoning import FORMATS as THINKING
from tokenry.text.reasoning import Plain, ThinkingReader, choose_reasoning
from tokenry.text.tools_formats import FORMATS, choose_format
from tokenry.text.tools_scan import (
    CallArguments,
    CallBegin,
    Content,
    Marks,
    Reasoning,
    Scanner,
    joined,
)

BY_NAME = {known.name: known for known in FORMATS}
KNOWN = {
    "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "array"}}},
    "add": {"properties": {"a": {"type": "integer"}, "b": {"type": "number"}}},
}
W = {"city": 'Oslo "}]) \\ <tool_call', "days": [1, {"x": None}]}
A = {"a": 1, "b": -2.5}
W_JSON, A_JSON = json.dumps(W), json.dumps(A)
BOTH = [("weather", W), ("add", A)]

CASES = {
    "hermes": [
        (f'Hm.\n<tool_call>\n{{"name": "weather", "arguments": {W_JSON}}}\n</tool_call>\n'
         f'<tool_call>\n{{"arguments": {A_JSON}, "name": "add"}}\n</tool_call>', "Hm.", BOTH),
        ("No call, <tool", "No call, <tool", []),
        ('<tool_call>{"name": "add"}</tool_call> Done.', "Done.", [("add", {})]),
        ('<tool_call>nonsense</tool_call>', "<tool_call>nonsense", []),
    ],
    "qwen3_coder": [
        ("Hm.\n<tool_call>\n<function=weather>\n<parameter=city>\n" + W["city"] + "\n</parameter>\n"
         '<parameter=days>\n[1, {"x": null}]\n</parameter>\n</function>\n</tool_call>\n'
         "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n-2.5\n</parameter>\n"
         "</function>\n</tool_call>", "Hm.", BOTH),
        ("<tool_call>\n<function=add>\n</function>\n</tool_call>\nDone.", "Done.", [("add", {})]),
        ("<tool_call><function=f><parameter=x>\n1 <b> </parameter></function></tool_call>", "",
         [("f", {"x": "1 <b> "})]),
        ("a < b <function", "a < b <function", []),
    ],
    "llama3_json": [
        (f'{{"name": "weather", "parameters": {W_JSON}}}; '
         f'{{"name": "add", "parameters": {A_JSON}}}', "", BOTH),
        (f'<|python_tag|>{{"type": "function", "name": "add", "parameters": {A_JSON}}}', "",
         [("add", A)]),
        ('{"city": "Oslo"}', '{"city": "Oslo"}', []),
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("Hello {you}\n", "Hello {you}\n", []),
        ('{"na', '{"na', []),
    ],
    "json": [
        (f'```json\n{{"name": "weather", "parameters": {W_JSON}}}\n```', "", [("weather", W)]),
        (f'[{{"name": "weather", "parameters": {W_JSON}}},\n {{"name": "add", "parameters": '
         f"{A_JSON}}}]", "", BOTH),
        ('```json\n{"x": 1}\n```', '```json\n{"x": 1}\n```', []),
        ("```python\nprint({})\n```", "```python\nprint({})\n```", []),
        (" ", " ", []),
    ],
    "pythonic": [
        (f"[weather(city={W['city']!r}, days=[1, {{'x': None}}]), add(a=1, b=-2.5)]", "", BOTH),
        ("<|python_start|>[add(a=1, b=-2.5)]<|python_end|>", "", [("add", A)]),
        ("[add(a=true)]", "", [("add", {"a": True})]),
        ("[1, 2, 3]", "[1, 2, 3]", []),
        ("[see (a", "[see (a", []),
        ("Hello [add(a=1)]", "Hello [add(a=1)]", []),
    ],
    "mistral": [
        (f'Well. [TOOL_CALLS] [{{"name": "weather", "arguments": {W_JSON}}}, '
         f'{{"name": "add", "arguments": {A_JSON}}}]', "Well.", BOTH),
        (f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{W_JSON}[TOOL_CALLS]add[ARGS]{A_JSON}", "",
         BOTH),
        (f"[TOOL_CALLS]add{A_JSON}", "", [("add", A)]),
        ("[TOOL_CALLS]add", "", [("add", {})]),
        ("a [TOOL", "a [TOOL", []),
    ],
    "deepseek_v3": [
        ("Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
         f"{W_JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
         f"{A_JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "Ok.", BOTH),
    ],
    "deepseek_v31": [
        (f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{W_JSON}"
         f"<｜tool▁call▁end｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{A_JSON}<｜tool▁call▁end｜>"
         "<｜tool▁calls▁end｜>", "", BOTH),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜><｜tool▁call▁end｜>"
         "<｜tool▁calls▁end｜>", "", [("add", {})]),
    ],
    "harmony": [
        ("<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary "
         f"to=functions.weather <|constrain|>json<|message|>{W_JSON}", "", [("weather", W)]),
        ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.add"
         f"<|channel|>commentary json<|message|>{A_JSON}<|call|>", "I look.", [("add", A)]),
        ("<|channel|>final<|message|>Hello.<|return|>", "Hello.", []),
        ("Hello.", "Hello.", []),
    ],
}  # fmt: skip
CASES["mistral_v11"] = CASES["mistral"]
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


def read(reader, text, cuts):
    pieces, at = [], 0
    for cut in [*sorted(cuts), len(text)]:
        pieces += reader.feed(text[at:cut])
        at = cut
    return joined([*pieces, *reader.flush()])


def summary(pieces):
    """Content, thinking and calls; each call must begin once, before its arguments."""
    content = "".join(p.text for p in pieces if isinstance(p, Content))
    thought = "".join(p.text for p in pieces if isinstance(p, Reasoning))
    calls = []
    for piece in pieces:
        if isinstance(piece, CallBegin):
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        elif isinstance(piece, CallArguments):
            assert piece.index == len(calls) - 1
            calls[-1][1] += piece.text
    return content, thought, calls


def reader_of(name):
    wanted = BY_NAME[name]
    return wanted.read(Marks(wanted.marks), KNOWN)


def test_every_format_has_a_case():
    assert set(CASES) == set(BY_NAME)


@pytest.mark.parametrize(("name", "text", "content", "calls"), FLAT)
def test_calls_are_read_wherever_the_text_is_cut(name, text, content, calls):
    whole = read(reader_of(name), text, [])
    told, _, found = summary(whole)
    assert told == content
    assert [(n, json.loads(arguments)) for n, arguments in found] == calls
    for cut in range(1, len(text)):
        assert summary(read(reader_of(name), text, [cut])) == summary(whole), cut
    assert summary(read(reader_of(name), text, range(1, len(text)))) == summary(whole)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLAT), st.data())
def test_calls_are_read_from_any_pieces(case, data):
    name, text, _, _ = case
    cuts = data.draw(st.lists(st.integers(1, max(1, len(text) - 1)), max_size=8))
    assert summary(read(reader_of(name), text, cuts)) == summary(read(reader_of(name), text, []))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(BY_NAME)), st.text(alphabet='{}[]",:\\ \nabn(=`', max_size=30))
def test_nonsense_is_read_to_its_end_and_the_same_in_pieces(name, text):
    whole = summary(read(reader_of(name), text, []))
    assert summary(read(reader_of(name), text, range(1, len(text)))) == whole
    if not any(mark in text for mark in BY_NAME[name].marks) and not whole[2]:
        assert whole[0] == text


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLAT), st.integers(0, 200))
def test_an_answer_that_was_cut_tells_no_call_twice(case, length):
    name, text, _, calls = case
    _, _, found = summary(read(reader_of(name), text[:length], range(1, min(length, len(text)))))
    assert [n for n, _ in found] == [n for n, _ in calls][: len(found)]


ARGUMENTS_AS_WRITTEN = '{"a" :1,\n "b":  [ ] }'


@pytest.mark.parametrize("name", [n for n in BY_NAME if BY_NAME[n].arguments == "json"])
def test_arguments_are_told_as_they_are_written(name):
    wanted = BY_NAME[name]
    head = wanted.before + wanted.head.replace("NAME", "add")
    text = head + ARGUMENTS_AS_WRITTEN + wanted.tail + wanted.after
    reader = reader_of(name)
    pieces = [reader.feed(char) for char in text]
    told = [p for some in pieces for p in some if isinstance(p, CallArguments)]
    assert "".join(p.text for p in told) == ARGUMENTS_AS_WRITTEN
    assert len(told) > 5  # in pieces, not at the end


@pytest.mark.parametrize("wanted", THINKING, ids=lambda f: f.name)
@pytest.mark.parametrize("begun", [False, True])
def test_thinking_is_told_apart(wanted, begun):
    text = ("" if begun else wanted.begin) + f"\nIt is 3 < 4.\n{wanted.end}\n\nYes <b>.\n"

    def reader():
        return ThinkingReader(wanted, Marks(wanted.marks), Plain(), begun=begun)

    expected = ("Yes <b>.\n", "It is 3 < 4.", [])
    assert summary(read(reader(), text, [])) == expected
    for cut in range(1, len(text)):
        assert summary(read(reader(), text, [cut])) == expected
    assert summary(read(reader(), "Yes.", [])) == (("", "Yes.", []) if begun else ("Yes.", "", []))


def test_harmony_tells_thinking_apart():
    text = CASES["harmony"][0][0]
    assert summary(read(reader_of("harmony"), text, []))[1] == "Think."


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["<a>", "<ab", "<", "a", "b>", "</a>", ">"]), max_size=12))
def test_a_scanner_cuts_as_if_the_text_had_come_at_once(pieces):
    marks = Marks(("<a>", "</a>", "<abc>"))
    text = "".join(pieces)

    def cut(parts):
        scanner = Scanner(marks)
        found = [part for piece in parts for part in scanner.feed(piece)] + scanner.flush()
        merged = []
        for part, is_mark in found:
            if merged and not is_mark and not merged[-1][1]:
                merged[-1] = (merged[-1][0] + part, False)
            else:
                merged.append((part, is_mark))
        return merged

    assert cut(pieces) == cut([text]) == cut(text)


@pytest.mark.parametrize(
    ("template", "calls", "thinking"),
    [
        ("{{ '<tool_call>' }} </think>", "hermes", "think"),
        ("<tool_call> <function=example>", "qwen3_coder", None),
        ("<|python_tag|>", "llama3_json", None),
        ("[func_name1(params_name1=1)] <|python_tag|>", "pythonic", None),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("[TOOL_CALLS] [ARGS]", "mistral_v11", None),
        ("<｜tool▁calls▁begin｜> ```json", "deepseek_v3", None),
        ("<｜tool▁calls▁begin｜> <think>", "deepseek_v31", "think"),
        ("<|channel|>analysis<|message|>", "harmony", None),
        ("<start_of_turn>model", "json", None),
    ],
)
def test_formats_are_chosen_from_the_template(template, calls, thinking):
    assert choose_format("auto", template).name == calls
    found = choose_reasoning("auto", template)
    assert (found and found.name) == thinking
