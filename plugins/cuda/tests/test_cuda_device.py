"""The open device, simulated: memory and its plan, programs, errors in the core's words, FP8."""

from __future__ import annotations

import json

import pytest
import torch
from simdevice import run_on_device

from tokenry.errors import DeviceLost, DeviceOOM
from tokenry_triton.gpu.memory import STICKY, typed_errors
from tokenry_triton.gpu.ops import Linear, to_fnuz

BEGIN = """
import json, sys
import simdevice
import torch
from tokenry.backend.contract import Bucket, DeviceRef, KVSpec
from tokenry.errors import ConfigError, DeviceOOM, UncoveredShape
from tokenry.runner.pack import blank_batch, to_device
from tokenry_cuda import tokenry_open

device = simdevice.current()

def opened(**options):
    ref = DeviceRef(backend="cuda", index=0, name="NVIDIA H200", score=100)
    return tokenry_open(ref, {"kernels": "torch"} | options, (1, 0))

def batch(backend, seqs, width=4):
    host = blank_batch(Bucket("decode", seqs, seqs, 0), width, uniform_q=False)
    return to_device(host, backend)[0]

def error_of(call):
    try:
        call()
    except (ConfigError, DeviceOOM, UncoveredShape, RuntimeError) as error:
        return [type(error).__name__, str(error)]
"""


def on_device(h200, script, **kwargs):
    return run_on_device("cuda", BEGIN + script, env=h200, **kwargs).value


def test_the_plan_has_the_peak_and_keeps_as_much_for_programs(h200):
    found = on_device(
        h200,
        """
spec = KVSpec(num_layers=2, num_kv_heads=4, head_dim=64, block_size=16, dtype="float32")
plans = {}
def probe():
    torch.zeros(48 << 20, dtype=torch.uint8, device="cuda")
for name, options in {
    "capture": {}, "none": {"graphs": "none"}, "told": {"graph_memory": "16"}
}.items():
    plan = opened(**options).plan_kv(spec, 1 << 30, probe)
    plans[name] = dict(plan.ledger)
simdevice.report(plans)
""",
    )
    peak = 48 << 20
    assert {name: ledger["activations"] for name, ledger in found.items()} == dict.fromkeys(
        found, peak
    )
    kept = {name: ledger["programs"] for name, ledger in found.items()}
    assert kept == {"capture": peak, "none": 0, "told": 16 << 20}
    for ledger in found.values():
        assert (1 << 30) - (1 << 19) < sum(ledger.values()) <= 1 << 30


def test_programs_share_their_buffers_and_what_they_hold_is_counted(h200):
    found = on_device(
        h200,
        """
with torch.inference_mode():
    backend = opened()
    wide = torch.ones(256, 4096, device="cuda")
    step = lambda b: (wide[: b.bucket.seqs] * b.seq_lens[:, None]).float()
    big, small = (backend.compile(step, batch(backend, n)) for n in (8, 2))
    held = backend.program_bytes()
    given = batch(backend, 2)
    given.seq_lens.copy_(torch.tensor([3, 5], dtype=torch.int32))
    out = small(given)
    values = out[:, 0].cpu().tolist()
    same = big(batch(backend, 8)).data_ptr() == out.data_ptr()
simdevice.report({
    "made": backend.compile_count(), "held": held, "values": values, "same": same,
    "wrong": error_of(lambda: big(batch(backend, 2))),
    "wide": error_of(lambda: big(batch(backend, 8, width=5))),
    "captures": device.counts().captures, "replays": device.counts().replays,
})
""",
    )
    assert (found["made"], found["captures"]) == (2, 2)
    assert found["values"] == [3.0, 5.0]
    assert found["same"], "each program keeps an output of its own"
    assert found["held"] >= 8 * 4096 * 4
    assert found["wrong"][0] == found["wide"][0] == "UncoveredShape"


def test_a_step_without_memory_is_typed_and_the_device_stays_usable(h200):
    found = on_device(
        h200,
        """
class Spec:
    def torch_step(self, weights, ops, caps):
        def step(batch, kv):
            return torch.zeros(batch.bucket.tokens << 20, device="cuda")
        return step
with torch.inference_mode():
    backend = opened()
    step = backend.build_model(Spec(), [], None)
    first = error_of(lambda: step(batch(backend, 300), None))
    again = step(batch(backend, 4), None).sum().item()
    captured = error_of(
        lambda: backend.compile(
            lambda b: torch.zeros(b.bucket.tokens << 20, device="cuda"), batch(backend, 300)))
    after = backend.compile(lambda b: step(b, None), batch(backend, 4))(batch(backend, 4))
simdevice.report({"first": first, "again": again, "captured": captured, "n": after.numel()})
""",
        memory=512 << 20,
    )
    assert found["first"][0] == found["captured"][0] == "DeviceOOM"
    assert "tokens=300" in found["first"][1]
    assert "--memory-fraction" in found["first"][1]
    assert "graph_memory" in found["captured"][1]
    assert (found["again"], found["n"]) == (0.0, 4 << 20)


