"""Write what the documentation takes from the code.

    python docs/generate.py

Makes docs/config.md, docs/contract.md and docs/conformance.md, and the two tables of
core/README.md (import arrows, lines per room).
tests/test_docs.py fails when they are not up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "tokenry"


# ---- the rooms ----------------------------------------------------------------------------------


def rooms() -> dict[str, list[Path]]:
    """Room (or file at the top) -> its Python files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(CORE.rglob("*.py")):
        parts = path.relative_to(CORE).parts
        name = parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms it imports, late imports and dotted names in strings included."""
    known = set(rooms())
    found: dict[str, set[str]] = {name: set() for name in known}
    for room, paths in rooms().items():
        for path in paths:
            for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
                parts = name.split(".")
                if parts[0] == "tokenry" and len(parts) > 1 and parts[1] in known - {room}:
                    found[room].add(parts[1])
    return found


def imported(tree: ast.Module) -> set[str]:
    """Names of imported modules, but for those under `if TYPE_CHECKING`."""
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names: set[str] = set()
    for node in set(ast.walk(tree)) - for_types:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            text = ast.unparse(node.args[0])
            names.update(re.findall(r"tokenry\.[a-z_.]+", text))
    return names


def arrow_table() -> str:
    """Markdown of the arrows."""
    lines = ["| room | imports |", "|---|---|"]
    lines += [f"| `{a}` | {', '.join(sorted(b)) or '-'} |" for a, b in sorted(arrows().items())]
    return "\n".join(lines)


def line_table() -> str:
    """Markdown of the lines of code and documentation per room, and of the CPU plugin."""

    def count(paths: list[Path]) -> int:
        return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths)

    lines = ["| room | files | lines |", "|---|---:|---:|"]
    single = []
    for name, paths in sorted(rooms().items()):
        if len(paths) == 1 and paths[0].parent == CORE:
            single += paths
        else:
            lines.append(f"| `{name}/` | {len(paths)} | {count(paths)} |")
    lines.append(f"| files at the top | {len(single)} | {count(single)} |")
    plugin = sorted((ROOT / "plugins/cpu/tokenry_cpu").glob("*.py"))
    lines.append(f"| `plugins/cpu` | {len(plugin)} | {count(plugin)} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """core/README.md with both tables made anew."""
    for name, table in (("arrows", arrow_table()), ("lines", line_table())):
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda m, t=table: m[1] + t + "\n" + m[2], text)
    return text


# ---- configuration ------------


def config_page() -> str:
    """Every option: flag, variable, default, meaning."""
    from tokenry.config import ENV_PREFIX, EngineConfig, ServerConfig, flag_of

    lines = [
        "# Configuration",
        "",
        "Made from `core/tokenry/config/` by `make docs`. A flag wins over the YAML file",
        "(`--config`, keys as the flags), the file over the variable, that over the default.",
    ]
    for cls in (EngineConfig, ServerConfig):
        lines += ["", f"## {cls.__name__}", "", "| flag | variable | default | meaning |"]
        lines.append("|---|---|---|---|")
        for field in dataclasses.fields(cls):
            missing = field.default is dataclasses.MISSING
            default = "required" if missing else f"`{field.default!r}`"
            variable = ENV_PREFIX + field.name.upper()
            meaning = field.metadata["help"]
            lines.append(f"| `{flag_of(field.name)}` | `{variable}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


# ---- the contract ------------


def contract_page() -> str:
    """Hooks, methods, data and ops of the backend contract."""
    from tokenry.backend import base, contract

    major, minor = contract.CONTRACT
    lines = [
        f"# The backend contract, version {major}.{minor}",
        "",
        "Made from `core/tokenry/backend/contract.py` and `base.py` by `make docs`.",
        "How to use it: [write-a-backend.md](write-a-backend.md).",
        "",
        "## Hooks",
    ]
    for name in ("tokenry_probe", "tokenry_open"):
        lines += _entry(name, getattr(contract.Hooks, name))
    lines += ["", "## Backend: `memory` is required, everything else has a default"]
    for name, method in vars(base.Backend).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            lines += _entry(name, method)
    lines += ["", "## Ops", "", "```text", inspect.getdoc(base.Op) or "", "```", "", "## Data"]
    data = (
        contract.DeviceRef, contract.Caps, contract.ShapeRules, contract.PhaseRules,
        contract.Bucket, contract.KVSpec, contract.MemoryInfo, contract.KVPlan,
        contract.HostBatch, base.StepBatch, base.SampleInputs,
    )  # fmt: skip
    for cls in data:
        lines += ["", f"### {cls.__name__}", "", "```text", inspect.getdoc(cls) or "", "```"]
    return "\n".join(lines) + "\n"


def _entry(name: str, function: object) -> list[str]:
    signature = str(inspect.signature(function)).replace("self, ", "").replace("(self)", "()")  # type: ignore[arg-type]  # a function, found by name
    return ["", f"### `{name}{signature}`", "", inspect.getdoc(function) or ""]


# ---- the conformance kit ------------


def conformance_page() -> str:
    """How the kit is run, its checks, and which broken backend each of them has caught."""
    from tokenry.conformance.catalog import page

    tests = ast.parse((ROOT / "tests/conformance/test_mutants.py").read_text(encoding="utf-8"))
    table = next(
        node.value
        for node in tests.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CAUGHT"
    )
    caught: dict[str, tuple[str, str]] = ast.literal_eval(table)
    lines = ["", f"## {len(caught)} broken backends, and what caught them", ""]
    lines += ["| broken backend | caught by | words of the finding |", "|---|---|---|"]
    lines += [f"| {name} | `{check}` | {words} |" for name, (check, words) in caught.items()]
    return page() + "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Path -> text of everything that is generated."""
    readme = ROOT / "core" / "README.md"
    return {
        ROOT / "docs" / "config.md": config_page(),
        ROOT / "docs" / "contract.md": contract_page(),
        ROOT / "docs" / "conformance.md": conformance_page(),
        readme: with_tables(readme.read_text(encoding="utf-8")),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
