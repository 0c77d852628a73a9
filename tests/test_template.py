"""The template of a third party's backend, as its vendor's user gets it: from wheels, in a clean
environment outside this checkout, on a device whose name no file of the core knows.
"""

import importlib.metadata
import json
import re
import shutil
import venv
from pathlib import Path

import pytest
import wheelhouse
from simdevice import environment
from simdevice.build import library
from wheelhouse import DEMO, ROOT, TEMPLATE, link_dependencies, pip, run

from tokenry import LLM, SamplingParams

pytestmark = pytest.mark.slow
PROMPTS = ["Once upon a time", "The king said", "In the forest there lived"]
CONFIG = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8}
MOST_LINES = 150
GREEDY = """
import json, sys
from tokenry import LLM, SamplingParams
given = json.loads(sys.argv[1])
with LLM("demo", backend="acme", **given["config"]) as llm:
    outs = llm.generate(given["prompts"], SamplingParams(temperature=0, max_tokens=32))
    print(json.dumps([list(out.outputs[0].token_ids) for out in outs]))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels of the core, the demo model and the template."""
    return wheelhouse.wheels(tmp_path_factory, ROOT, DEMO, TEMPLATE)


@pytest.fixture(scope="module")
def device(tmp_path_factory, wheels):
    """device(command, *arguments): a command of the clean venv, run where the device is."""
    library()
    home = tmp_path_factory.mktemp("home")
    venv.create(home / "venv")
    bin_ = home / "venv" / "bin"
    site = Path(run(bin_ / "python", "-c", "import site; print(site.getsitepackages()[0])").strip())
    (site / "dependencies.pth").write_text(f"{link_dependencies(home / 'dependencies')}\n")
    # no index: what the wheels require has to be among the dependencies already
    target = ("--python", bin_ / "python")
    pip(*target, "install", "-q", "--no-index", "-f", wheels, "tokenry-acme[test]", "tokenry[demo]")
    shutil.copytree(TEMPLATE / "tests", home / "tests")
    (home / "dev").mkdir()
    (home / "dev" / "acme0").touch()
    own = {"PYTHONPATH": "", "ACME_DEV": str(home / "dev"), "HF_HUB_OFFLINE": "1"}
    variables = environment("acme", env=own)

    def call(command, *arguments, **more):
        return run(bin_ / command, *arguments, env=variables | more, cwd=home)

    return call


def test_the_template_is_short_and_its_name_is_unknown_to_the_core():
    files = sorted((TEMPLATE / "tokenry_acme").glob("*.py"))
    lines = {file.name: len(file.read_text().splitlines()) for file in files}
    assert sum(lines.values()) < MOST_LINES, lines
    readme = (TEMPLATE / "README.md").read_text()
    for name, count in lines.items():
        assert re.search(rf"`tokenry_acme/{name}`.*\| {count} \|", readme), (name, count)
    assert len((TEMPLATE / "tests" / "test_conformance.py").read_text().splitlines()) == 3
    known = [f for f in (ROOT / "core").rglob("*.py") if "acme" in f.read_text().lower()]
    assert known == []
    assert "tokenry-acme" not in {d.name for d in importlib.metadata.distributions()}


def test_the_device_is_listed_where_it_is_and_only_there(device):
    assert re.search(r"acme +0\.1\.0 +score 50: Acme A1", device("tokenry", "devices"))
    listed = device("tokenry", "devices", ACME_DEV="/nowhere")
    assert re.search(r"acme +0\.1\.0 +no: its device is not here", listed)
    where = device("python", "-c", "import tokenry, tokenry_acme as a; print(tokenry, a)")
    assert str(ROOT) not in where


def test_the_template_conforms(device, tmp_path):
    report = tmp_path / "report.json"
    table = device("tokenry", "conform", "acme", "--steps", "40", "--json", report)
    results = {r["id"]: r["status"] for r in json.loads(report.read_text())["results"]}
    assert "acme conforms" in table
    assert not set(results.values()) - {"passed", "not asked"}
    unasked = {name for name, status in results.items() if status == "not asked"}
    assert unasked == {
        "C07.attention", "C07.ops", "C07.step", "C14.plan", "C18.collectives",
    }  # fmt: skip


def test_its_own_test_file_runs(device):
    told = device("python", "-m", "pytest", "tests", "-k", "C01 or C08 or C12 or C13")
    assert re.search(r"\b8 passed", told), told


def test_greedy_tokens_are_the_cpu_backends(device):
    with LLM("demo", backend="cpu", progress=False, **CONFIG) as llm:
        outs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32))
        expected = [list(out.outputs[0].token_ids) for out in outs]
        text = outs[0].outputs[0].text
    given = json.dumps({"config": CONFIG, "prompts": PROMPTS})
    assert json.loads(device("python", "-c", GREEDY, given)) == expected
    written = device(
        "tokenry", "generate", "demo", PROMPTS[0], "--backend", "acme", "--dtype", "float32",
        "--temperature", "0", "--max-tokens", "32", "--max-model-len", "128",
    )  # fmt: skip
    assert text in written
