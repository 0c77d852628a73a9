"""The hooks of every mutant: one plugin object per name. No torch until one is opened."""

import os
import sys
from functools import cache

from tokenry.backend.contract import DeviceRef, hookimpl


class Door:
    """An honest plugin for a backend that may not be one."""

    def __init__(self, name):
        self.name = name

    def device(self):
        return DeviceRef(backend=self.name, index=0, name="a mutant", score=5)

    @hookimpl
    def tokenry_probe(self):
        return self.device()

    @hookimpl
    def tokenry_open(self, device):
        if device.backend != self.name:
            return None
        import mutants

        return mutants.MUTANTS.get(self.name, mutants.Device)()


class ProbeLoadsTorch(Door):
    @hookimpl
    def tokenry_probe(self):
        import torch

        assert torch.__version__
        return self.device()


class ProbeWritesEnvironment(Door):
    @hookimpl
    def tokenry_probe(self):
        os.environ["MUTANT_DEVICES"] = "0"
        return self.device()


class ProbeCounts(Door):
    count = 0

    @hookimpl
    def tokenry_probe(self):
        self.count += 1
        return DeviceRef(backend=self.name, index=0, name=f"probe {self.count}", score=5)


class OpensEverything(Door):
    @hookimpl
    def tokenry_open(self, device):
        import mutants

        return mutants.Device()


class IgnoresOptions(Door):
    @hookimpl
    def tokenry_open(self, device, options):
        import mutants

        list(options.items())
        return mutants.Device() if device.backend == self.name else None


class OneObject(Door):
    kept = None

    @hookimpl
    def tokenry_open(self, device):
        import mutants

        if device.backend != self.name:
            return None
        self.kept = self.kept or mutants.Device()
        return self.kept


class PatchesTorch(Door):
    @hookimpl
    def tokenry_open(self, device):
        import torch

        torch.nn.functional.silu = lambda x, inplace=False: x * torch.sigmoid(x)
        return self.opened()

    def opened(self):
        import mutants

        return mutants.Device()


class PatchesCore(PatchesTorch):
    @hookimpl
    def tokenry_open(self, device):
        from tokenry.backend import reference

        reference.Linear.__call__ = lambda self, x, weights: x @ weights["weight"].T
        return self.opened()


class SwitchesDtype(PatchesTorch):
    @hookimpl
    def tokenry_open(self, device):
        import torch

        torch.set_default_dtype(torch.bfloat16)
        try:
            return self.opened()
        finally:
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float32)


class WritesEnvironment(PatchesTorch):
    @hookimpl
    def tokenry_open(self, device):
        os.environ["PYTORCH_MUTANT_MODE"] = "1"
        return self.opened()


class ChangesArgv(PatchesTorch):
    @hookimpl
    def tokenry_open(self, device):
        sys.argv.append("--mutant")
        return self.opened()


SPECIAL = {
    "probe-loads-torch": ProbeLoadsTorch,
    "probe-writes-environment": ProbeWritesEnvironment,
    "probe-differs": ProbeCounts,
    "opens-everything": OpensEverything,
    "ignores-options": IgnoresOptions,
    "one-object": OneObject,
    "patches-torch": PatchesTorch,
    "patches-core": PatchesCore,
    "switches-grad-mode": SwitchesDtype,
    "writes-environment": WritesEnvironment,
    "changes-argv": ChangesArgv,
}


@cache
def door(name):
    """One object per plugin, as a module would be."""
    return SPECIAL.get(name, Door)(name)


def __getattr__(name):
    """The entry points say `mutant_doors:door_<name>`."""
    if not name.startswith("door_"):
        raise AttributeError(name)
    return door(name.removeprefix("door_").replace("_", "-"))
