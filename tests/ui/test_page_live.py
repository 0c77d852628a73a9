"""What the page tells of the server: its live view, its state, its models and keys."""

import re
import threading

import httpx2
import pytest

Keys = pytest.importorskip("selenium.webdriver", reason="pip install 'tokenry[ui]'").Keys

LINE = "document.querySelector('#models polyline').getAttribute('points')"


def card(page, name):
    return page.text(f"[data-card='{name}'] dd")


def ask(url, prompt, max_tokens, **more):
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **more}
    return httpx2.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()


def test_the_live_view_counts_what_the_server_does(page, server):
    page.one("#tab-live").click()
    page.wait(lambda: card(page, "Finished"), "the cards")
    before = int(card(page, "Finished").replace(",", ""))
    prompts = ["Once upon a time there was a king who had a golden tree. " * 4] * 6
    load = [threading.Thread(target=ask, args=(server.url, p, 1900)) for p in prompts]
    for one in load:
        one.start()
    page.wait(lambda: card(page, "Decode") == "6", "six requests that decode")
    page.wait(lambda: int(card(page, "Tokens per second").replace(",", "")) > 0, "a rate")
    page.wait(lambda: page.js(LINE).count(" ") >= 2, "a line of three points")
    assert float(card(page, "KV blocks").split()[0]) > 0
    page.shot("live-light")
    for one in load:
        one.join()
    finished = lambda: int(card(page, "Finished").replace(",", ""))  # noqa: E731
    page.wait(lambda: finished() == before + 6, "six finished requests", 10)
    page.wait(lambda: card(page, "Decode") == "0", "silence", 10)
    ask(server.url, prompts[0], 4)
    page.wait(lambda: float(card(page, "Cached share").split()[0]) > 0, "the cached prompt", 10)
    rows = page.all(".times tbody tr")
    assert [r.find_element("css selector", "th").text for r in rows] == [
        "To the first token", "Between tokens", "In the queue", "Whole request",
    ]  # fmt: skip
    for i in (0, 2, 3):  # none of them was a stream: gaps between tokens were not seen
        assert re.search(r"\d (ms|s) ", rows[i].text), rows[i].text


def test_the_times_are_quantiles_of_the_buckets(page, server):
    """The same figure by hand, from the server's own answers before and after."""

    def told():
        return server.http.get("/live").json()["models"][0]["times"]["itl_s"]

    def row():
        return page.text(".times tbody tr:nth-child(2)")

    before = told()
    page.one("#tab-live").click()
    page.wait(lambda: page.all(".times tbody tr"), "the times")
    assert "last minute" not in row(), "what was before the first look is not of the last minute"
    ask(server.url, "Once", 300, stream=True)
    page.wait(lambda: row().endswith("299 in the last minute"), "299 gaps between 300 tokens", 10)
    counts = [a - b for a, b in zip(told()["counts"], before["counts"], strict=True)]
    assert counts[-1] == 299
    i = next(i for i, count in enumerate(counts) if count >= 299 / 2)
    low, high = (0.0, *before["bounds"])[i : i + 2]
    below = counts[i - 1] if i else 0
    median = low + (high - low) * (299 / 2 - below) / (counts[i] - below)
    shown = float(page.text(".times tbody tr:nth-child(2) td").split()[0])
    assert shown == pytest.approx(1000 * median, abs=0.06)


def test_devices_and_backends_are_told_with_reasons(page):
    page.open("/#live")
    page.wait(lambda: page.all("#backends tbody tr"), "the backends", 60)
    rows = {
        r.find_element("css selector", "th").text.split()[0]: r.text
        for r in page.all("#backends tbody tr")
    }
    assert "usable" in rows["cpu"]
    assert "score 1" in rows["cpu"]
    assert "simulator" in rows["sim-hpu"]
    assert "LlamaForCausalLM in float32" in page.text(".facts")
    assert "memory: " in page.text(".facts")
    assert page.one("#tab-live").get_attribute("aria-selected") == "true", "the address tells"


