"""Talking to the model on the page."""

import pytest

Keys = pytest.importorskip("selenium.webdriver", reason="pip install 'tokenry[ui]'").Keys
ActionChains = pytest.importorskip("selenium.webdriver").ActionChains


def test_a_message_is_answered_as_a_stream(page):
    page.spy()
    page.set(max_tokens=120, seed=7)
    page.send("Tell me a story.")
    assert page.text("#send") == "Stop"
    seen = page.wait(lambda: page.text("article.assistant .body"), "a beginning")
    (answer,) = page.answered()
    assert answer.startswith(seen)
    assert len(answer) > len(seen)
    assert page.text("article.user .body") == "Tell me a story."
    assert "120 tokens" in page.text("article.assistant .row")
    assert "per second" in page.text("article.assistant .row")
    assert page.focused().get_property("id") == "text"
    page.shot("chat-light")


def test_a_second_message_carries_the_conversation(page):
    page.spy()
    page.set(max_tokens=8)
    page.send("One.")
    first = page.answered()[0]
    page.send("Two.")
    page.answered(2)
    said = [(m["role"], m["content"]) for m in page.requests[1]["messages"]]
    assert said == [("user", "One."), ("assistant", first), ("user", "Two.")]


def test_stop_keeps_what_was_said_and_the_server_forgets_the_request(slow_page, slow_server):
    page, server = slow_page, slow_server
    page.spy()
    page.set(max_tokens=1500)
    page.js("document.querySelector('#probabilities').click()")
    page.send("Tell me a long story.")
    page.wait(lambda: len(page.text("article.assistant .body")) > 20, "a beginning")
    page.one("#text").send_keys(Keys.ESCAPE)
    (answer,) = page.answered()
    assert len(answer) > 20
    assert "stopped" in page.text("article.assistant .row")
    running = lambda: sum(server.http.get("/live").json()["models"][0]["requests"].values())  # noqa: E731
    page.wait(lambda: running() == 0, "the end of the request", 10)


def test_regenerate_takes_another_answer_to_the_same_message(page):
    page.spy()
    page.set(max_tokens=24, temperature=1, seed=1)
    page.send("Once")
    first = page.answered()[0]
    page.set(seed=2)
    page.one(".again").click()
    page.wait(lambda: len(page.requests) == 2, "a second request")
    second = page.answered()[0]
    assert second != first
    assert page.requests[0]["messages"] == page.requests[1]["messages"]


def test_settings_are_what_is_asked_for(page):
    page.spy()
    page.one("#settings summary").click()
    page.one("#system").send_keys("Be short.")
    page.set(temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, max_tokens=5, seed=3)
    page.set(repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.2, stop="THE END")
    page.shot("settings")
    page.send("Hi")
    page.answered()
    asked = page.requests[0]
    assert asked["messages"][0] == {"role": "system", "content": "Be short."}
    expected = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 5, "seed": 3,
        "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "stop": "THE END", "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    assert {name: asked[name] for name in expected} == expected
    page.open().ready()
    value = page.js("document.querySelector('[data-field=top_k]').value")
    assert value == "40", "settings outlive a reload"
    page.spy()
    page.js("(document.querySelector('#settings').open = true, 1)")
    page.one("#defaults").click()
    page.set(max_tokens=3)
    page.send("Hi")
    page.answered()
    assert not {"temperature", "top_k", "seed", "stop"} & page.requests[0].keys()


def test_a_wrong_setting_is_told_and_nothing_is_sent(page):
    page.spy()
    page.set(tools="[{")
    page.send("Hi")
    assert "not JSON" in page.text("#tools-wrong")
    page.set(tools="", temperature=7)
    page.one("#text").send_keys(Keys.ENTER)
    assert page.requests == []
    assert page.focused().get_attribute("data-field") == "temperature"
    assert page.js("document.querySelector('#text').value") == "Hi"


def test_a_tokens_probabilities_show_on_hover(page):
    page.spy()
    page.set(max_tokens=12, seed=5)
    page.send("Once")
    page.answered()
    tokens = page.all(".tok")
    assert len(tokens) > 5
    ActionChains(page.driver).move_to_element(tokens[3]).perform()
    page.wait(lambda: not page.js("document.querySelector('#tip').hidden"), "the tip", 5)
    told = page.js(
        "[...document.querySelectorAll('#tip td:last-child')].map(e => parseFloat(e.textContent))"
    )
    assert len(told) >= 5
    assert told == sorted(told, reverse=True)
    assert 0 < sum(told) <= 100.5
    page.shot("probabilities")


def test_an_error_of_the_server_is_shown_and_the_words_are_kept(page):
    page.set(tools='[{"type": "nothing"}]')
    page.send("Hello there")
    page.wait(lambda: page.text("#log .failed"), "the error")
    assert "tools" in page.text("#log .failed")
    assert page.js("document.querySelector('#text').value") == "Hello there"
    assert page.all("article") == []


def test_a_full_context_offers_to_drop_the_oldest_turns(page):
    page.set(max_tokens=4)
    page.send("First.")
    page.answered()
    page.js("(document.querySelector('#text').value = 'many words '.repeat(1200), 1)")
    page.one("#send").click()
    page.wait(lambda: "fills the model's context" in page.text("#log"), "the note")
    page.js("(document.querySelector('#text').value = 'Short.', 1)")
    page.one("#log .note button").click()
    assert len(page.answered()) == 1
    assert [e.text for e in page.all("article.user .body")] == ["Short."]


def test_tool_calls_and_reasoning_are_shown(page):
    """The demo model neither thinks nor calls: the events are what a server would send."""
    page.js(
        """(window.fetch = async () => new Response(new Blob([
        {reasoning_content: 'Let me see.', reasoning: 'Let me see.'},
        {content: 'I look.'},
        {tool_calls: [{index: 0, id: 'c1', type: 'function',
                       function: {name: 'weather', arguments: '{"ci'}}]},
        {tool_calls: [{index: 0, function: {arguments: 'ty": "Rome"}'}}]},
        {tool_calls: [{index: 1, id: 'c2', function: {name: 'time', arguments: '{}'}}]},
        ].map((delta, i) => 'data: ' + JSON.stringify({choices: [{index: 0, delta,
          finish_reason: i == 4 ? 'tool_calls' : null}]}) + '\\n\\n')), {status: 200}), 1)"""
    )
    page.send("Weather?")
    assert page.answered() == ["I look."]
    assert page.text(".thinking div") == "Let me see."
    calls = [e.get_property("textContent") for e in page.all(".call")]
    assert calls == ['Tool call: weather{"city": "Rome"}', "Tool call: time{}"]
    page.shot("tools")
