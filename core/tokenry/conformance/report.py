"""A run of the kit, and how it is told: a table, JSON, HTML.

In: results. Out: `Report` and its three forms. JSON is for machines that compare backends; its
`format` rises when a field changes its meaning.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

import tokenry
from tokenry.backend.contract import CONTRACT, Caps
from tokenry.conformance.check import Result

FORMAT = 1
MARKS = {"passed": "ok", "failed": "FAILED", "weak": "weak", "not asked": "-"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was asked of a backend, and what came of it.

    version   of the backend's distribution, None for a simulator.
    device    as the probe named it.
    """

    backend: str
    version: str | None
    device: str
    options: dict[str, str]
    caps: Caps
    results: tuple[Result, ...]
    when: str = ""

    @property
    def conforms(self) -> bool:
        """Whether no rule is broken."""
        return all(result.status != "failed" for result in self.results)

    def to_json(self) -> str:
        """One object: who, with which contract and Caps, and every result."""
        facts: dict[str, Any] = {
            "format": FORMAT,
            "backend": self.backend,
            "backend_version": self.version,
            "device": self.device,
            "options": self.options,
            "tokenry_version": tokenry.__version__,
            "contract": list(CONTRACT),
            "backend_contract": list(self.caps.contract),
            "when": self.when,
            "conforms": self.conforms,
            "caps": caps_facts(self.caps),
            "results": [asdict(result) for result in self.results],
        }
        return json.dumps(facts, indent=2) + "\n"

    def heading(self) -> str:
        """One line: who was asked, by which contract."""
        version = f" {self.version}" if self.version else ""
        return (
            f"{self.backend}{version} on {self.device}, tested with contract "
            f"{_dotted(self.caps.contract)}, asked by tokenry {tokenry.__version__} with "
            f"{_dotted(CONTRACT)}"
        )

    def summary(self) -> str:
        """One line of counts, and the verdict."""
        count: Counter[str] = Counter(result.status for result in self.results)
        cases = sum(result.cases for result in self.results)
        counts = ", ".join(f"{count[status]} {status}" for status in MARKS if count[status])
        verdict = "conforms" if self.conforms else "does not conform"
        return f"{self.backend} {verdict}: {counts} ({cases} cases)"

    def to_html(self) -> str:
        """A page of its own, without scripts or files beside it."""
        rows = "".join(_row(result) for result in self.results)
        caps = "".join(
            f"<tr><td>{escape(name)}</td><td>{escape(json.dumps(value))}</td></tr>"
            for name, value in caps_facts(self.caps).items()
        )
        return PAGE.format(
            title=escape(f"{self.backend}: conformance"),
            heading=escape(self.heading()),
            summary=escape(self.summary()),
            verdict="passed" if self.conforms else "failed",
            when=escape(self.when),
            rows=rows,
            caps=caps,
        )


def now() -> str:
    """The time of a report, UTC to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def line(result: Result, width: int) -> str:
    """One line of the table; failures and reasons below it."""
    told = f"{result.cases} cases" if result.status != "not asked" else result.reason
    lines = [f"  {MARKS[result.status]:<6}  {result.id:<{width}}  {told}"]
    if result.failures:
        lines[0] = f"  {MARKS[result.status]:<6}  {result.id:<{width}}  {result.rule}"
        lines += [f"          {failure}" for failure in result.failures]
    return "\n".join(lines)


def caps_facts(caps: Caps) -> dict[str, Any]:
    """Caps as JSON can hold them."""
    facts: dict[str, Any] = asdict(caps)
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in facts.items()
    }


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _row(result: Result) -> str:
    failures = "".join(f"<pre>{escape(failure)}</pre>" for failure in result.failures)
    told = escape(result.reason) if result.status == "not asked" else f"{result.cases} cases"
    return (
        f'<tr class="{result.status.replace(" ", "-")}"><td>{escape(result.id)}</td>'
        f"<td>{escape(result.status)}</td><td>{escape(result.rule)}{failures}</td>"
        f"<td>{told}</td></tr>\n"
    )


PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; }}
body {{ padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
td {{ border-top: 1px solid #ccc; padding: .35rem .6rem; vertical-align: top; }}
td:first-child {{ white-space: nowrap; font-family: ui-monospace, monospace; }}
pre {{ white-space: pre-wrap; margin: .3rem 0 0; font-size: 13px; }}
tr.passed td:nth-child(2) {{ color: #17692f; }} tr.not-asked td {{ color: #777; }}
tr.weak td:nth-child(2) {{ color: #8a5a00; }}
tr.failed td:nth-child(2) {{ color: #b3141d; font-weight: bold; }}
p.passed {{ color: #17692f; }} p.failed {{ color: #b3141d; }}
p.passed, p.failed {{ font-weight: bold; }}
</style></head><body>
<h1>{title}</h1><p>{heading}</p><p class="{verdict}">{summary}</p><p>{when}</p>
<table>{rows}</table>
<h2>Caps</h2><table>{caps}</table>
</body></html>
"""
