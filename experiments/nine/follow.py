"""`follow`: arrows between places; where does the way from a place end?

The facts are an arrow for each of nine places, shuffled: "3>5" leads from 3 to 5. Three places have an arrow to
themselves; a way ends there. A step follows one arrow. The next step looks up the result of the step before.
"""

from __future__ import annotations

import random

from .forest import forest, path
from .problem import Line, Problem, draw


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""

    def line() -> Line:
        target = forest(rng, places=9, roots=3)
        facts = [f"{one}>{other}" for one, other in target.items()]
        rng.shuffle(facts)
        return facts, list(target), lambda asked, answered: path(target, asked, answered)

    return [draw("follow", rng, line) for _ in range(n)]
