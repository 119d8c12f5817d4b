"""`relations`: relations between neighbours; how does a place relate to its root?

The facts are those of a forest of seven places with one root, shuffled: "3>5 3c" leads from 3 to 5 with relation c; the
root has "4>4" and no relation. The relations are the six ways to turn and flip a triangle: a, b and c turn it by 0, 1
and 2 corners, and d, e and f flip it after that turn. The answer is the relation of the whole way: the flips and turns
of its arrows, one after the other. Their order matters. A step adds one arrow to the way.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from .forest import forest, path
from .problem import LETTERS, Line, Problem, draw


def after(first: str, second: str) -> str:
    """Return the relation of a way of two parts: turn by t and flip by f, then turn by u and flip by g.

    A turn after a flip goes the other way round, so (t, f) and then (u, g) is (t + u or t - u, f xor g).
    """
    (f, t), (g, u) = (divmod(LETTERS.index(letter), 3) for letter in (first, second))
    return LETTERS[3 * (f ^ g) + (t - u if f else t + u) % 3]


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""

    def line() -> Line:
        target = forest(rng, places=7, roots=1)
        relation = {place: rng.choice(LETTERS) for place, above in target.items() if above != place}
        facts = [
            [f"{place}>{above}", *(place + letter for letter in relation.get(place, ""))]
            for place, above in target.items()
        ]
        rng.shuffle(facts)

        def solve(asked: str, answered: Mapping[str, str]) -> list[str]:
            trace: list[str] = []
            for place in [asked, *path(target, asked, answered)][:-1]:
                trace.append(after(trace[-1], relation[place]) if trace else relation[place])
            return trace

        return [word for fact in facts for word in fact], list(target), solve

    return [draw("relations", rng, line) for _ in range(n)]
