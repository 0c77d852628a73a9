"""Importing it registers the torch.distributed backend `hccl`."""

from simdevice.collectives import register_backend

register_backend("hccl", "hpu")
