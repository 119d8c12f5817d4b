"""Make the problems of nine tasks for one small model. Every answer takes one to three steps, not written out.

A problem is a line with facts and three questions about them. The model writes the questions again, with the answers in
the blanks, which is seven tokens with the end:

    follow 1>1 6>4 0>2 4>5 2>2 5>1 7>7 3>4 8>0 3 ? 4 ? 8 ?     ->     3 1 4 1 8 2

| task | what a question asks | a step | answers right after one step | problems right after one step |
| --- | --- | --- | --- | --- |
| follow | where the way from a place ends, given an arrow per place | one arrow | .56 | .18 |
| swaps | where a ball is after six swaps of cups | a swap that moves it | .56 | .17 |
| assign | the value of a variable after ten assignments | back to the variable that was copied | .56 | .18 |
| carry | a digit of a sum | a column to the right, while the carry is open | .75 | .43 |
| relations | how a place relates to its root, given neighbours | one relation, composed in S3 | .59 | .20 |
| machine | the state in which a fixed machine stops, given letters and final states | one letter | .62 | .23 |
| circuit | the value of a gate, given what six gates read | one level of gates | .76 | .44 |
| insertion | the place of a thing in a row after nine insertions | a later insertion before it | .77 | .45 |
| collatz | the first marked number, given the rule of a sequence | one number of the sequence | .62 | .27 |

In `follow`, `swaps` and `assign`, the second step looks up the result of the first one in the facts. In the other six
it does not. The number of steps is 1, 1, 2 or 3 with equal odds for every question of every task, and the number for
one question is independent of the others. A line of a task always has the same number of words, and none of its words
determines the number of steps. In `carry`, the column to the right of a question reveals whether there is a second one.
No question is on the way from a later one to its answer. In `circuit` it may be, and the steps are counted with it.

The last two columns are measured by `tests/test_nine.py`. They are for a solver that gets the result of the first step
and whether it is the answer. If it is not, the solver gives the most frequent answer for this result. All steps
together are always right, by other solvers in the same test.

Each module has `make(rng, n)`, which returns `n` problems. The facts, in any order, determine the split of a problem.
So the facts of a held-out problem are not in the training with other questions, nor in another order. All tasks share
a vocabulary of 164 words, and a row has at most 29 tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator

from . import assign, carry, circuit, collatz, follow, insertion, machine, relations, swaps
from .problem import Problem

TASKS = {
    "follow": follow.make,
    "swaps": swaps.make,
    "assign": assign.make,
    "carry": carry.make,
    "relations": relations.make,
    "machine": machine.make,
    "circuit": circuit.make,
    "insertion": insertion.make,
    "collatz": collatz.make,
}
LOOKUPS = ("follow", "swaps", "assign")  # tasks whose second step looks up the result of the first one
HELD_OUT = {0: "test", 1: "test", 2: "validation"}  # tenths of the hashes; the others are for training
SPLITS = ("train", "validation", "test")


def split_of(problem: Problem) -> str:
    """Return the split of a problem: `train`, `validation` or `test`, by a hash of its task and its sorted facts."""
    facts = " ".join([problem.task, *sorted(problem.facts)])
    return HELD_OUT.get(int.from_bytes(hashlib.sha256(facts.encode()).digest()[:4], "big") % 10, "train")


def problems(task: str, split: str, seed: int) -> Iterator[Problem]:
    """Yield problems of one task and split without end; a line of `validation` or `test` occurs only once.

    Args:
        task: Key of `TASKS`.
        split: `train`, `validation` or `test`.
        seed: Random seed of the problems.

    Raises:
        ValueError: There is no such task or split.
    """
    for name, given, known in (("task", task, tuple(TASKS)), ("split", split, SPLITS)):
        if given not in known:
            raise ValueError(f"{name} {given!r} is not one of {', '.join(known)}")
    rng, seen = random.Random(f"{task} {seed} {split}"), set()
    while True:
        (problem,) = TASKS[task](rng, 1)
        if split_of(problem) != split or problem.line in seen:
            continue
        if split != "train":
            seen.add(problem.line)
        yield problem


def mixed(split: str, seed: int) -> Iterator[Problem]:
    """Yield problems of all nine tasks in turn, without end."""
    return itertools.chain.from_iterable(zip(*(problems(task, split, seed) for task in TASKS), strict=True))
