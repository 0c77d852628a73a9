"""`tokenry keys`: the text of a key is shown once, the file has its hash."""

import pytest

from tokenry.api.keys import KeyRing, read_keys
from tokenry.cli import main


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def test_added_key_is_let_in_with_its_limits_and_removed_it_is_not(path, capsys):
    limits = ["--requests-per-minute", "60", "--ttft-ms", "250", "--admin"]
    assert main(["keys", "add", "ann", "--file", str(path), *limits]) == 0
    text = capsys.readouterr().out.strip()
    assert text not in path.read_text()
    found = KeyRing(file=str(path)).find(text)
    assert (found.name, found.requests_per_minute, found.ttft_ms, found.admin) == (
        "ann", 60, 250.0, True,
    )  # fmt: skip
    assert main(["keys", "list", "--file", str(path)]) == 0
    listed = capsys.readouterr().out
    assert "ann" in listed
    assert "requests_per_minute=60" in listed
    assert text not in listed
    assert main(["keys", "remove", "ann", "--file", str(path)]) == 0
    assert read_keys(path).keys == ()
    assert KeyRing(file=str(path)).find(text) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "--file", "/nowhere/keys"], "There is no key file"),
        (["list"], "No key file is named"),
        (["add", "bea", "--tokens-per-minute", "0"], "above 0"),
        (["add", "ann"], "already"),
        (["remove", "cyd"], "it has: ann"),
    ],
    ids=["absent", "unnamed", "limit", "twice", "unknown"],
)
def test_wrong_calls_are_told_with_exit_code_2(path, capsys, arguments, words):
    main(["keys", "add", "ann", "--file", str(path)])
    before = path.read_bytes()
    if arguments != ["list"] and "--file" not in arguments:
        arguments = [*arguments, "--file", str(path)]
    capsys.readouterr()
    assert main(["keys", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert path.read_bytes() == before
