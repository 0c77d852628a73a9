"""Bounds of what one grammar may cost, in llguidance's units."""

from __future__ import annotations

from llguidance import LLParserLimits


def parser_limits() -> LLParserLimits:
    """Bounds of time and memory: a mask takes some 8 ms at the very most.

    Source of the speeds: llguidance's LLParserLimits (50k units of fuel per ms at the start, 14k
    per ms in a step, 20k items per ms, 1-2 kB per lexer state).
    """
    return LLParserLimits(
        initial_lexer_fuel=2_000_000,
        step_lexer_fuel=70_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )
