"""What deploy/ draws and alerts on is what the server really emits."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tokenry.config import EngineConfig, ServerConfig, load

DEPLOY = Path(__file__).parents[2] / "deploy"


def dashboard():
    return json.loads((DEPLOY / "grafana" / "tokenry.json").read_text())


def expressions():
    panels = [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])
    ]
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return panels + [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def emitted(toy):
    """Sample name -> names of its labels, after some requests of each kind."""
    body = {"prompt": "Once", "max_tokens": 4, "ttft_target_ms": 1.0}
    toy.http.post("/v1/completions", json={**body, "stream": True})
    toy.http.post("/v1/completions", json=body)
    found = {}
    for line in toy.http.get("/metrics").text.splitlines():
        if match := re.match(r"([\w:]+)(?:\{(.*)\})? ", line):
            labels = set(re.findall(r"(\w+)=", match[2] or ""))
            found.setdefault(match[1], set()).update(labels)
    # a counter without a label value yet has no sample; its type line names it
    for name in re.findall(r"# TYPE (\S+) counter", toy.http.get("/metrics").text):
        found.setdefault(name, {"model_name", "op"})
    return found


def test_every_series_of_the_dashboard_and_the_alerts_is_emitted_with_its_labels(emitted):
    seen = 0
    for expression in expressions():
        for name, labels in re.findall(r"(tokenry:\w+)(\{[^}]*\})?", expression):
            assert name in emitted, f"{name} in {expression}"
            asked = set(re.findall(r"(\w+)=~?", labels))
            assert asked <= emitted[name], f"{name}: {asked - emitted[name]}"
            seen += 1
        for group in re.findall(r"by \((\w+)\)", expression):
            names = re.findall(r"tokenry:\w+", expression)
            assert all(group in emitted[name] for name in names), expression
    assert seen > 30


def test_values_that_panels_pick_are_ones_that_are_emitted(toy):
    text = toy.http.get("/metrics").text
    for expression in expressions():
        for label, value in re.findall(r'(\w+)="([^"$]+)"', expression):
            assert f'{label}="{value}"' in text, expression


def test_panels_lie_beside_each_other_and_have_ids_of_their_own():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_the_example_config_is_one_that_serves():
    path = str(DEPLOY / "tokenry.yaml")
    server = load(ServerConfig, {}, file=path, environ={})
    engine = load(EngineConfig, {}, file=path, environ={})
    assert (server.log_format, server.restart_engine, engine.model) == ("json", 3, "demo")
