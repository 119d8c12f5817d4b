"""`circuit`: gates that read other gates; what is the value of a gate?

The facts are six gates, shuffled: "5>3 5>1" is gate 5, which reads gate 3 and the constant 1. 0 and 1 are constants. A
gate has the value 0 if both values that it reads are 1, and 1 otherwise. So one 0 is enough. In each step, all gates
get their values that the values known before determine. Values in answers to earlier questions are known.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from .problem import BLANK, SYMBOLS, Line, Problem, draw

GATES = 6


def step(reads: dict[str, tuple[str, str]], known: dict[str, str]) -> dict[str, str]:
    """Return the known values after one more step."""
    found = dict(known)
    for gate, (one, other) in reads.items():
        values = known.get(one), known.get(other)
        if "0" in values:
            found.setdefault(gate, "1")
        elif values == ("1", "1"):
            found.setdefault(gate, "0")
    return found


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""

    def line() -> Line:
        gates = rng.sample(SYMBOLS[2:], GATES)
        reads = {gate: _inputs(rng, gates[:at]) for at, gate in enumerate(gates)}
        facts = [[f"{gate}>{wire}" for wire in wires] for gate, wires in reads.items()]
        rng.shuffle(facts)

        def solve(gate: str, answered: Mapping[str, str]) -> list[str]:
            known = {"0": "0", "1": "1", **answered}
            trace: list[str] = []
            while gate not in known:
                known = step(reads, known)
                trace.append(known.get(gate, BLANK))
            return trace

        return [word for fact in facts for word in fact], gates, solve

    return [draw("circuit", rng, line) for _ in range(n)]


def _inputs(rng: random.Random, earlier: list[str]) -> tuple[str, str]:
    """Return two different inputs, rather gates than constants, and rather 1 than 0."""
    weights = {"0": 1, "1": 3} | dict.fromkeys(earlier, 3)
    one = rng.choices(list(weights), list(weights.values()))[0]
    del weights[one]
    return one, rng.choices(list(weights), list(weights.values()))[0]