def test_dark(page):
    page.open(media=[("prefers-color-scheme", "dark")]).ready()
    page.spy()
    page.set(max_tokens=60, seed=7)
    page.send("Tell me a story.")
    page.answered()
    page.shot("chat-dark")
    page.one("#tab-live").click()
    page.wait(lambda: page.all("#backends tbody tr"), "the backends", 60)
    page.shot("live-dark")
    dark = page.js("getComputedStyle(document.body).backgroundColor")
    page.open(media=[("prefers-color-scheme", "light")]).ready()
    assert page.js("getComputedStyle(document.body).backgroundColor") != dark


def test_a_narrow_window_scrolls_down_only(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        page.open().ready()
        page.set(max_tokens=20)
        page.send("Hi")
        page.answered()
        page.shot("chat-narrow")
        assert page.js("document.documentElement.scrollWidth") <= 360
        page.one("#tab-live").click()
        page.wait(lambda: page.all("#backends tbody tr"), "the backends", 60)
        page.shot("live-narrow")
        assert page.js("document.querySelector('#live').scrollWidth") <= 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_dead_engine_is_told_and_words_are_kept(start_server, open_page, kill_engine):
    server = start_server().wait_ready()
    page = open_page(server.url).ready()
    page.spy()
    page.set(max_tokens=1800)
    page.send("Tell me a long story.")
    page.wait(lambda: len(page.text("article.assistant .body")) > 20, "a beginning")
    kill_engine(server)
    page.wait(lambda: page.text("#log .failed"), "the error")
    assert len(page.text("article.assistant .body")) > 20, "what was said stays"
    page.wait(lambda: "dead" in page.text("#state"), "the state", 10)
    page.shot("dead")
    page.send("Are you there?")
    page.wait(lambda: len(page.all("#log .failed")) == 2, "the second error")
    assert page.js("document.querySelector('#text').value") == "Are you there?"
    page.one("#tab-live").click()
    page.wait(lambda: "dead" in page.text("#models h2"), "the live view's word", 10)
    page.js("(document.querySelector('#tab-chat').click(), 1)")
    server.close()
    page.wait(lambda: page.text("#state") == "no connection", "the state", 15)


def test_a_key_is_asked_for_once_and_kept_in_the_tab(start_server, open_page):
    server = start_server("--api-key", "secret-1").wait_ready()
    page = open_page(server.url)
    page.wait(lambda: page.js("document.querySelector('#asking').open"), "the question")
    assert page.focused().get_property("id") == "key"
    page.shot("key")
    page.keys("wrong", Keys.ENTER)
    page.wait(lambda: page.js("document.querySelector('#key').value") == "", "a new question")
    page.keys("secret-1", Keys.ENTER)
    page.ready()
    page.set(max_tokens=5)
    page.send("Hi")
    page.answered()
    assert page.js("sessionStorage.getItem('key')") == "secret-1"
    assert page.js("localStorage.length + document.cookie.length") == 0
    page.open("/#live").ready()
    page.wait(lambda: card(page, "Finished") == "1", "the live view with the key")
    page.js("(sessionStorage.clear(), 1)")
    page.open()
    page.wait(lambda: page.js("document.querySelector('#asking').open"), "the question")
    page.keys(Keys.ESCAPE)
    page.wait(lambda: "wants an API key" in page.text("#state"), "the state")
    assert not page.js("document.querySelector('#asking').open")


def test_several_models_are_chosen_by_name(start_server, open_page):
    server = start_server("--served-model-name", "one", "two").wait_ready()
    page = open_page(server.url).ready()
    assert [o.text for o in page.all("#model option")] == ["one", "two"]
    page.spy()
    page.set(max_tokens=4)
    page.js(
        "(m => (m.value = 'two', m.dispatchEvent(new Event('change'))))"
        "(document.querySelector('#model'))"
    )
    page.send("Hi")
    page.answered()
    assert page.requests[0]["model"] == "two"
    assert page.one("article.assistant").get_attribute("aria-label") == "two"
