"""The page in a real browser (Debian's chromium by its driver), against `tokenry serve demo`.

Run by `make test-ui`. Screenshots go to build/ui/.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build" / "ui"
CHROMIUM = os.environ.get("CHROMIUM", shutil.which("chromium"))
DRIVER = os.environ.get("CHROMEDRIVER", shutil.which("chromedriver"))

# A browser is no part of `make test`: without a word for this directory nothing here is collected.
if not any("ui" in Path(arg).parts for arg in sys.argv[1:]):
    collect_ignore_glob = ["test_*.py"]


def _server_class():
    path = Path(__file__).parents[1] / "api" / "conftest.py"
    spec = importlib.util.spec_from_file_location("api_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Server


@pytest.fixture(scope="session")
def start_server():
    server_class, running = _server_class(), []

    def start(*options):
        command = [sys.executable, "-m", "tokenry", "serve", "demo", "--backend", "cpu"]
        command += ["--port", "0", "--kv-cache-bytes", "64MiB", *options]
        running.append(server_class(command, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}))
        return running[-1]

    yield start
    for server in running:
        if server.process.poll() is None:
            server.close()


@pytest.fixture(scope="session")
def server(start_server):
    return start_server().wait_ready()


@pytest.fixture
def slow_server(start_server):
    """Its answers take long enough to be stopped: one core, and no native kernels."""
    server = start_server(
        "--backend-option", "kernels=torch", "--backend-option", "threads=1"
    ).wait_ready()
    yield server
    server.close()


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not here: apt install chromium chromium-driver")
    selenium = pytest.importorskip("selenium.webdriver", reason="pip install 'tokenry[ui]'")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "window-size=1100,800", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = selenium.ChromeService(DRIVER)
    browser = selenium.Chrome(options=options, service=service)
    SHOTS.mkdir(parents=True, exist_ok=True)
    yield browser
    browser.quit()


class Page:
    """The page as its user has it before them."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url

    def open(self, path="/", *, media=()):
        features = [{"name": name, "value": value} for name, value in media]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get("about:blank")
        self.driver.get(self.url + path)
        return self

    def js(self, code, *args):
        return self.driver.execute_script("return " + code, *args)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, selector):
        return self.js("document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def wait(self, holds, what, seconds=30):
        """What `holds()` gives, as soon as it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = holds()
            if found:
                return found
            time.sleep(0.03)
        raise AssertionError(f"{what} did not come in {seconds} s")

    def ready(self):
        self.wait(lambda: self.text("#state").startswith("context"), "the model")
        return self

    def focused(self):
        return self.driver.switch_to.active_element

    def keys(self, *keys):
        self.focused().send_keys(*keys)

    def set(self, **fields):
        """Settings, as an input event brings them."""
        for name, value in fields.items():
            self.js(
                "(i => { i.value = arguments[1]; i.dispatchEvent(new Event('input', "
                "{bubbles: true})) })(document.querySelector(`[data-field=${arguments[0]}]`))",
                name, str(value),
            )  # fmt: skip

    def send(self, text):
        self.one("#text").send_keys(text)
        self.one("#send").click()

    def answered(self, count=1):
        """The answers, when there are so many and none is under way."""
        self.wait(
            lambda: (
                self.text("#send") == "Send"
                and len(self.all("article.assistant .body.said")) == count
            ),
            f"answer {count}",
        )
        return [e.get_property("textContent") for e in self.all("article.assistant .body")]

    def spy(self):
        """Keeps the bodies of the chat's requests in `requests`. The demo model likes to end its
        stories early: on their way they are asked not to.
        """
        self.js(
            "(window.asked = [], window.really = fetch, window.fetch = (u, i) => { "
            "if (!String(u).endsWith('/chat/completions')) return really(u, i); "
            "const body = JSON.parse(i.body); asked.push(body); "
            "return really(u, {...i, body: JSON.stringify({...body, ignore_eos: true})}) }, 1)"
        )

    @property
    def requests(self):
        return self.js("window.asked")

    def shot(self, name):
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def complaints(self):
        """What the browser's console says is wrong."""
        log = self.driver.get_log("browser")
        return [e["message"] for e in log if e["level"] == "SEVERE" and e["source"] != "network"]


@pytest.fixture
def page(driver, server):
    yield from _opened(driver, server)


@pytest.fixture
def slow_page(driver, slow_server):
    yield from _opened(driver, slow_server)


def _opened(driver, server):
    one = Page(driver, server.url)
    one.open()
    with contextlib.suppress(Exception):
        driver.execute_script("sessionStorage.clear()")
    one.open().ready()
    yield one
    assert one.complaints() == []


@pytest.fixture
def open_page(driver):
    return lambda url: Page(driver, url).open()


@pytest.fixture
def kill_engine():
    """Ends a server's engine process as the kernel would for want of memory."""

    def kill(server):
        for child in psutil.Process(server.process.pid).children():
            child.send_signal(signal.SIGKILL)

    return kill
