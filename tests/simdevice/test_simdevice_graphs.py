"""Graphs and recipes: replay on the recorded memory, what a capture refuses, what counts as new."""

from __future__ import annotations

import pytest
from simdevice import run_on_device

REFUSAL = """
import gc
import torch
import simdevice

device, found = simdevice.current(), {}


def refusal(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None
"""
GRAPH = (
    REFUSAL
    + """
from simdevice.graph import Graph

name = device.name
weight = torch.eye(3, device=name) * 2
x = torch.ones(2, 3, device=name)
cache = torch.zeros(4, 3, device=name)
slots = torch.tensor([0, 2]).to(name)
count = [1]
graph = Graph()
with graph.capture():
    scratch = torch.empty(2, 3, device=name)
    scratch.copy_(x)
    cache.index_copy_(0, slots, scratch)
    y = scratch @ weight + count[0]
found["captured"] = y.cpu().tolist()
x.fill_(3)
slots.copy_(torch.tensor([1, 3]))
cache.zero_()
count[0] = 100
device.reset_counts()
with device.no_host_sync():
    graph.replay()
found["replayed"] = y.cpu().tolist()
found["cache"] = cache.cpu()[:, 0].tolist()
counts = device.counts()
found["counts"] = [counts.replays, counts.loose_kernels, counts.captures]
other = torch.full((2, 3), 5.0, device=name)
graph.replay([(x, other)])
found["instead"] = [y.cpu()[0, 0].item(), x.cpu()[0, 0].item()]

unwritten = Graph()
with unwritten.capture():
    fresh = torch.empty(2, device=name)
    seen = fresh + 1
fresh.zero_()
unwritten.replay()
found["fresh_again"] = bool(seen.cpu().isnan().all())

host = torch.zeros(3)
captures = {
    "item": lambda: x.sum().item(),
    "nonzero": lambda: x.nonzero(),
    "mask": lambda: x[x > 0],
    "to_host": lambda: x.cpu(),
    "from_host": lambda: torch.tensor([1.0]).to(name),
    "python": lambda: torch.tensor([1.0], device=name),
    "resize": lambda: x.new_empty(0).resize_(3),
}
found["refused"] = {}
for key, call in captures.items():
    broken = Graph()
    def capture():
        with broken.capture():
            call()
    found["refused"][key] = refusal(capture)
    found["refused"][key + " replay"] = refusal(broken.replay)
found["usable"] = (x + 1).sum().item()

del y, scratch, seen, fresh
graph.reset()
gc.collect()
before = device.memory().allocated_bytes
with graph.capture():
    big = torch.zeros(1000, device=name) + 1
del big
gc.collect()
found["graph_memory"] = device.memory().allocated_bytes - before
graph.reset()
found["after_reset"] = device.memory().allocated_bytes <= before
device.strict()
found["strict"] = refusal(lambda: graph.begin())
device.relax()
found["nested"] = None
with graph.capture():
    found["nested"] = refusal(Graph().begin)
simdevice.report(found)
"""
)
HPU = (
    REFUSAL
    + """
import habana_frameworks.torch as ht
from habana_frameworks.torch.hpu.metrics import metric_localcontext


class Step(torch.nn.Module):
    def __init__(self, bug=None):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8, device="hpu")
        torch.nn.init.eye_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        self.bug, self.calls = bug, 0

    def forward(self, x, cache, slots, scale=1.0):
        self.calls += 1
        h = self.linear(x) * scale
        if self.bug == "view":
            cache.view(4, 4, 8).view(16, 8).index_copy_(0, slots, h)
        else:
            cache.index_copy_(0, slots, h)
        if self.bug == "state":
            h = h + self.calls
        return h.sum(-1) + cache.sum()


def run(step, steps=4, scale=lambda t: 1.0, rows=lambda t: 2):
    cache, outs = torch.zeros(16, 8, device="hpu"), []
    for t in range(steps):
        n = rows(t)
        x = torch.full((n, 8), float(t), device="cpu").to("hpu")
        slots = torch.arange(n * t, n * t + n).to("hpu")
        with torch.no_grad():
            outs.append(step(x, cache, slots, scale(t)).cpu().tolist())
    return outs, cache.cpu().sum().item()


def wrapped(bug=None, **options):
    return ht.hpu.wrap_in_hpu_graph(Step(bug), disable_tensor_cache=True, **options)


found["eager"] = run(Step())
device.reset_counts()
found["graphs"] = run(wrapped())
counts = device.counts()
found["one_signature"] = [counts.captures, counts.replays]
device.reset_counts()
run(wrapped(), rows=lambda t: 1 + t % 2)
found["two_signatures"] = device.counts().captures
device.reset_counts()
run(wrapped(), scale=lambda t: float(t))
found["a_scalar_each"] = device.counts().captures
device.reset_counts()
run(wrapped(max_graphs=1), scale=lambda t: float(t))
found["max_graphs"] = device.counts().captures
step = wrapped()
device.reset_counts()
with torch.no_grad():
    step(torch.ones(2, 8, device="hpu"), torch.zeros(16, 8, device="hpu"),
         torch.arange(2).to("hpu"), bypass_hpu_graphs=True)
found["bypassed"] = device.counts().captures
found["view"] = refusal(lambda: run(wrapped("view")))
found["state"] = [run(Step("state"))[0][3], run(wrapped("state"))[0][3]]

first = wrapped()
x = torch.full((2, 8), 1.0, device="hpu")
cache, slots = torch.zeros(16, 8, device="hpu"), torch.arange(2).to("hpu")
part = torch.zeros(8, 8, device="hpu")[2:4].fill_(7.0)
with torch.no_grad():
    first(x, cache, slots)
    first(torch.full((2, 8), 2.0, device="hpu"), cache, slots)
    out = first(part, cache, slots)
found["users_input_untouched"] = x.cpu()[0, 0].item()
found["part_of_a_storage"] = out.cpu()[0].item()

# recipes of lazy mode
def work(n):
    y = torch.ones(n, 4, device="hpu") * 2
    ht.core.mark_step()
    return y

ht.core.mark_step()
device.reset_counts()
with metric_localcontext("graph_compilation") as compiled:
    work(3), work(3), work(5)
found["recipes"] = [device.counts().recipes, compiled.stats()[0][1]]
device.strict()
found["known"] = refusal(lambda: work(5))
found["new"] = refusal(lambda: work(6))
found["new_by_item"] = refusal(lambda: (torch.ones(9, device="hpu") * 3).sum().item())
found["new_capture"] = refusal(lambda: run(wrapped()))
device.relax()
found["relaxed"] = refusal(lambda: work(7))
simdevice.report(found)
"""
)


