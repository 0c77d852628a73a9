"""Every address that an interpreted kernel touches, checked; every element, one writer.

A lane that is not masked must lie in the storage of one of the kernel's arguments, and two programs
of a launch may not store to the same address. A device would read garbage in the first case and
give a different answer from run to run in the second; the interpreter alone says nothing.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

TALLY = {}
"""Kernel -> what the tests of this process did with it: launches, lanes checked, types of its
tensors."""


class BadAddress(AssertionError):
    """A load or store outside every argument, or two programs that store to one place."""


class Checker:
    """State of the launch that runs: byte ranges of its arguments, and who wrote where."""

    def __init__(self):
        self.ranges = []
        self.writers = {}
        self.accesses = 0

    def begin(self, kernel, arguments):
        """A launch with these (host copies of) arguments."""
        self.entry = TALLY.setdefault(kernel, {"launches": 0, "lanes": 0, "types": set()})
        self.entry["launches"] += 1
        self.ranges.clear()
        self.writers.clear()
        for argument in arguments:
            tensor = getattr(argument, "base", argument)
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self.entry["types"].add(str(tensor.dtype).removeprefix("torch."))
                storage = tensor.untyped_storage()
                self.ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    def inside(self, pointers, mask, what):
        """The addresses of the live lanes."""
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        at = pointers.data[live].astype(np.int64)
        good = np.zeros(at.shape, bool)
        for low, high in self.ranges:
            good |= (at >= low) & (at + size <= high)
        if not good.all():
            raise BadAddress(
                f"{what}: {int((~good).sum())} of {at.size} lanes outside every argument"
            )
        self.accesses += at.size
        self.entry["lanes"] += at.size
        return at

    def store(self, pointers, mask, program):
        """Note who writes."""
        for address in self.inside(pointers, mask, "store").ravel().tolist():
            if self.writers.setdefault(address, program) != program:
                raise BadAddress(
                    f"programs {self.writers[address]} and {program} store to one address"
                )


@contextlib.contextmanager
def checked():
    """Kernels launched inside are checked; gives the Checker."""
    checker = Checker()
    begin = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def init(self, args, kwargs):
        out = begin(self, args, kwargs)
        checker.begin(self.fn.__name__, [*out[0], *out[1].values()])
        return out

    def checked_load(self, pointers, mask, *rest):
        checker.inside(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        checker.store(pointers, mask, tuple(self.grid_idx))
        return store(self, pointers, value, mask, *rest)

    GridExecutor._init_args_hst = init
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    try:
        yield checker
    finally:
        GridExecutor._init_args_hst = begin
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def table():
    """Lines of TALLY, a kernel each."""
    yield f"{'interpreted':14}{'launches':>10}{'lanes checked':>16}  types of its tensors"
    for kernel, entry in sorted(TALLY.items()):
        types = " ".join(sorted(entry["types"]))
        yield f"{kernel:14}{entry['launches']:>10}{entry['lanes']:>16}  {types}"