def test_the_engine_goes_on_after_a_step_that_did_not_fit(h200):
    found = on_device(
        h200,
        """
from tokenry import LLM, SamplingParams
from tokenry.errors import StepFailed
limits = dict(dtype="float32", max_model_len=512, max_num_seqs=2, num_kv_blocks=70)
greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ask = lambda: llm.generate(["Once upon a time"], greedy, use_tqdm=False)[0].outputs[0].token_ids
options = ("kernels=torch", "graph_tokens=0")
with LLM("demo", backend="cuda", backend_option=options, **limits) as llm:
    want = ask()
    device.set_memory_limit(device.memory().allocated_bytes + (64 << 10))
    try:
        ask()
        failed = None
    except StepFailed as error:
        failed = str(error)
    device.set_memory_limit(2 << 30)
    got = ask()
simdevice.report({"want": want, "got": got, "failed": failed})
""",
    )
    assert "No memory for a step of Bucket" in found["failed"]
    assert found["got"] == found["want"]


def test_a_batch_that_does_not_fit_is_served_smaller_with_the_same_tokens(h200):
    """What the steps may take beside the KV is cut in service, so that a whole batch does not fit;
    each request alone does.
    """
    found = on_device(
        h200,
        """
from tokenry import LLM, SamplingParams
limits = dict(dtype="float32", max_model_len=160, max_num_seqs=8, num_kv_blocks=90)
greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
prompts = [{"prompt_token_ids": [(7 * i * i + n) % 256 for i in range(90 + n)]} for n in range(8)]
def ask(llm):
    done = llm.generate(prompts, greedy, use_tqdm=False)
    return [c.outputs[0].token_ids for c in done]
options = ("kernels=torch", "graphs=none")
with LLM("demo", backend="cuda", backend_option=options, enable_prefix_caching=False,
         **limits) as llm:
    held = device.memory().allocated_bytes
    device.reset_peak()
    want = ask(llm)
    peak = device.memory().peak_bytes - held
    device.set_memory_limit(held + peak // 2)
    got = ask(llm)
    stats, after = llm.get_metrics(), device.memory().allocated_bytes
    llm._assembled.engine.check_integrity()
simdevice.report({"same": got == want, "ooms": stats.num_device_ooms, "held": held, "after": after,
                  "failures": stats.step_failures, "preempted": stats.num_preemptions})
""",
    )
    assert found["same"]
    assert found["ooms"] > 0
    assert found["preempted"] > 0
    assert found["failures"] == 0
    assert found["after"] - found["held"] < 64 << 10, "the steps that did not fit are still held"


def test_inputs_come_from_pinned_memory_and_results_go_there_on_a_stream_of_their_own(h200):
    found = on_device(
        h200,
        """
backend = opened()
record, events = torch.cuda.Event.record, []
def noted(event, stream=None):
    events.append(None if stream is None else stream.stream_id)
    return record(event, stream)
x = torch.arange(5, device="cuda", dtype=torch.int32)
with device.no_host_sync():
    torch.cuda.Event.record = noted
    wait = backend.fetch([x, torch.ones(2, 3, device="cuda"), x[:0]])
    torch.cuda.Event.record = record
    x.add_(100)
got = wait()
to, pinned = torch.Tensor.to, []
def watched(tensor, *args, **kwargs):
    pinned.append(tensor.is_pinned())
    return to(tensor, *args, **kwargs)
torch.Tensor.to = watched
with device.no_host_sync():
    batch(backend, 3)
torch.Tensor.to = to
simdevice.report({"pinned": pinned, "values": [a.tolist() for a in got], "streams": events,
                  "now": torch.cuda.current_stream().stream_id,
                  "copies": device.counts().async_copies_to_host})
""",
    )
    assert found["values"] == [[0, 1, 2, 3, 4], [[1.0] * 3] * 2, []]
    assert found["copies"] == 1
    assert found["pinned"] == [True]
    assert found["streams"][-1] not in (None, found["now"])


