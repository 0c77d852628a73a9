import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

from tokenry.backend.contract import DeviceRef

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "core" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date():
    stale = [p.name for p, text in generator().pages().items() if p.read_text() != text]
    assert not stale, f"run `make docs`: {stale}"


def test_every_file_and_function_of_the_tour_exists():
    text = (ROOT / "docs" / "tour.md").read_text()
    named = re.findall(r"`([a-z_/0-9]+\.py)(?::(\w+))?`", text)
    assert len(named) > 25
    for path, function in named:
        source = (ROOT / "core" / "tokenry" / path).read_text()
        assert not function or re.search(rf"^(class|def|async def) {function}\b", source, re.M), (
            f"{path} has no {function}"
        )


def test_the_backend_of_the_guide_opens_and_answers():
    text = (ROOT / "docs" / "write-a-backend.md").read_text()
    module = types.ModuleType("tokenry_small")
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], module.__dict__)
    ref = module.tokenry_probe()
    backend = module.tokenry_open(ref)
    other = DeviceRef(backend="other", index=0, name="", score=1)
    assert module.tokenry_open(other) is None
    assert backend.memory().total > backend.memory().used > 0
    assert backend.ops() == {}
    assert "tokenry_small" not in sys.modules


@pytest.mark.parametrize("page", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
