"""`insertion`: things are put into a row, one after the other; at which place is one at the end?

The facts are nine insertions in their order: "3>1" puts thing 3 at place 1; what is at place 1 or after it moves on by
one place. A question is a thing. The first step finds the place at which it was put in. Each further step is a later
insertion at or before its place, which moves it on by one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from .problem import SYMBOLS, Line, Problem, draw


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""

    def line() -> Line:
        things = rng.sample(SYMBOLS, len(SYMBOLS))
        places = [rng.randint(0, at) for at in range(len(things))]

        def solve(thing: str, answered: Mapping[str, str]) -> list[str]:
            at = things.index(thing)
            place = places[at]
            trace = [SYMBOLS[place]]
            for other in places[at + 1 :]:
                if other <= place:
                    place += 1
                    trace.append(SYMBOLS[place])
            return trace

        return [f"{thing}>{place}" for thing, place in zip(things, places, strict=True)], things, solve

    return [draw("insertion", rng, line) for _ in range(n)]
