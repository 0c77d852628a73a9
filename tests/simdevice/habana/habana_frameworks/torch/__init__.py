"""Importing it puts the device `hpu` into torch, as the vendor's package does."""

from habana_frameworks.torch import core as core
from habana_frameworks.torch import hpu, ops

hpu.register()
ops.register()
