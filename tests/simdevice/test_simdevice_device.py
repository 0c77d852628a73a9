"""The device itself, under each of its names: memory, poison, refusals, counts, order, numbers."""

from __future__ import annotations

import pytest
from simdevice import run_on_device

NAMES = ["hpu", "neuron", "cuda", "acme"]
SCRIPT = """
import gc
import torch
from torch.nn import functional as F

import simdevice

device, found = simdevice.current(), {}
name = device.name


def refusal(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


# memory
start = device.memory().allocated_bytes
x = torch.empty(1000, dtype=torch.float32, device=name)
found["allocated"] = device.memory().allocated_bytes - start
view = x[10:20]
del x
gc.collect()
found["kept_by_a_view"] = device.memory().allocated_bytes - start
del view
found["freed"] = device.memory().allocated_bytes - start
found["peak"] = device.memory().peak_bytes - start
device.set_memory_limit(start + 5000)
found["oom"] = refusal(lambda: torch.zeros(5001, dtype=torch.uint8, device=name))
found["after_oom"] = torch.ones(5, device=name).cpu().tolist()
device.set_memory_limit(1 << 28)
info = torch.get_device_module(name).mem_get_info()
found["mem_get_info"] = [info[0] == device.memory().free_bytes, info[1]]

# fresh memory
found["poison"] = [
    bool(torch.empty(3, dtype=dtype, device=name).cpu().float().isnan().all())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
]
found["poison_int"] = torch.empty(2, dtype=torch.int32, device=name).cpu().tolist()

# refusals
a = torch.randn(4, 8).to(name)
found["devices"] = [refusal(lambda: a @ torch.ones(8, 2)), refusal(lambda: a[torch.tensor([0])])]
found["dtypes"] = [
    refusal(lambda: a + a.bfloat16()),
    refusal(lambda: a.bfloat16().mul_(a)),
    refusal(lambda: F.linear(a, a.half())),
]
found["allowed"] = [
    refusal(lambda: a * 2.0),
    refusal(lambda: a + torch.tensor(2.0, dtype=torch.float64)),
    refusal(lambda: a.bfloat16().copy_(a)),
    refusal(lambda: torch.where(a > 0, a, 0.0)),
]
found["ordinal"] = refusal(lambda: torch.empty(1, device=f"{name}:1"))

# counts
device.reset_counts()
a.sum().item()
bool((a > 0).any())
a.cpu()
(a > 0).nonzero()
a[a > 0]
a[a > 0] = 0.0
torch.ones(2).to(name)
counts = device.counts()
found["waited_uploads"] = counts.waited_copies_to_device
found["counts"] = [
    counts.scalar_reads, counts.copies_to_host, counts.shape_reads, counts.copies_to_device,
    counts.host_syncs,
]
found["kernel"] = device.kernel_counts().get("aten::sum.IntList_out")
found["forbidden"] = []
for call in (lambda: a.sum().item(), lambda: a.cpu(), lambda: (a > 0).nonzero(), lambda: a + 1):
    def guarded():
        with device.no_host_sync():
            call()
    found["forbidden"].append(refusal(guarded))
found["again_allowed"] = refusal(lambda: a.sum().item())
device.reset_counts()
torch.zeros(4, device=name).view(2, 2)[0].fill_(1)
found["view_writes"] = device.counts().view_writes
device.reset_counts()
a.view(8, 4)[1:3].t().unsqueeze(0).expand(5, 4, 2)
found["views"] = device.counts().kernels

# order: an asynchronous copy is there when an event after it is
b = torch.arange(4.0, device=name)
first = b.to("cpu", non_blocking=True)
found["early"] = bool(first.isnan().all())
event = torch.Event(device=name)
event.record()
second = b.to("cpu", non_blocking=True)
b.zero_()
event.synchronize()
found["reached"] = [first.tolist(), bool(second.isnan().all())]
torch.get_device_module(name).synchronize()
found["synchronized"] = second.tolist()
found["async"] = [device.counts().async_copies_to_host, device.counts().copies_to_host]

# numbers
generator = torch.Generator().manual_seed(0)
c = torch.randn(2, 6, 8, generator=generator)
ids = torch.randint(0, 6, (5,), generator=generator)
mask = torch.rand(2, 6, 8, generator=generator) > 0.5
calls = {
    "matmul": lambda c, ids, mask: c @ c.mT,
    "linear": lambda c, ids, mask: F.linear(c, c[0], c[0, :, 0]),
    "softmax": lambda c, ids, mask: c.softmax(-1),
    "reduce": lambda c, ids, mask: torch.stack([c.sum(-1), c.amax(-1), c.var(-1), c.logsumexp(-1)]),
    "norm": lambda c, ids, mask: F.rms_norm(c, (8,)) + F.layer_norm(c, (8,)),
    "silu": lambda c, ids, mask: F.silu(c) * F.gelu(c),
    "index": lambda c, ids, mask: c[:, ids] + c.index_select(1, ids),
    "mask": lambda c, ids, mask: c.masked_fill(mask, 0).where(~mask, -c),
    "put": lambda c, ids, mask: c.clone().index_copy_(1, ids[:1], c[:, :1]),
    "scatter": lambda c, ids, mask: torch.zeros_like(c).scatter_(1, ids[None, :, None], c[:, :5]),
    "sort": lambda c, ids, mask: c.sort(-1).values + c.topk(3, -1).values.sum(-1, True),
    "cumsum": lambda c, ids, mask: c.cumsum(1),
    "views": lambda c, ids, mask: c.transpose(0, 1)[1:4, :, ::2].reshape(3, -1).unfold(1, 2, 3),
    "cat": lambda c, ids, mask: torch.cat([c.chunk(2, -1)[0], c.expand(2, 6, 8)[..., 1:]], -1),
    "attention": lambda c, ids, mask: F.scaled_dot_product_attention(c, c, c, is_causal=True),
    "one_hot": lambda c, ids, mask: F.one_hot(ids, 6).float() @ c[0],
    "cast": lambda c, ids, mask: c.bfloat16().float() + c.to(torch.float8_e4m3fn).float(),
    "outer": lambda c, ids, mask: torch.einsum("abc,dbc->ad", c, c),
    "embedding": lambda c, ids, mask: F.embedding(ids, c[0]),
    "out": lambda c, ids, mask: torch.add(c, c, out=torch.empty(0, device=c.device)),
    "inplace": lambda c, ids, mask: c.clone().add_(1).mul_(2).clamp_(-1, 1),
    "mixed_int": lambda c, ids, mask: ids.int() + ids,
}
moved = [t.to(name) for t in (c, ids, mask)]
found["different"] = [
    key for key, call in calls.items()
    if not torch.allclose(call(c, ids, mask), call(*moved).cpu(), rtol=0, atol=1e-6)
    or call(*moved).device.type != name
]
linear = torch.nn.Linear(8, 3)
on_device = torch.nn.Linear(8, 3, device=name)
on_device.load_state_dict(linear.state_dict())
found["module"] = torch.equal(on_device(moved[0]).cpu(), linear(c))
drawn = [torch.rand(3, device=name, generator=torch.Generator(name).manual_seed(7)).tolist()
         for _ in range(2)]
found["generator"] = [drawn[0] == drawn[1], torch.Generator(name).device.type]
found["pinned"] = torch.ones(2).pin_memory().is_pinned()
found["accelerator"] = torch.accelerator.current_accelerator().type
base = torch.zeros(2, 3, device=name)
base.view(3, 2).t()[1].fill_(5)
found["aliased"] = base.flatten().cpu().tolist()
simdevice.report(found)
"""


