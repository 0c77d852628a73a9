"""What a check is, and what comes of running one.

In: a generator function over `Kit`. Out: `Check` (id, rule, whether it is asked of a device with
these Caps) and `Result`. Knows no backend and no report.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, ParamSpec

from tokenry.backend.contract import Caps

if TYPE_CHECKING:
    from tokenry.conformance.kit import Kit

MOST_FAILURES = 5
"""A check ends after so many failed cases: the first ones tell the story."""

Asked = Callable[[Caps], str | None]
"""Why a check is not asked of a device with these Caps; None: it is."""
P = ParamSpec("P")
Status = Literal["passed", "failed", "weak", "not asked"]


class NotAsked(Exception):
    """Raised within a check that cannot be asked of this backend, for a reason that its Caps do not
    show.
    """


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that was tried. failure: what was wrong, with the figures; None: nothing."""

    name: str
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A rule of the contract, and how it is proved.

    rule    one sentence: what holds of every right backend.
    proof   how it is tried: the docstring of `run`.
    must    False: good to have; a failure is reported as "weak" and does not fail the backend.
    """

    id: str
    rule: str
    proof: str
    run: Callable[[Kit], Iterator[Case]]
    asked: Asked
    must: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a check. failures: "case: what was wrong". reason: why it was not asked."""

    id: str
    rule: str
    status: Status
    cases: int = 0
    failures: tuple[str, ...] = ()
    reason: str = ""
    seconds: float = 0.0


def always(caps: Caps) -> str | None:
    """Asked of every device."""
    return None


def check(
    id: str, rule: str, *, asked: Asked = always, must: bool = True
) -> Callable[[Callable[[Kit], Iterator[Case]]], Check]:
    """Decorator: the generator becomes a Check."""

    def make(run: Callable[[Kit], Iterator[Case]]) -> Check:
        proof = " ".join((run.__doc__ or "").split())
        return Check(id=id, rule=rule, proof=proof, run=run, asked=asked, must=must)

    return make


def attempt(name: str, trial: Callable[P, str | None], *args: P.args, **kwargs: P.kwargs) -> Case:
    """The case of that name: `trial` gives what was wrong, or raises, which is wrong as well."""
    try:
        return Case(name, trial(*args, **kwargs))
    except NotAsked:
        raise
    except Exception as error:  # foreign code: whatever it raises is the finding
        return Case(name, described(error))


def described(error: BaseException) -> str:
    """One line of an exception."""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:600]}"


def run_check(wanted: Check, kit: Kit) -> Result:
    """Try it; every outcome is a Result."""
    start = time.monotonic()
    reason = wanted.asked(kit.caps)
    if reason is not None:
        return Result(id=wanted.id, rule=wanted.rule, status="not asked", reason=reason)
    count, failures = 0, []
    try:
        for case in wanted.run(kit):
            count += 1
            if case.failure is not None:
                failures.append(f"{case.name}: {case.failure}")
            if len(failures) == MOST_FAILURES:
                break
    except NotAsked as error:
        return Result(id=wanted.id, rule=wanted.rule, status="not asked", reason=str(error))
    except Exception as error:  # as in `attempt`
        failures.append(f"after {count} cases: {described(error)}")
    status: Status = "passed"
    if failures:
        status = "failed" if wanted.must else "weak"
    return Result(
        id=wanted.id,
        rule=wanted.rule,
        status=status,
        cases=count,
        failures=tuple(failures),
        seconds=time.monotonic() - start,
    )


def pick(checks: Iterable[Check], only: Sequence[str]) -> list[Check]:
    """The checks whose id is, or begins with, one of `only` (all without it).

    Raises KeyError with the first that names none.
    """
    found = list(checks)
    for name in only:
        if not any(_named(c, name) for c in found):
            raise KeyError(name)
    return [c for c in found if not only or any(_named(c, name) for name in only)]


def _named(one: Check, name: str) -> bool:
    return one.id.lower() == name.lower() or one.id.lower().startswith(f"{name.lower()}.")


def product(**axes: Sequence[object]) -> Iterator[Mapping[str, object]]:
    """Every combination, as mappings."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
