"""The backend under test: opened anew for every check, and the models that it is asked to run.

In: a backend's name, its options. Out: `Kit`. Goes the way that the engine goes (discovery, open),
so what is tested is what an installed distribution gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenry.backend.base import Backend
from tokenry.backend.contract import Caps, DeviceRef
from tokenry.backend.discovery import Probe, choose, discover, open_backend
from tokenry.backend.simulators import SIMULATORS
from tokenry.conformance.child import environment_now
from tokenry.conformance.tiny import FAMILIES, TinyModel, write_model
from tokenry.models.registry import NativeSpec, load_spec


class Kit:
    """What the checks need.

    probe    the row of the backend's entry point, None for a simulator.
    caps     of the first opening. environment: of this process before it.
    steps    random steps that C10 makes.
    """

    def __init__(
        self, backend: str, *, options: Mapping[str, str], directory: Path, steps: int
    ) -> None:
        self.name = backend
        self.options = dict(options)
        self.steps = steps
        self._directory = directory
        self._models: dict[str, TinyModel] = {}
        self.environment = environment_now()
        rows = discover(backend)
        self.probe: Probe | None = rows[0] if rows else None
        self.device: DeviceRef = choose(rows, backend)
        self.caps: Caps = self.open().caps

    @property
    def simulated(self) -> bool:
        """Whether it is one of the core's simulators, which have no entry point."""
        return self.name in SIMULATORS

    @property
    def dtype(self) -> str:
        """The dtype that the checks of whole models use: float32 where there is one."""
        return "float32" if "float32" in self.caps.dtypes else self.caps.dtypes[0]

    def open(self) -> Backend:
        """A fresh one."""
        return open_backend(self.device, self.options)

    def spec(self, family: str = "llama") -> NativeSpec:
        """The model in the dtype of `dtype`."""
        spec: NativeSpec = load_spec(self.model(family).path, dtype=self.dtype)
        return spec

    def model(self, family: str = "llama") -> TinyModel:
        """A tiny random model on disk, made once."""
        if family not in self._models:
            self._models[family] = write_model(self._directory / family, FAMILIES[family])
        return self._models[family]
