"""Stop strings in a stream of text.

In: pieces of text. Out: the pieces that may be shown: never a part of a stop string, and nothing
later than needed. Knows no tokens: where the pieces are cut makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that is complete first; of two that end together, the longer one.

    An Aho-Corasick automaton: the depth of its state is the length of the longest end of the text
    that could still become a stop string, which is just what must be held back. Source: Aho &
    Corasick 1975, doi:10.1145/360825.360855.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self.matched: str | None = None
        self._include = include_in_output
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]
        self._fail = [0]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self._held = ""

    def __bool__(self) -> bool:
        """Whether there is anything to look for."""
        return len(self._next) > 1

    def feed(self, text: str) -> str:
        """What may be shown now; once `matched` is set, nothing more will come."""
        if self.matched is not None:
            return ""
        if not self:
            return text
        for i, char in enumerate(text):
            self._state = self._step(self._state, char)
            found = self._found[self._state]
            if found is not None:
                self.matched = found
                seen = self._held + text[: i + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(found)]
        seen = self._held + text
        cut = len(seen) - self._depth[self._state]
        self._held = seen[cut:]
        return seen[:cut]

    def flush(self) -> str:
        """What was held back, at the text's end: no stop string will complete it."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(None)
                self._fail.append(0)
            state = self._next[state][char]
        self._found[state] = stop

    def _link(self) -> None:
        """Failure links, breadth first: each node's longest proper end that is also a beginning."""
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                self._fail[child] = self._step(self._fail[state], char)
                if self._found[child] is None:
                    self._found[child] = self._found[self._fail[child]]
                queue.append(child)
