"""The tuner, with a timer that knows what each tile takes: nothing here is measured."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

import pytest
import torch
from triton.runtime.errors import OutOfResources
from triton_launches import long_decode

from tokenry.errors import ConfigError
from tokenry_triton import tune
from tokenry_triton.gpu import choice
from tokenry_triton.gpu.options import GpuOptions
from tokenry_triton.launch import ARCHS, Tile
from tokenry_triton.ops import triton_ops
from tokenry_triton.tune import Tuner

START = Tile(m=16, n=64, k=64, warps=4, stages=2)


class Times:
    """A timer: `of(tile)` milliseconds; a tile of which that is None does not fit."""

    def __init__(self, of):
        self.of = of
        self.tried = []

    def __call__(self, launch):
        self.tried.append(launch())
        return self.of(self.tried[-1])


def given(tile):
    """A launch that tells its tile."""
    return tile


def distance(best):
    """Times that grow with the distance from the best tile."""

    def of(tile):
        steps = abs(tile.n - best.n) / 16 + abs(tile.warps - best.warps)
        return 1 + steps + abs(tile.stages - best.stages) + abs(tile.m - best.m) / 16

    return of


@pytest.fixture
def tuner_of(tmp_path):
    """tuner_of(times): a tuner that keeps its file in a folder that is not there yet."""
    return lambda times, arch="sm_90": Tuner(arch, tmp_path / "tiles", times)


def warmed(tuner, shape="a", **kwargs):
    with tuner.warm_up():
        return tuner.pick("linear", shape, START, given, **kwargs)


def test_the_fastest_tile_is_found_kept_and_not_searched_again(tuner_of):
    best = Tile(m=32, n=32, k=64, warps=8, stages=3)
    first = tuner_of(Times(distance(best)))
    assert warmed(first) == best
    assert len(first._timer.tried) <= 10
    again = tuner_of(Times(distance(START)))
    assert again.pick("linear", "a", START, given) == best
    assert warmed(again) == best
    assert again._timer.tried == []


def test_in_service_nothing_is_measured(tuner_of):
    tuner = tuner_of(Times(distance(Tile(m=16, n=128, k=64, warps=1, stages=1))))
    warmed(tuner, "a")
    asked = len(tuner._timer.tried)
    assert tuner.pick("linear", "b", START, given) == START
    assert len(tuner._timer.tried) == asked
    assert tuner.measured == 1


def test_a_little_faster_is_noise(tuner_of):
    times = Times(lambda tile: 1.0 if tile == START else 0.99)
    assert warmed(tuner_of(times)) == START


def test_only_the_named_figures_change(tuner_of):
    tuner = tuner_of(Times(distance(Tile(m=128, n=16, k=64, warps=1, stages=4))))
    found = warmed(tuner, axes="nws")
    assert found.m == START.m
    assert found != START


def test_a_tile_that_the_device_has_no_room_for_is_passed_over(tuner_of):
    def of(tile):
        if tile.n > START.n:
            raise OutOfResources(300000, 232448, "shared memory")
        return float(200 - tile.n)

    found = warmed(tuner_of(Times(of)))
    assert found.n == START.n


def test_the_file_is_named_by_what_it_holds_for(tuner_of, monkeypatch):
    one = tuner_of(Times(distance(START)))
    other = tuner_of(Times(distance(START)), "gfx942")
    assert one.path.name.startswith("sm_90-3.")
    assert one.path != other.path
    monkeypatch.setattr(tune, "kernel_hash", lambda: "another")
    assert tuner_of(Times(distance(START))).path != one.path


def test_what_another_process_found_meanwhile_stays(tuner_of):
    times = Times(distance(START))
    one, other = tuner_of(times), tuner_of(times)
    warmed(one, "a")
    warmed(other, "b")
    found = json.loads(one.path.read_text())
    assert found == {"linear a": asdict(START), "linear b": asdict(START)}
    assert [p.name for p in one.path.parent.iterdir()] == [one.path.name]


BROKEN = [
    "", "{", "[1]", '{"linear a": 3}', '{"linear a": {"m": 16}}',
    '{"linear a": {"m": 16, "n": 1e9, "k": 64, "warps": 4, "stages": 2}}',
    '{"linear a": {"m": 16, "n": 64, "k": 64, "warps": -4, "stages": 2}}',
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_told_and_written_anew(tuner_of, caplog, text):
    path = tuner_of(Times(distance(START))).path
    path.parent.mkdir()
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        tuner = tuner_of(Times(distance(START)))
    assert f"{path} is not used" in caplog.text
    assert warmed(tuner) == START
    assert json.loads(path.read_text()) == {"linear a": asdict(START)}


def test_a_folder_that_cannot_be_written_is_told(tuner_of, caplog):
    tuner = tuner_of(Times(distance(START)))
    tuner.path.parent.write_text("a file, not a folder")
    with caplog.at_level(logging.WARNING):
        assert warmed(tuner) == START
    assert "cannot be written" in caplog.text
    assert tuner.pick("linear", "a", Tile(m=16, n=16), given) == START


def measured(call):
    call()
    return 1.0


def test_the_ops_ask_it_and_give_the_same_with_another_tile(tmp_path):
    narrow = Tile(m=16, n=32, k=64, warps=2, stages=1)

    class Always(Tuner):
        asked = ()

        def pick(self, kernel, shape, tile, launch, *, axes="nmws"):
            self.asked = (*self.asked, kernel)
            return narrow

    tuner = Always("sm_90", tmp_path, measured)
    tuned, plain = triton_ops("sm_90", tuner=tuner), triton_ops("sm_90")
    weight = torch.randn(48, 100, generator=torch.Generator().manual_seed(1))
    packed = tuned["linear"].quantize({"weight": weight}, "int8")
    x = weight[:5] + 1
    assert torch.allclose(tuned["linear"](x, packed), plain["linear"](x, packed), atol=1e-4)
    experts = {"w13": torch.randn(2, 32, 24), "w2": torch.randn(2, 24, 16)}
    rule = {"top_k": 1, "renormalize": True, "kind": "silu"}
    rows = [x[:, :24], x[:, :2], tuned["moe"].pack(experts)]
    assert torch.allclose(tuned["moe"](*rows, **rule), plain["moe"](*rows, **rule), atol=1e-3)
    launch = long_decode((40, 3))
    got, want = (ops["attention"](*launch, scale=0.3) for ops in (tuned, plain))
    assert torch.allclose(got, want, atol=1e-5)
    assert tuner.asked == ("linear", "moe up", "moe down", "decode")


def test_ops_of_a_warm_up_leave_their_shapes_in_the_file(tmp_path):
    tuner = Tuner("sm_90", tmp_path, measured)
    linear = triton_ops("sm_90", tuner=tuner)["linear"]
    packed = linear.quantize({"weight": torch.ones(32, 64)}, "int8")
    with tuner.warm_up():
        for rows in (1, 16, 17):
            linear(torch.ones(rows, 64), packed)
    sizes = {key: found["n"] for key, found in json.loads(tuner.path.read_text()).items()}
    small, large = ARCHS["sm_90"].small, ARCHS["sm_90"].large
    assert sizes == {
        "linear int8 16x32x64 torch.float32": small.n,
        "linear int8 32x32x64 torch.float32": min(64, large.n),
    }


def test_the_deterministic_mode_asks_nobody(tmp_path):
    tuner = Tuner("sm_90", tmp_path, measured)
    linear = triton_ops("sm_90", {"deterministic": "true"}, tuner)["linear"]
    with tuner.warm_up():
        linear(torch.ones(3, 64), linear.pack({"weight": torch.ones(8, 64)}))
    assert tuner.measured == 0


@pytest.mark.parametrize("wanted", [{"tune": "true"}, {"deterministic": "true"}], ids=str)
def test_what_needs_the_kernels_is_refused_where_they_are_missing(monkeypatch, wanted):
    monkeypatch.setattr(choice, "missing_kernels", lambda: "triton")
    gpu = choice.Gpu(backend="cuda", index=0, arch="sm_90", dtypes=("bfloat16",), fp8="none")
    with pytest.raises(ConfigError, match=r"no Triton kernels here .triton is missing") as told:
        choice.pick_ops(gpu, GpuOptions(**wanted))
    assert told.value.mend == f"pip install triton, or leave out {next(iter(wanted))}=true"
