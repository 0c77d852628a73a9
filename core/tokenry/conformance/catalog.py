"""All checks, in the order in which they are made: the cheap ones that explain the others first."""

from __future__ import annotations

from tokenry.conformance import attention, memory, moving, opening, ops, programs, sampling, serving
from tokenry.conformance.check import Check

GROUPS: dict[str, tuple[Check, ...]] = {
    "Opening": opening.CHECKS,
    "Memory": memory.CHECKS,
    "To the device and back": moving.CHECKS,
    "Attention and its KV": attention.CHECKS,
    "The other ops": ops.CHECKS,
    "Sampling": sampling.CHECKS,
    "Steps and programs": programs.CHECKS,
    "Service": serving.CHECKS,
}
CHECKS: tuple[Check, ...] = tuple(one for checks in GROUPS.values() for one in checks)


def page() -> str:
    """docs/conformance.md, made from the checks."""
    lines = [PREFACE.rstrip()]
    for group, checks in GROUPS.items():
        lines += ["", f"### {group}", "", "| id | rule | how it is proved |", "|---|---|---|"]
        for one in checks:
            level = "" if one.must else " (good to have)"
            lines.append(f"| `{one.id}` | {one.rule}{level} | {one.proof} |")
    return "\n".join(lines) + "\n"


PREFACE = """\
# The conformance kit

Made from `core/tokenry/conformance/` by `make docs`.

With the kit a backend is done when it is green. It needs the core, the backend and nothing else:
models are tiny, random and made on the fly, the oracle is the reference on the host.

    tokenry conform NAME                    # exit code 0: it conforms, 1: it does not
    tokenry conform NAME --only C03 C12.kv  # some checks, or all whose id begins so
    tokenry conform NAME --steps 5000       # more random steps in C10
    tokenry conform NAME --backend-option key=value --json report.json --html report.html

In a plugin's own tests, three lines; each check is a test of its own, what is not asked is a
skip:

```python
from tokenry.conformance import conformance_tests

test_conformance = conformance_tests("NAME")
```

**What is asked.** What `Caps` does not declare is not asked, what it claims is tested:
`batch_invariant` brings C07, `graphs` C08 and C09, `kv_baked` C14, `token_feedback` C16, `dist`
C18. Batches are packed by the core's own code, so a static device only sees buckets that it would
see in service.

**What counts as equal.** Per element `atol * largest expected value + rtol * expected value`, and
a bound on the normalised mean square error of the whole result; both per dtype, in `compare.py`.
Claims of bits are tested on bits. Nothing is timed: a report says the same on a slow machine as
on a fast one.

**Levels.** A rule that is good to have is reported as *weak* when it does not hold, and does not
fail the backend.

**What the kit cannot see.** A read of the host inside a captured program (C15 watches the step as
`build_model` gave it), more than one rank (C18), speed. Only hardware proves the driver.

`tests/conformance/` breaks backends on purpose, one rule at a time, and expects the check that
names the rule to notice.

## The checks
"""
