"""The kit itself: what is asked, the tolerances, the reports, the command, the pytest form."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tokenry.backend.contract import Caps, ShapeRules
from tokenry.cli import main
from tokenry.conformance.catalog import CHECKS, page
from tokenry.conformance.check import Case, attempt, check, pick, run_check
from tokenry.conformance.cli import conform
from tokenry.conformance.compare import TOLERANCES, difference, same_bits
from tokenry.conformance.scenes import Scene, Work
from tokenry.conformance.tiny import FAMILIES, write_model
from tokenry.errors import NoBackend


def asked(caps):
    """Ids that are asked of a device with these Caps."""
    return {one.id for one in CHECKS if one.asked(caps) is None}


@pytest.mark.parametrize(
    ("claims", "brings"),
    [
        ({"batch_invariant": True}, {"C07.attention", "C07.ops", "C07.step"}),
        ({"graphs": "capture"}, {"C08.replay", "C09.scalars", "C15.sync"}),
        ({"kv_baked": True}, {"C14.plan"}),
        ({"dist": "gloo"}, {"C18.collectives"}),
        ({"input_device": "meta"}, {"C15.sync"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_claim_brings_its_checks(claims, brings):
    assert asked(Caps(**claims)) - asked(Caps()) == brings


def test_what_a_device_does_not_do_is_not_asked():
    assert asked(Caps()) - asked(Caps(token_feedback=False)) == {"C16.feedback"}
    samples = {"C03.sample_greedy", "C03.sample", "C07.sample"}
    assert asked(Caps()) - asked(Caps(sampling="tokens")) == samples


@pytest.mark.parametrize("static", [False, True])
def test_an_example_has_no_row_beyond_its_table(static):
    scene = Scene(Caps(shapes=ShapeRules(static=static)), [range(5)] * 6, block_size=4)
    for packed in scene.covering([Work(0, 0, 5)]):
        blank = scene.blank(packed)
        assert blank.bucket == packed.host.bucket
        assert blank.seq_lens.max() <= blank.block_table.shape[1] * 4


def test_ids_are_unique_and_every_check_says_how_it_is_proved():
    ids = [one.id for one in CHECKS]
    assert len(set(ids)) == len(ids)
    assert all(one.rule.endswith(".") and len(one.proof) > 40 for one in CHECKS)


def test_checks_are_picked_by_id_or_by_its_beginning():
    assert [c.id for c in pick(CHECKS, ["c12"])] == ["C12.facts", "C12.kv", "C12.plan"]
    assert [c.id for c in pick(CHECKS, ["C12.kv"])] == ["C12.kv"]
    assert len(pick(CHECKS, [])) == len(CHECKS)
    with pytest.raises(KeyError):
        pick(CHECKS, ["C1"])


class FakeKit:
    """All that run_check itself looks at."""

    caps = Caps()


@pytest.mark.parametrize(
    ("must", "status"), [(True, "failed"), (False, "weak")], ids=["must", "should"]
)
def test_a_check_tells_each_failed_case_and_goes_on_to_five(must, status):
    @check("X", "Nothing holds.", must=must)
    def broken(kit):
        """Tries."""
        for i in range(20):
            yield attempt(f"case {i}", lambda: 1 // 0)

    result = run_check(broken, FakeKit())
    assert (result.status, result.cases) == (status, 5)
    assert result.failures[0].startswith("case 0: raised ZeroDivisionError: ")


def test_a_check_that_breaks_off_is_a_failure_not_a_pass():
    @check("X", "A rule.")
    def broken(kit):
        """Tries."""
        yield Case("fine")
        raise OSError("gone")

    result = run_check(broken, FakeKit())
    assert (result.status, result.failures) == ("failed", ("after 1 cases: raised OSError: gone",))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_is_no_difference_and_a_small_bias_is(dtype):
    rng = np.random.default_rng(0)
    want = rng.uniform(-1, 1, (50, 40))
    unit = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert difference(want * (1 + rng.uniform(-unit, unit, want.shape)), want, dtype) is None
    bias = 1.2 * TOLERANCES[dtype].nmse ** 0.5  # element by element it would pass
    assert "0 of 2000 beyond; NMSE" in difference(want * (1 + bias), want, dtype)
    assert "shape [50, 39]" in difference(want[:, :39], want, dtype)
    broken = want.copy()
    broken[3, 7] = np.nan
    assert difference(broken, want, dtype) == "1 of 2000 values are not finite, the first at (3, 7)"


def test_one_wrong_element_is_told_with_its_place_and_the_tolerance():
    want = np.ones((4, 4))
    got = want.copy()
    got[2, 1] = 1.5
    text = difference(got, want, "float32")
    assert "error 0.5 at (2, 1) (got 1.5, expected 1), allowed 0.0004; 1 of 16 beyond" in text


def test_bits_are_told_by_count_and_place():
    want = np.arange(6.0)
    assert same_bits(want.copy(), want) is None
    assert same_bits(want + 1e-9 * (want == 2), want).startswith("1 of 6 values differ")


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_have_an_opinion(tmp_path, family):
    """Their best token stands out: or the end-to-end check would prove nothing."""
    model = write_model(tmp_path / family, FAMILIES[family])
    tokens = np.random.default_rng(1).integers(2, 96, 50).tolist()
    ranked = np.sort(model.logits(tokens), axis=-1)
    assert np.median(ranked[:, -1] - ranked[:, -2]) > 0.5
    assert len(set(model.greedy(tokens[:9], 12))) > 2


def test_a_report_is_a_table_json_and_a_page(tmp_path, capsys):
    json_file, html_file = tmp_path / "report.json", tmp_path / "report.html"
    argv = ["conform", "sim-hpu", "--only", "C23", "C14", "--backend-option", "memory=4000000"]
    assert main([*argv, "--json", str(json_file), "--html", str(html_file)]) == 0
    out = capsys.readouterr().out
    assert "sim-hpu on simulator, tested with contract 1." in out
    assert "ok      C23.caps" in out
    assert "C14.plan           Caps.kv_baked is not set" in out
    assert "sim-hpu conforms: 2 passed, 1 not asked" in out
    report = json.loads(json_file.read_text())
    assert report["conforms"] is True and report["contract"] == report["backend_contract"]
    assert report["caps"]["shapes"]["kv_axis"] == "total"
    assert report["options"] == {"memory": "4000000"}
    assert [r["status"] for r in report["results"]] == ["passed", "passed", "not asked"]
    assert "<td>C23.caps</td>" in html_file.read_text()


def test_a_broken_backend_is_told_and_exits_with_1(installed, capsys):
    assert main(["conform", "wrong-heads", "--only", "C03.attention"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  C03.attention" in out and "Attention is causal over each request" in out
    assert "attention float32 H=4 KH=2 D=32 block=16 cached+new: 1+1 15+1" in out
    assert "wrong-heads does not conform: 1 failed (5 cases)" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sim-hpu", "--only", "C99"], "There is no check 'C99'"),
        (["sim-hpu", "--backend-option", "memory"], "not key=value"),
        (["no-such-backend"], "There is no backend 'no-such-backend'"),
    ],
    ids=["check", "option", "backend"],
)
def test_a_wrong_call_is_one_error(argv, words, capsys):
    assert main(["conform", *argv]) == 2
    assert words in capsys.readouterr().err


PLUGIN_TESTS = """
from tokenry.conformance import conformance_tests

test_conformance = conformance_tests("sim-opaque")
"""


def test_three_lines_test_a_plugin(tmp_path):
    (tmp_path / "test_plugin.py").write_text(PLUGIN_TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "C23 or C08",
         str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed, 1 skipped" in done.stdout
    assert "Caps.graphs is none" in done.stdout


def test_the_page_lists_every_check():
    text = page()
    assert all(f"| `{one.id}` | {one.rule}" in text for one in CHECKS)


def test_a_backend_that_is_not_here_is_not_asked():
    with pytest.raises(NoBackend):
        conform("no-such-backend")
