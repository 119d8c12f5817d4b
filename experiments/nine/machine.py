"""`machine`: a state machine reads letters; in which state does it stop?

The facts are three final states in ascending order, and three letters. A question is the state in which the machine
starts. A step reads one letter and changes the state. The machine stops when it reaches a final state, or after the
last letter. `CHANGE` has the new state for each letter and state. It is the same in all problems and never shown.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from .problem import LETTERS, ODDS, SYMBOLS, Line, Problem, draw

READ = max(ODDS)
FINAL = 3
_fixed = random.Random("machine")
CHANGE = {letter: dict(zip(SYMBOLS, _fixed.sample(SYMBOLS, len(SYMBOLS)), strict=True)) for letter in LETTERS}


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""

    def line() -> Line:
        final, letters = sorted(rng.sample(SYMBOLS, FINAL)), rng.choices(LETTERS, k=READ)

        def solve(state: str, answered: Mapping[str, str]) -> list[str]:
            trace = []
            for letter in letters:
                state = CHANGE[letter][state]
                trace.append(state)
                if state in final:
                    break
            return trace

        return [*final, *letters], SYMBOLS, solve

    return [draw("machine", rng, line) for _ in range(n)]
