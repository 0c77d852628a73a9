"""The conformance kit: with it, a backend is done when it is green.

In: the name of an installed backend. Out: a report, rule by rule: what was tried, what failed and
by how much. `tokenry conform NAME` prints it; a plugin's test file is three lines:

    from tokenry.conformance import conformance_tests

    test_conformance = conformance_tests("name")

What `Caps` does not declare is not asked; what it claims is tested. The kit goes the ways of the
engine (discovery, packing, runner, LLM) and needs nothing installed but the core and the backend.
"""

from __future__ import annotations

from tokenry.conformance.plugin import conformance_tests

__all__ = ["conformance_tests"]
