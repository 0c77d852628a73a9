"""Models are found where the user means them, and a wrong name gets a way out."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tokenry.errors import ModelLoadError
from tokenry.hub import find_model, model_names


def test_directory(tmp_path):
    assert find_model(str(tmp_path)) == tmp_path


def test_name_of_an_installed_package():
    assert (find_model("demo") / "config.json").is_file()
    assert {"demo", "demo-draft"} <= set(model_names())


def test_directory_that_only_shares_the_name_is_not_meant(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("demo").is_absolute()
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert find_model("demo") == Path("demo")


def test_model_of_an_extra_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # nobody is asked
    (tmp_path / "demo").mkdir()
    for directory in (tmp_path, tmp_path / "demo"):
        monkeypatch.chdir(directory)
        with pytest.raises(ModelLoadError, match="'demo' is not installed") as caught:
            find_model("demo")
        assert caught.value.mend == 'pip install "tokenry[demo]"'
    assert find_model("./../demo").is_dir()


@pytest.mark.parametrize("name", ["./tales_4n", "no/such/dir", "a b", "/nowhere/at/all"])
def test_missing_directory(name, tmp_path, monkeypatch):
    (tmp_path / "tales_4m").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="There is no directory") as caught:
        find_model(name)
    assert ("did you mean 'tales_4m'" in str(caught.value)) == (name == "./tales_4n")


def test_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("")
    with pytest.raises(ModelLoadError, match="is a file"):
        find_model(str(file))


def test_hub_model_that_cannot_be_reached(monkeypatch):
    def offline(*args, **options):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE") as caught:
        find_model("demoo")
    assert "did you mean 'demo'" in (caught.value.mend or "")


def test_hub_download_takes_no_more_than_is_needed(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("owner/name", revision="v1") == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "v1")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_broken_package_is_named(monkeypatch):
    entry = importlib.metadata.EntryPoint("broken", "no_such_module:model", "tokenry.models")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    with pytest.raises(ModelLoadError, match="no_such_module"):
        find_model("broken")


def test_text_and_hub_import_no_torch():
    code = (
        "import sys, tokenry.hub, tokenry.llm, tokenry.text.outputs as o; "
        "from tokenry.text.tokenizer import Tokenizer; "
        "Tokenizer.load(tokenry.hub.find_model('demo')); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