@pytest.fixture(scope="module")
def graph():
    """What the script saw of graphs on a device of any name."""
    return run_on_device("acme", GRAPH, memory=1 << 26).value


@pytest.fixture(scope="module")
def hpu():
    """What the script saw of HPU graphs and recipes in lazy mode."""
    return run_on_device("hpu", HPU, memory=1 << 26, env={"PT_HPU_LAZY_MODE": "1"}).value


def test_replay_reads_and_writes_the_recorded_memory_and_keeps_scalars(graph):
    assert graph["captured"] == [[3.0] * 3] * 2
    assert graph["replayed"] == [[7.0] * 3] * 2  # 3 * 2 + the 1 of the capture, not 100
    assert graph["cache"] == [0.0, 3.0, 0.0, 3.0]
    assert graph["counts"] == [1, 0, 0]


def test_replay_on_other_memory_leaves_the_recorded_alone(graph):
    assert graph["instead"] == [11.0, 3.0]


def test_memory_that_was_fresh_in_the_capture_is_poison_in_the_replay(graph):
    assert graph["fresh_again"] is True


@pytest.mark.parametrize(
    "key", ["item", "nonzero", "mask", "to_host", "from_host", "python", "resize"]
)
def test_a_capture_refuses_what_depends_on_the_host(graph, key):
    kind, text = graph["refused"][key]
    assert kind == "NotCapturable"
    assert "inside a graph capture" in text
    assert "was never captured" in graph["refused"][f"{key} replay"][1]
    assert graph["usable"] == 24.0


def test_a_graph_owns_its_intermediates_until_it_is_reset(graph):
    assert graph["graph_memory"] == 8000
    assert graph["after_reset"] is True


def test_captures_are_refused_when_strict_or_nested(graph):
    assert graph["strict"][0] == "NewProgram"
    assert "already open in this thread" in graph["nested"][1]


def test_wrapped_module_replays_with_the_callers_memory(hpu):
    assert hpu["graphs"] == hpu["eager"]
    assert hpu["one_signature"] == [1, 3]
    assert hpu["users_input_untouched"] == 1.0
    assert hpu["part_of_a_storage"] == 7 * 8 + 2 * 7 * 8


def test_shapes_and_scalars_are_part_of_the_signature(hpu):
    assert hpu["two_signatures"] == 2
    assert hpu["a_scalar_each"] == 4
    assert hpu["max_graphs"] == 1
    assert hpu["bypassed"] == 0


def test_a_graph_bakes_python_state_and_refuses_writes_through_views(hpu):
    eager, replayed = hpu["state"]
    assert eager != replayed
    assert hpu["view"][0] == "NotCapturable"
    assert "writes through a view" in hpu["view"][1]


def test_recipes_are_counted_and_new_ones_refused_when_strict(hpu):
    assert hpu["recipes"] == [2, 2]
    assert hpu["known"] is None
    assert hpu["new"][0] == "NewProgram"
    assert "after strict() was called (at mark_step)" in hpu["new"][1]
    assert "[simdevice:new-program]" in hpu["new_by_item"][1]
    assert hpu["new_capture"][0] == "NewProgram"
    assert hpu["relaxed"] is None


def test_hpu_graphs_need_lazy_mode():
    run = run_on_device(
        "hpu", "import torch; torch.hpu.HPUGraph()", check=False, env={"PT_HPU_LAZY_MODE": "0"}
    )
    assert "VendorRefuses: HPU graphs need lazy mode" in run.stderr