def test_a_lost_device_ends_generation_with_its_cause(h200):
    found = on_device(
        h200,
        """
from tokenry import LLM, SamplingParams
from tokenry.errors import DeviceLost
limits = dict(dtype="float32", max_model_len=64, max_num_seqs=2, num_kv_blocks=12)
greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
wait = torch.cuda.Event.synchronize
def lost(*args, **kwargs):
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error.error_code = 700
    raise error
found = []
def met():
    # what a generation ends with, on a device that is lost in one call or the other
    with LLM("demo", backend="cuda", backend_option=("kernels=torch",), **limits) as llm:
        llm.generate(["Once"], greedy, use_tqdm=False)
        lose()
        try:
            llm.generate(["Once", "Twice"], greedy, use_tqdm=False)
        except DeviceLost as error:
            found.append(str(error))
def lose():
    torch.cuda.Event.synchronize = lost
met()
torch.cuda.Event.synchronize = wait
def lose():  # first met in a call of the core's sampler
    torch.Tensor.amax = torch.cuda.synchronize = lost
met()
simdevice.report(found)
""",
    )
    assert "cuda:0 failed in a step and cannot be used" in found[0]
    assert "cuda:0 failed in a step before this and cannot be used" in found[1]
    assert all("illegal memory access" in text for text in found)


@pytest.mark.parametrize("code", [*sorted(STICKY), None])
def test_an_error_that_stays_is_a_lost_device(code, monkeypatch):
    error = torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with ...")
    error.error_code = code
    with (
        pytest.raises(DeviceLost, match="cuda:0 failed in a step") as caught,
        typed_errors("a step", 0),
    ):
        raise error
    assert "illegal memory access" in caught.value.message
    assert "Compile with" not in str(caught.value)
    assert "restart" in str(caught.value.mend)


def test_an_error_of_one_call_is_passed_on_and_the_drivers_own_lack_of_memory_is_typed():
    for code, kind in ((1, torch.AcceleratorError), (2, DeviceOOM)):
        error = torch.AcceleratorError("CUDA error")
        error.error_code = code
        with pytest.raises(kind), typed_errors("a step", 0):
            raise error


@pytest.mark.parametrize("backend", ["e4m3fn", "e4m3fnuz"])
def test_a_linear_in_fp8_is_near_the_model_s(h200, backend):
    found = on_device(
        h200,
        """
from tokenry_triton.gpu.ops import Linear
torch.manual_seed(0)
kind = json.loads(sys.argv[1])
weight, x = torch.randn(512, 64), torch.randn(5, 64)
weight[7] *= 50
packed = Linear(kind).pack({"weight": weight.cuda(), "bias": torch.ones(512).cuda()})
want = torch.nn.functional.linear(x, weight, torch.ones(512))
if kind == "e4m3fn":
    got = Linear(kind)(x.bfloat16().cuda(), packed | {"bias": packed["bias"].bfloat16()})
    got = got.float().cpu()
else:  # the simulated card's products do not have it: what was packed is looked at
    got = x @ (packed["fp8"].float().cpu() * packed["scale"].cpu()) + 1
simdevice.report({"error": ((got - want).norm() / want.norm()).item(),
                  "kind": str(packed["fp8"].dtype), "bytes": packed["fp8"].nbytes})
""",
        args=[json.dumps(backend)],
    )
    assert found["kind"] == f"torch.float8_{backend}"
    assert found["bytes"] == 512 * 64
    assert 1e-3 < found["error"] < 0.06


def test_a_checkpoint_s_fp8_is_brought_to_the_device_s_encoding():
    bits = torch.arange(256, dtype=torch.uint8)
    bits = bits[(bits & 0x7F) != 0x7F]  # NaN, which no weight is
    weight = bits.view(torch.float8_e4m3fn).view(-1, 1)
    scale = torch.full((1, len(bits)), 0.25)
    fnuz, doubled = to_fnuz(weight, scale)
    assert torch.equal(fnuz.float()[:, 0] * doubled[0], weight.float()[:, 0] * scale[0])
    packed = Linear("e4m3fnuz").pack({"weight": weight, "scale": scale[0]})
    assert packed["fp8"].dtype == torch.float8_e4m3fnuz
    assert torch.equal(packed["fp8"].float()[0] * packed["scale"][0], weight.float()[:, 0] * 0.25)


def test_a_router_or_an_odd_shape_stays_in_the_model_s_dtype():
    for shape in ((8, 64), (512, 60), (510, 64)):
        assert Linear("e4m3fn").pack({"weight": torch.ones(shape)}).keys() == {"weight"}
