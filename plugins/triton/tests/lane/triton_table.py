"""python triton_table.py budgets.json: the figures of all launches, a line each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = ("registers", "spilled", "shared", "matrix")


def table(budgets):
    """The lines."""
    yield f"{'target':12}{'launch':46}" + "".join(f"{name:>10}" for name in COLUMNS)
    for target, made in budgets.items():
        for name, figures in made.items():
            yield f"{target:12}{name:46}" + "".join(f"{figures[c]:>10}" for c in COLUMNS)


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text()))))
