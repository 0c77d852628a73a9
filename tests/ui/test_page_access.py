"""The page without a mouse, and for a screen reader: names, roles, focus, contrast, motion."""

import pytest

Keys = pytest.importorskip("selenium.webdriver", reason="pip install 'tokenry[ui]'").Keys
ActionChains = pytest.importorskip("selenium.webdriver").ActionChains

# Colours as a browser mixes them, and WCAG 2's contrast of text on the nearest opaque ground.
CONTRAST = """(() => {
  const parse = (c) => {
    const m = c.match(/[\\d.]+/g).map(Number);
    return m.length < 4 ? [...m, 1] : m;
  };
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (c) => [.2126, .7152, .0722]
    .reduce((sum, share, i) => sum + share * linear(c[i] / 255), 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c[3] > .99) return c;
    }
    return [255, 255, 255, 1];
  };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || e.closest(".hidden, .skip, :disabled, svg")) continue;
    const own = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent);
    if (!own.join("").trim()) continue;
    const color = parse(getComputedStyle(e).color);
    const [a, b] = [light(color), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) bad.push([e.tagName, e.className, own.join(""), ratio.toFixed(2)]);
  }
  return bad; })()"""


def tree(page):
    """The browser's accessibility tree: what a screen reader is given."""
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [
        (n["role"]["value"], n.get("name", {}).get("value", ""))
        for n in nodes
        if not n["ignored"] and "role" in n
    ]


def walk(page, count):
    """Ids (or classes, or text) of what Tab reaches, in order."""
    seen = []
    for _ in range(count):
        page.keys(Keys.TAB)
        at = page.focused()
        seen.append(at.get_property("id") or at.get_attribute("class") or at.text)
    return seen


def test_every_control_has_a_name_and_ids_are_single(page):
    page.js("(document.querySelector('#settings').open = true, 1)")
    page.set(max_tokens=5)
    page.send("Hi")
    page.answered()
    needs = {
        "button", "textbox", "combobox", "tab", "tabpanel", "spinbutton", "checkbox", "log",
        "article", "table", "link", "dialog", "group",
    }  # fmt: skip
    for at in ("chat", "live"):
        page.one(f"#tab-{at}").click()
        if at == "live":
            page.wait(lambda: page.all("#backends tbody tr"), "the backends", 60)
        nodes = tree(page)
        nameless = [role for role, name in nodes if role in needs - {"group", "table"} and not name]
        assert nameless == []
        roles = {role for role, _ in nodes}
        assert {"banner", "main", "tablist", "heading", "status"} <= roles
    ids = page.js("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    missing = page.js(
        "['aria-controls', 'aria-labelledby', 'aria-describedby', 'for'].flatMap(a => "
        "[...document.querySelectorAll(`[${a}]`)].map(e => e.getAttribute(a)))"
        ".filter(id => !document.getElementById(id))"
    )
    assert missing == []
    assert page.js("document.documentElement.lang") == "en"
    assert page.js("document.title") == "tokenry"


def test_a_chat_by_the_keyboard_alone(page):
    page.spy()
    assert page.focused().get_property("id") == "text", "where one begins"
    page.set(max_tokens=12, seed=5)
    page.keys("Once", Keys.ENTER)
    page.answered()
    assert page.focused().get_property("id") == "text", "the focus stays"
    page.js("(document.activeElement.blur(), 1)")
    order = walk(page, 12)
    # chromium begins after the last focus: turn the round to the page's beginning
    start = order.index("model") if "model" in order else 0
    order = order[start:] + order[:start]
    wanted = ["model", "tab-chat", "log", "body said", "quiet again", "quiet"]
    assert [x for x in order if x in wanted][: len(wanted)] == wanted


def test_the_tokens_of_an_answer_are_told_by_arrow_keys(page):
    page.spy()
    page.set(max_tokens=12, seed=5)
    page.keys("Once", Keys.ENTER)
    page.answered()
    page.js("(document.querySelector('article.assistant .body').focus(), 1)")
    page.keys(Keys.ARROW_RIGHT)
    assert not page.js("document.querySelector('#tip').hidden")
    first = page.text("#said")
    assert "%" in first
    assert "else" in first
    page.keys(Keys.ARROW_RIGHT)
    assert page.text("#said") != first
    page.keys(Keys.ESCAPE)
    assert page.js("document.querySelector('#tip').hidden")


def test_the_tabs_turn_by_arrow_keys(page):
    page.js("(document.querySelector('#tab-chat').focus(), 1)")
    page.keys(Keys.ARROW_RIGHT)
    assert page.focused().get_property("id") == "tab-live"
    assert page.one("#live").is_displayed()
    assert not page.one("#chat").is_displayed()
    assert page.js("document.querySelector('#tab-chat').tabIndex") == -1
    page.keys(Keys.HOME)
    assert page.one("#chat").is_displayed()


def test_the_end_of_an_answer_is_said_and_its_stream_is_not(slow_page):
    page = slow_page
    page.spy()
    page.set(max_tokens=1900)
    page.keys("Tell me a story.", Keys.ENTER)
    page.wait(lambda: page.text("article.assistant .body"), "a beginning")
    assert page.one("#log").get_attribute("aria-busy") == "true"
    assert page.text("#said") == "The answer is being written"
    page.keys(Keys.ESCAPE)
    page.answered()
    assert page.one("#log").get_attribute("aria-busy") is None
    assert page.text("#said") == "Stopped"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page, scheme):
    page.open(media=[("prefers-color-scheme", scheme)]).ready()
    page.js("(document.querySelector('#settings').open = true, 1)")
    page.set(max_tokens=5)
    page.send("Hi")
    page.answered()
    assert page.js(CONTRAST) == []
    page.one("#tab-live").click()
    page.wait(lambda: page.all("#backends tbody tr"), "the backends", 60)
    assert page.js(CONTRAST) == []


def test_nothing_moves_for_those_who_asked_so(page):
    moving = (
        "[...document.querySelectorAll('*')].filter(e => "
        "getComputedStyle(e).transitionDuration !== '0s' || "
        "getComputedStyle(e).animationName !== 'none').length"
    )
    assert page.js(moving) > 0
    page.open(media=[("prefers-reduced-motion", "reduce")]).ready()
    assert page.js(moving) == 0
