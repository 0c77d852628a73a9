"""A merged linear is packed from its parts; where an op copies, they are joined in one place."""

from __future__ import annotations

import pytest
import torch

from tokenry.backend.ops import OpTable
from tokenry.backend.reference import ReferenceOp
from tokenry.models.layers import Linear, Loader

SIZES = {"a": 4, "b": 2}


class Copying(ReferenceOp):
    """Notes where its weights lie; keeps a copy of them, and the bias itself."""

    packs_copies = True

    def __init__(self):
        self.places, self.biases = [], []

    def pack(self, weights):
        self.places.append(weights["weight"].data_ptr())
        self.biases.append(weights["bias"].data_ptr())
        return {"weight": weights["weight"].clone(), "bias": weights["bias"]}

    def __call__(self, x, weights):
        return x @ weights["weight"].T + weights["bias"]


class Keeping(Copying):
    """Keeps what it is given."""

    packs_copies = False

    def pack(self, weights):
        super().pack(weights)
        return dict(weights)


def loaded(op, tensors):
    loader = Loader(OpTable({"linear": op}), dtype="float32", device="cpu")
    layers = [
        Linear(loader, [f"{i}.{n}" for n in SIZES], list(SIZES.values()), 3, bias=True)
        for i in range(3)
    ]
    loader.load(tensors.items(), lambda name, tensor: [(name, tensor)], lambda name: False)
    return layers


@pytest.mark.parametrize("narrow", [False, True])
def test_joined_parts_give_each_layer_its_own_weights(narrow):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(3):
        for name, size in SIZES.items():
            tensors[f"{i}.{name}.weight"] = torch.randn(size, 3, generator=generator)
            tensors[f"{i}.{name}.bias"] = torch.randn(size, generator=generator)
    copying, keeping = Copying(), Keeping()
    copying.takes_narrow = keeping.takes_narrow = narrow
    if narrow:  # parts of one layer in two dtypes, as they are stored
        tensors["1.a.weight"] = tensors["1.a.weight"].bfloat16()
    x = torch.randn(5, 3, generator=generator)
    for op in (copying, keeping):
        for i, layer in enumerate(loaded(op, tensors)):
            weight = torch.cat([tensors[f"{i}.{n}.weight"].float() for n in SIZES])
            bias = torch.cat([tensors[f"{i}.{n}.bias"] for n in SIZES])
            assert torch.equal(layer(x), x @ weight.T + bias)
    assert len({*keeping.places}) == len({*keeping.biases}) == len({*copying.biases}) == 3
    assert len({*copying.places}) == (2 if narrow else 1)
