"""`collatz`: a number changes by a rule until it is one of the marked ones; which one?

The facts are the rule and four marked numbers in ascending order. The rule "3>5" halves an even number and adds 3; it
multiplies an odd number by 3 and adds 5; both modulo 9. A question is the number at the beginning. A step applies the
rule once; at least one step is made.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from .problem import ODDS, SYMBOLS, Line, Problem, draw

MARKED = 4


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""

    def line() -> Line:
        even, odd = rng.choices(range(len(SYMBOLS)), k=2)
        marked = sorted(rng.sample(SYMBOLS, MARKED))

        def solve(asked: str, answered: Mapping[str, str]) -> list[str]:
            number = int(asked)
            trace: list[str] = []
            while not trace or trace[-1] not in marked:
                if len(trace) == max(ODDS) or (trace and trace[-1] in answered):
                    return []  # too many steps, or the answer to a question on the way would save steps
                number = (3 * number + odd if number % 2 else number // 2 + even) % len(SYMBOLS)
                trace.append(SYMBOLS[number])
            return trace

        return [f"{even}>{odd}", *marked], SYMBOLS, solve

    return [draw("collatz", rng, line) for _ in range(n)]
