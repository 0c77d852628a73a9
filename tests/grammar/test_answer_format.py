"""Models whose marks are special tokens: what is read of their answers, and what binds them."""

import json
import shutil

import llguidance
import pytest

from tokenry.config import ServerConfig
from tokenry.errors import ConfigError, RequestError
from tokenry.grammar.source import grammar_of
from tokenry.hub import find_model
from tokenry.structured import StructuredOutputs, Thinking
from tokenry.text.detokenizer import make_detokenizer
from tokenry.text.reasoning import NAMES as REASONING_NAMES
from tokenry.text.tokenizer import Tokenizer
from tokenry.text.tools import NO_TOOLS, read_tools
from tokenry.text.tools_answer import AnswerFormat
from tokenry.text.tools_formats import NAMES as TOOL_NAMES
from tokenry.text.tools_scan import CallArguments, CallBegin, Content, Reasoning

HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<|constrain|>"]
SPECIAL = [*HARMONY, "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|other|>"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
SHAPE = StructuredOutputs(json={"type": "integer"}, param="response_format")


def tokenizer_of(path, template):
    """The demo's tokenizer with more special tokens, and a template that only says which."""
    source = find_model("demo")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["extra_special_tokens"] = [*config.get("extra_special_tokens", []), *SPECIAL]
    config["eos_token"] = "<|return|>"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(template)
    return Tokenizer.load(path)


@pytest.fixture
def make(tmp_path):
    def form(template, tools="auto", reasoning="auto"):
        return AnswerFormat.of(tokenizer_of(tmp_path, template), tools, reasoning)

    return form


def read(form, use, text, prompt=""):
    """(content, thinking, calls) of the answer that these tokens are."""
    ids = form.tokenizer.encode(text, add_special_tokens=False)
    special = form.needs_specials(use)
    reader = form.reader(use, prompt, drop_specials=special)
    detokenizer = make_detokenizer(form.tokenizer, skip_special_tokens=not special)
    pieces = [p for i in ids for p in reader.feed(detokenizer.feed((i,)))]
    pieces += reader.feed(detokenizer.flush()) + reader.flush()
    told = ["".join(p.text for p in pieces if isinstance(p, k)) for k in (Content, Reasoning)]
    names = [p.name for p in pieces if isinstance(p, CallBegin)]
    arguments = "".join(p.text for p in pieces if isinstance(p, CallArguments))
    return (*told, names, arguments), form.num_reasoning(use, prompt, ids, special=special)


def compiles(form, wanted, text):
    """Whether the shape takes the text to its end."""
    library = llguidance.LLTokenizer(
        form.tokenizer.core.to_str(), eos_token=list(form.tokenizer.eos_token_ids)
    )
    state = llguidance.LLMatcher(library, grammar_of(wanted, form.one_token_ids), log_level=0)
    assert not state.is_error(), state.get_error()
    ids = form.tokenizer.encode(text, add_special_tokens=False)
    return (
        state.validate_tokens(ids) == len(ids)
        and state.consume_tokens(ids)
        and (state.is_accepting())
    )


def test_harmony_of_special_tokens(make):
    form = make("<|channel|>analysis<|message|>")
    use = read_tools(TOOLS, "auto", None)
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
    told, counted = read(form, use, thought + call)
    assert told == ("", "Hm.", ["add"], '{"a": 1}')
    ids = form.tokenizer.encode(thought, add_special_tokens=False)
    assert 0 < counted < len(ids)
    told, _ = read(form, NO_TOOLS, thought + "<|channel|>final<|message|>Yes<|other|>.<|return|>")
    assert told == ("Yes.", "Hm.", [], "")
    final = "<|channel|>final<|message|>"
    shape = form.shape(NO_TOOLS, SHAPE, "")
    for text, taken in ((thought + final + "12", True), (final + "12", True), ("12", False)):
        assert bool(compiles(form, shape, text)) == taken, text
    must = form.shape(read_tools(TOOLS, "required", None), None, "")
    assert compiles(form, must, thought + call.removesuffix("<|call|>"))
    assert not compiles(form, must, final + "12")


def test_mistral_of_special_tokens(make):
    form = make("[TOOL_CALLS] [ARGS] [THINK] tools")
    use = read_tools(TOOLS, "auto", None)
    text = '[THINK]Hm.[/THINK]Well<|other|>. [TOOL_CALLS]add[ARGS]{"a": 1}'
    told, counted = read(form, use, text)
    assert told == ("Well.", "Hm.", ["add"], '{"a": 1}')
    inside = form.tokenizer.encode("[THINK]Hm.[/THINK]", add_special_tokens=False)
    assert counted == len(inside)
    must = form.shape(read_tools(TOOLS, "required", None), None, "")
    assert must.param == "tools"
    assert compiles(form, must, '[THINK]Hm.[/THINK][TOOL_CALLS]add[ARGS]{"a": 1}')
    assert compiles(form, must, '[TOOL_CALLS]add[ARGS]{"a": 1}')
    assert not compiles(form, must, "Hello.")
    begun = form.shape(NO_TOOLS, SHAPE, "...[THINK]\n")
    assert begun.thinking == Thinking(end="[/THINK]")
    assert compiles(form, begun, "Hm.[/THINK]12")
    assert not compiles(form, begun, "12")
    assert form.shape(NO_TOOLS, SHAPE, "[THINK]\n[/THINK]\n").thinking is None


def test_a_plain_model_reads_nothing(make):
    form = make("{{ messages }}")
    assert not form.reads(NO_TOOLS)
    assert not form.needs_specials(NO_TOOLS)
    assert form.shape(NO_TOOLS, None, "") is None
    assert form.shape(NO_TOOLS, SHAPE, "") == SHAPE
    assert form.tools.name == "json"


def test_the_server_may_be_told_otherwise(make):
    form = make("<tool_call> </think>", tools="mistral", reasoning="none")
    assert (form.tools.name, form.reasoning) == ("mistral", None)
    assert make("x", reasoning="harmony").tools.name == "harmony"
    with pytest.raises(ConfigError, match="--tool-parser"):
        make("x", tools="morse")
    with pytest.raises(ConfigError, match="--reasoning-parser"):
        make("x", reasoning="morse")


@pytest.mark.parametrize(
    ("shape", "template"),
    [
        (StructuredOutputs(regex="a", param="guided_regex"), "<tool_call>"),
        (SHAPE, "<|python_tag|>"),
    ],
)
def test_a_shape_that_cannot_stand_beside_tools_is_refused(make, shape, template):
    with pytest.raises(RequestError) as caught:
        make(template).shape(read_tools(TOOLS, "auto", None), shape, "")
    assert caught.value.param == shape.param


def test_every_format_can_be_asked_for_on_the_command_line():
    for name in TOOL_NAMES:
        assert ServerConfig(tool_parser=name).tool_parser == name
    for name in REASONING_NAMES:
        assert ServerConfig(reasoning_parser=name).reasoning_parser == name
    fields = ServerConfig.__annotations__
    for field, names in (("tool_parser", TOOL_NAMES), ("reasoning_parser", REASONING_NAMES)):
        assert {
            part.strip(" \"'\n") for part in fields[field][8:-1].split(",") if part.strip()
        } == (set(names))
