"""Chat templates render as transformers renders them; what they refuse is a bad request."""

import json

import pytest

from tokenry.errors import ModelLoadError, RequestError
from tokenry.text.chat import ChatTemplate, read_templates
from tokenry.text.tokenizer import Tokenizer

CHATML = """{% for message in messages %}
{% generation %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endgeneration %}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{% endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + ns.system + "<|eot_id|>" }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{{- "Year: " + date_string + "\\n" }}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- '{"name": ' + call.function.name | tojson + ', "args": ' }}
            {{- call.function.arguments | tojson(indent=2) }}
            {{- "}" }}
        {%- endfor %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {{ raise_exception('System role not supported') }}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant") }}
    {%- endif -%}
    {{ '<start_of_turn>' + message['role'] + '\\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{% continue %}{% endif %}
{%- if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL}
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "Grüße <b>"}}]
CHATS = {
    "one": [{"role": "user", "content": " Hello <b> é🎉 "}],
    "three": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Tell\n\n a story  "},
    ],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi"}],
}


@pytest.fixture
def pair(core_of, save_core, tmp_path):
    """Our tokenizer and transformers', with the template."""

    def make(template):
        transformers = pytest.importorskip("transformers")
        path = save_core(core_of("sentencepiece"), tmp_path, bos_token="<s>", eos_token="</s>")
        (path / "chat_template.jinja").write_text(template)
        return Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)

    return make


@pytest.mark.parametrize("generation", [True, False], ids=["prompt", "no-prompt"])
@pytest.mark.parametrize("chat", list(CHATS))
@pytest.mark.parametrize("style", list(TEMPLATES))
def test_renders_as_transformers(pair, style, chat, generation):
    ours, theirs = pair(TEMPLATES[style])
    options = {"add_generation_prompt": generation, "tools": TOOLS, "enable_thinking": False}
    try:
        expected = theirs.apply_chat_template(CHATS[chat], tokenize=False, **options)
    except Exception as error:  # the template's own complaint
        with pytest.raises(RequestError, match=str(error)):
            ours.chat_template.render(CHATS[chat], **options)
    else:
        assert ours.chat_template.render(CHATS[chat], **options) == expected


@pytest.mark.parametrize("style", list(TEMPLATES))
def test_continues_the_final_message_as_transformers(pair, style):
    ours, theirs = pair(TEMPLATES[style])
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon "}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    expected = theirs.apply_chat_template(chat, tokenize=False, **options)
    assert ours.chat_template.render(chat, **options) == expected
    assert expected.rstrip().endswith("Once upon")


def test_tool_call_arguments_reach_the_template_as_an_object(pair):
    ours, theirs = pair(LLAMA3)
    call = {"type": "function", "function": {"name": "f", "arguments": {"ort": "Köln"}}}
    chat = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    assert ours.chat_template.render(chat) == expected


@pytest.mark.parametrize("style", ["chatml", "gemma"])
def test_text_parts(style):
    template = ChatTemplate({"default": TEMPLATES[style]}, special_tokens={"bos_token": "<s>"})
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = template.render([{"role": "user", "content": parts}])
    assert ("one\ntwo" if style == "chatml" else "onetwo") in text


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0].role"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([{"role": "system", "content": "x"}], "messages"),
        ([{"role": "user"}], "messages[0].content"),
    ],
    ids=["none", "string", "no-role", "number", "image", "arguments", "refused", "no-content"],
)
def test_bad_messages_name_the_field(messages, param):
    template = ChatTemplate({"default": GEMMA}, special_tokens={"bos_token": "<s>"})
    with pytest.raises(RequestError) as caught:
        template.render(messages)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_model_without_template_is_a_bad_request():
    with pytest.raises(RequestError, match="no chat template") as caught:
        ChatTemplate({}, special_tokens={}).render(CHATS["one"])
    assert "--chat-template" in (caught.value.mend or "")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ raise_exception.__globals__['os'] }}",
    ],
    ids=["class", "mutation", "namespace", "globals"],
)
def test_template_cannot_leave_the_sandbox(attack):
    template = ChatTemplate({"default": attack}, special_tokens={})
    with pytest.raises(RequestError, match="refuses"):
        template.render(CHATS["one"])


def test_syntax_error_names_the_line():
    with pytest.raises(RequestError, match="line 2"):
        ChatTemplate({"default": "\n{% if %}"}, special_tokens={}).render(CHATS["one"])


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    template = ChatTemplate(read_templates(tmp_path, {"chat_template": named}), special_tokens={})
    chat = CHATS["one"]
    assert template.render(chat) == "D"
    assert template.render(chat, tools=TOOLS) == "T"
    assert template.render(chat, chat_template="tool_use") == "T"
    assert template.render(chat, chat_template="own {{ messages|length }}") == "own 1"


def test_template_file_wins(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "mine.jinja").write_text("mine")
    config = {"chat_template": "config"}
    assert read_templates(tmp_path, config) == {"default": "jinja"}
    assert read_templates(tmp_path, config, tmp_path / "mine.jinja") == {"default": "mine"}
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_templates(tmp_path, config, tmp_path / "none.jinja")
