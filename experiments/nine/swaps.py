"""`swaps`: pairs of cups change places, one pair after the other; where is a ball at the end?

The facts are six swaps in their order, each as two words: "3>5 5>3" swaps the cups at 3 and 5. A question is the place
of a ball before the first swap. A step is a swap that moves the ball. The next step looks up the result of the step
before, among the later swaps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from .problem import SYMBOLS, Line, Problem, draw

SWAPS = 6


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""

    def line() -> Line:
        swaps = [rng.sample(SYMBOLS, 2) for _ in range(SWAPS)]

        def solve(place: str, answered: Mapping[str, str]) -> list[str]:
            trace = []
            for one, other in swaps:
                if place in (one, other):
                    place = other if place == one else one
                    trace.append(place)
            return trace

        return [f"{a}>{b}" for one, other in swaps for a, b in ((one, other), (other, one))], SYMBOLS, solve

    return [draw("swaps", rng, line) for _ in range(n)]
