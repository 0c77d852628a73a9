"""A stand-in for the vendor's `torch_neuronx` (native TorchNeuron, SDK 2.33), for tests only.

Names follow the vendor's public documentation (torch.compile backend reference, 2.33) and public
code that calls the package. Numbers are plain torch. Nothing here shows what a real Trainium
computes or compiles.
"""

from __future__ import annotations

from simdevice.collectives import register_backend
from simdevice.module import functions
from simdevice.private import attach_private, serve

from torch_neuronx.neuron_dynamo_backend import get_dynamo_metrics, reset_dynamo_metrics


def load() -> None:
    """The `torch.backends` entry point: the device, `torch.neuron`, collectives."""
    device = attach_private("neuron")
    metrics = {
        "get_dynamo_metrics": get_dynamo_metrics,
        "reset_dynamo_metrics": reset_dynamo_metrics,
    }
    serve("neuron", {**functions(device, title="trn2 (simulated)"), **metrics})
    register_backend("neuron", "neuron")


load()

__all__ = ["get_dynamo_metrics", "load", "reset_dynamo_metrics"]