@pytest.fixture(scope="module", params=NAMES)
def found(request):
    """(name, what the script saw on the device of that name)."""
    return request.param, run_on_device(request.param, SCRIPT, memory=1 << 28).value


def test_memory_is_counted_by_live_storages(found):
    _, got = found
    assert (got["allocated"], got["kept_by_a_view"], got["freed"]) == (4000, 4000, 0)
    assert got["peak"] >= 4000
    assert got["mem_get_info"] == [True, 1 << 28]


def test_over_the_limit_is_a_typed_error_and_the_device_lives_on(found):
    name, got = found
    kind, text = got["oom"]
    assert kind == "OutOfMemoryError"
    assert text.startswith(f"{name} out of memory: tried to allocate 5001 bytes")
    assert got["after_oom"] == [1.0] * 5


def test_fresh_memory_is_poisoned(found):
    _, got = found
    assert got["poison"] == [True] * 4
    assert got["poison_int"] == [-1, -1]


def test_operands_of_two_devices_or_floating_dtypes_are_refused(found):
    name, got = found
    for kind, text in got["devices"]:
        assert kind == "RuntimeError"
        assert f"expected all tensors to be on the same device, {name}:0" in text
    assert "two floating dtypes, Float [4, 8]" in got["dtypes"][0][1]
    assert [kind for kind, _ in got["dtypes"]] == ["RuntimeError"] * 3
    assert got["allowed"] == [None] * 4
    assert "invalid device ordinal 1" in got["ordinal"][1]


def test_what_the_host_waits_for_is_counted(found):
    name, got = found
    scalars, to_host, shapes, to_device, all_syncs = got["counts"]
    assert (scalars, to_host, shapes, to_device) == (2, 1, 2, 1)
    assert got["waited_uploads"] == (1 if name == "cuda" else 0)  # from memory that is not pinned
    assert all_syncs == 5 + got["waited_uploads"]
    assert got["kernel"] == 1
    assert got["view_writes"] == 1
    assert got["views"] == 0


def test_a_guarded_region_refuses_host_syncs_only(found):
    name, got = found
    assert [refused and refused[0] for refused in got["forbidden"]] == ["HostSync"] * 3 + [None]
    assert f"where the host must not wait for {name}" in got["forbidden"][0][1]
    assert got["again_allowed"] is None


def test_an_asynchronous_copy_is_poison_until_something_synchronizes(found):
    _, got = found
    assert got["early"] is True
    assert got["reached"] == [[0.0, 1.0, 2.0, 3.0], True]
    assert got["synchronized"] == [0.0, 1.0, 2.0, 3.0]
    assert got["async"][0] == 2


def test_operators_give_the_numbers_of_the_cpu(found):
    _, got = found
    assert got["different"] == []
    assert got["module"] is True
    assert got["aliased"] == [0.0, 5.0, 0.0, 5.0, 0.0, 5.0]


def test_torch_finds_an_accelerator(found):
    name, got = found
    assert got["accelerator"] == name
    assert got["generator"] == [True, name]
    assert got["pinned"] is True
