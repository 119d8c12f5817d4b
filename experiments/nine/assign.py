"""`assign`: variables get each other's values, one assignment after the other; what is the value of one at the end?

The facts are ten assignments in their order: "3>5" gives variable 3 the value of variable 5. Before the first one,
the value of each variable is its own name. A step goes back from a variable to the one whose value it got last. The
next step looks up the result of the step before, among the earlier assignments.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from .problem import SYMBOLS, Line, Problem, draw

ASSIGNMENTS = 10


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""

    def line() -> Line:
        assignments = [rng.sample(SYMBOLS, 2) for _ in range(ASSIGNMENTS)]

        def solve(variable: str, answered: Mapping[str, str]) -> list[str]:
            trace: list[str] = []
            for to, source in reversed(assignments):
                if to == variable:
                    variable = source
                    trace.append(variable)
            # The answer to a question on the way would save steps.
            return [] if any(passed in answered for passed in trace) else trace

        return [f"{to}>{source}" for to, source in assignments], SYMBOLS, solve

    return [draw("assign", rng, line) for _ in range(n)]
