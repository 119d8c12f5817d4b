"""`carry`: add two numbers; what is the digit of the sum below a column?

The facts are the columns of two numbers of twelve digits to the base nine, the highest column first: "3>5" has the
digits 3 and 5. A question is the number of a column, from 0 on. Questions are in ascending order, at least three
columns apart. Whether a column gets a carry depends on the first column to its right whose digits do not add up to 8:
such a column passes on the carry that it gets. The first step adds the digits and the carry of the column to the right,
if its digits determine it. Each further step goes one more column to the right, while the carry is open; an open carry
counts as 0.
"""

from __future__ import annotations

import random

from .problem import ODDS, QUESTIONS, SYMBOLS, Problem

BASE = len(SYMBOLS)
PART = max(ODDS)  # columns from one question to the next, at least
MORE = 2  # other columns, before, between and after the questions


def make(rng: random.Random, n: int) -> list[Problem]:
    """Return `n` problems."""
    return [_problem(rng) for _ in range(n)]


def _problem(rng: random.Random) -> Problem:
    wanted = rng.choices(ODDS, k=QUESTIONS)
    places = rng.choices(range(QUESTIONS + 1), k=MORE)  # 0: before the first question
    columns = [_any_column(rng) for _ in range(places.count(0))]
    columns.append(_column(rng, carries=rng.random() < 0.5))
    asked = []
    for part, steps in enumerate(wanted, 1):
        asked.append(len(columns) - 1)
        # The columns after a question: some that pass a carry on, and one that does not.
        columns += [_open_column(rng) for _ in range(steps - 1)]
        columns.append(_column(rng, carries=rng.random() < 0.5))
        for left in range(PART + places.count(part) - steps, 0, -1):
            last = left == 1  # the next question, whose own carry is not open
            columns.append(_column(rng, carries=rng.random() < 0.5) if last else _any_column(rng))
    traces = []
    for column, steps in zip(asked, wanted, strict=True):
        own, decides = sum(columns[column]), sum(columns[column + steps])
        traces.append([SYMBOLS[own % BASE]] * (steps - 1) + [SYMBOLS[(own + (decides >= BASE)) % BASE]])
    return Problem(
        "carry",
        tuple(f"{one}>{other}" for one, other in columns),
        tuple(SYMBOLS[column] for column in asked),
        tuple(map(tuple, traces)),
    )


def _any_column(rng: random.Random) -> tuple[int, int]:
    """Return two digits; half of these columns pass a carry on."""
    return _open_column(rng) if rng.random() < 0.5 else _column(rng, carries=rng.random() < 0.5)


def _column(rng: random.Random, carries: bool) -> tuple[int, int]:
    """Return two digits that add up to at least `BASE`, or to less than `BASE` - 1, each such pair with equal odds."""
    while True:
        one, other = rng.randrange(BASE), rng.randrange(BASE)
        if one + other != BASE - 1 and (one + other >= BASE) == carries:
            return one, other


def _open_column(rng: random.Random) -> tuple[int, int]:
    """Return two digits that add up to `BASE` - 1, so that the column passes a carry on."""
    one = rng.randrange(BASE)
    return one, BASE - 1 - one
