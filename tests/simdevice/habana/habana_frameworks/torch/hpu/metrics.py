"""The recompile alarm: how many graphs were compiled within a context."""

from __future__ import annotations

import simdevice


class metric_localcontext:  # noqa: N801
    """`with metric_localcontext("graph_compilation") as gc: ...`; gc.stats()[0][1] compilations."""

    def __init__(self, metric_name: str) -> None:
        if metric_name != "graph_compilation":
            raise simdevice.VendorRefuses(f"no metric is called {metric_name!r} here")
        self._start = self._end = 0

    def __enter__(self) -> metric_localcontext:
        self._start = simdevice.current().counts().compilations
        self._end = -1
        return self

    def __exit__(self, *exception: object) -> None:
        self._end = simdevice.current().counts().compilations

    def stats(self) -> list[tuple[str, int]]:
        """[("TotalNumber", n), ("TotalTime", 0), ("AvgTime", 0)]; no time is simulated."""
        now = simdevice.current().counts().compilations if self._end < 0 else self._end
        return [("TotalNumber", now - self._start), ("TotalTime", 0), ("AvgTime", 0)]
