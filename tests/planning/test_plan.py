"""Memory, context and concurrency from config.json alone."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenry.backend.ops import OpTable
from tokenry.cli import main
from tokenry.errors import ConfigError
from tokenry.models.config import read_config
from tokenry.models.decoder import Decoder
from tokenry.models.layers import Loader
from tokenry.models.registry import load_spec
from tokenry.planning.devices import find_device
from tokenry.planning.ledger import Limits, make_plan
from tokenry.planning.parameters import parts_of

GIB = 2**30
CASE = Path(__file__).parents[2] / "examples" / "plan_70b"
SIZES = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "vocab_size": 3000,
    "max_position_embeddings": 4096,
}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama with biases": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3 moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "num_experts": 8,
        "moe_intermediate_size": 256, "num_experts_per_tok": 2, "mlp_only_layers": [1],
    },
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"},
    "phi3": {"architectures": ["Phi3ForCausalLM"]},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "granite": {"architectures": ["GraniteForCausalLM"], "tie_word_embeddings": True},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "num_key_value_heads": 8},
}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """directory(**fields) -> a directory with such a config.json."""

    def make(**fields):
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, **fields}))
        return tmp_path

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted_as_the_models_are_built(directory, family):
    path = directory(**FAMILIES[family])
    spec = load_spec(path, dtype="bfloat16", dummy=True)
    loader = Loader(OpTable(), dtype="bfloat16", device="meta")
    shapes = Decoder(loader, spec.model, spec.plan, max_len=1).shapes
    assert sum(p.count for p in parts_of(spec.model)) == sum(math.prod(s) for s in shapes.values())


def test_the_70b_model_has_as_many_weights_as_published():
    assert sum(part.count for part in parts_of(read_config(CASE))) == 70_553_706_496


def test_the_case_of_the_mission_fits():
    """Llama-3.1-70B, bfloat16, 8 devices of 96 GB, 44,000 tokens, 0.8 of the rest for graphs."""
    device, devices = find_device("gaudi2x8")
    limits = Limits(dtype="bfloat16", max_model_len=44000, graph_memory_fraction=0.8)
    plan = make_plan(read_config(CASE), device, devices, limits)
    assert plan.fits
    assert sum(plan.ledger.values()) == plan.device.memory_bytes == 96 * GIB
    assert plan.ledger["weights"] == pytest.approx(70_553_706_496 * 2 / 8, rel=1e-3)
    # 2 (K, V) * 80 layers * 1 head * 128 * 128 tokens * 2 bytes
    assert plan.block_bytes == 5 * 2**20
    assert plan.ledger["kv"] == plan.num_blocks * plan.block_bytes
    left = plan.ledger["programs"] + plan.ledger["kv"]
    assert plan.ledger["programs"] / left == pytest.approx(0.8, abs=0.001)
    assert 7 < plan.concurrency < 9
    assert plan.kv_tokens >= 7 * 44000
    assert 3 <= len(plan.buckets) <= 64


def test_the_command_prints_the_ledger_and_what_fits(capsys):
    flags = ["--max-model-len", "44000", "--graph-memory-fraction", "0.8"]
    assert main(["plan", str(CASE), "--device", "gaudi2x8", *flags]) == 0
    text = capsys.readouterr().out
    for name in ("runtime", "weights", "activations", "programs", "margin", "kv", "total"):
        assert f"\n  {name} " in text
    assert "70.55 G parameters, bfloat16, over 8" in text
    assert "80% of what is left" in text
    assert "It fits: " in text


def test_the_example_shows_what_the_command_prints(capsys):
    readme = (CASE / "README.md").read_text()
    command, shown = re.search(r"\$ tokenry (plan .*)\n((?:.|\n)*?)```", readme).groups()
    words = [str(CASE) if word == "examples/plan_70b" else word for word in command.split()]
    assert main(words) == 0
    assert capsys.readouterr().out == shown


def test_what_does_not_fit_comes_with_mends_that_do(capsys):
    flags = ["--max-model-len", "44000", "--graph-memory-fraction", "0.8", "--json"]
    assert main(["plan", str(CASE / "config.json"), "--device", "gaudi2x2", *flags]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"]
    assert plan["longest_fitting"] < 44000
    mends = plan["mends"]
    assert any(mend.startswith("--max-model-len") for mend in mends)
    assert any(mend.startswith("--graph-memory-fraction") for mend in mends)
    for mend in mends:
        wanted = dict(zip(flags[:-1:2], flags[1:-1:2], strict=True)) | {"--device": "gaudi2x2"}
        name, value = mend.split()
        wanted[name] = value
        assert main(["plan", str(CASE), *(part for pair in wanted.items() for part in pair)]) == 0


def test_weights_that_alone_are_too_large_are_said_so(capsys):
    assert main(["plan", str(CASE), "--device", "h200"]) == 1
    text = capsys.readouterr().out
    assert "the weights take 131.4" in text
    assert "mend: --device h200x2" in text


def test_more_devices_than_heads_of_keys_hold_each_head_more_than_once():
    model = read_config(CASE)
    plans = {}
    for count in (8, 16):
        device, devices = find_device(f"gaudi2x{count}")
        plans[count] = make_plan(model, device, devices, Limits(dtype="bfloat16"))
    assert plans[16].block_bytes == plans[8].block_bytes
    assert plans[16].ledger["weights"] > plans[8].ledger["weights"] / 2


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("h200", "h200", 1),
        ("H200x4", "h200", 4),
        ("mi300x", "mi300x", 1),
        ("mi300xx8", "mi300x", 8),
    ],
)
def test_a_device_is_found_by_name_and_count(name, key, count):
    device, devices = find_device(name)
    assert (device.key, devices) == (key, count)
    assert device.memory_bytes > 2**34
    assert device.bandwidth > 1e11


@pytest.mark.parametrize("name", ["h20", "h200x0", "x8", ""])
def test_an_unknown_device_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match="No figures of a device") as info:
        find_device(name)
    assert "gaudi2" in info.value.mend


def test_heads_that_do_not_divide_are_refused():
    device, _ = find_device("h200")
    with pytest.raises(ConfigError, match="64 attention heads do not divide over 3 devices"):
        make_plan(read_config(CASE), device, 3, Limits(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--graph-memory-fraction", "1.5"], "--graph-memory-fraction is 1.5"),
        (["--max-num-seqs", "0"], "--max-num-seqs is 0"),
    ],
)
def test_wrong_flags_are_refused(flags, says, capsys):
    assert main(["plan", str(CASE), "--device", "h200", *flags]) == 2
    assert says in capsys.readouterr().err


def test_a_plan_needs_no_torch():
    code = (
        "import sys\nfrom tokenry.cli import main\n"
        f"main(['plan', {str(CASE)!r}, '--device', 'gaudi2x8'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
