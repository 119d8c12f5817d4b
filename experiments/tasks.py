"""Make problems whose answer is one token and takes several steps, none of which is written out.

A problem is a line of words; its answer is one more word. Families (`TASKS`):

    chain     "v3=v1 v5=s2 v1=s6 v3": shuffled definitions of variables; the answer is the value of the last one (s6)
    fold      "s3 s0 s5 s2": a fixed random operation, not associative, folded from the left
    compose   "s3 f0 f5 f2": fixed random permutations applied to a state, from left to right
    hops      "e3>e5 e1>e3 e5>e1 n2 e1": a cycle, shuffled; the answer is the word n steps after the last one (e5)
    follow    "e3>e5 e5>e5 e1>e3 e1": arrows, followed from the last word to one that leads to itself; answer e5

For `chain`, `hops` and `follow` the line contains all that the answer depends on, and lines hardly ever repeat. The
operation of `fold` and the permutations of `compose` are drawn with the seed and never shown, so a model has to learn
them. A hash of the line determines its split: training, validation or test. So no held-out line is in the training.

The conversation is `line` -> "the value is Answer: <last word> <answer>". Of seven tokens to produce, one is hard.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from tah.pipeline.experiment import arrows
from tah.pipeline.experiment.tiny import SPECIAL, word_tokenizer

LEAD = ("the", "value", "is", "Answer:")
MADE = len(LEAD) + 3  # supervised tokens of a row: lead, last word of the line, answer, end
STATES, FUNCTIONS, VARIABLES, CHAINS, CYCLE, PLACES, ROOTS = 7, 7, 12, 3, 8, 16, 4
HELD_OUT = {0: "test", 1: "test", 2: "validation"}  # tenths of the hashes; the others are for training

Draw = Callable[[random.Random, int], tuple[list[str], str]]


@dataclass(frozen=True)
class Problem:
    """Represent a line, its answer, and the number of operations that lead from the line to the answer."""

    line: str
    answer: str
    steps: int


@dataclass(frozen=True)
class Task:
    """Represent a family of problems.

    Args:
        name: Key of `TASKS`.
        seed: Random seed of the fixed part of the family and of the problems.
        steps: Possible numbers of operations, drawn with equal odds; a number may occur several times.
    """

    name: str
    seed: int
    steps: tuple[int, ...]

    def problems(self, split: str, distinct: bool) -> Iterator[Problem]:
        """Yield problems of a split; the iterator does not end if lines may repeat.

        Args:
            split: `train`, `validation` or `test`.
            distinct: Yield each line once only, and end after 10,000 draws without a new line.
        """
        draw = TASKS[self.name](max(self.steps), random.Random(f"{self.seed} fixed"))
        rng, seen, misses = random.Random(f"{self.seed} {split}"), set(), 0
        while misses < 10_000:
            steps = rng.choice(self.steps)
            words, answer = draw(rng, steps)
            line = " ".join(words)
            if split_of(line, steps) != split or (distinct and line in seen):
                misses += 1
                continue
            if distinct:
                seen.add(line)
            misses = 0
            yield Problem(line, answer, steps)

    def take(self, split: str, count: int, distinct: bool) -> list[Problem]:
        """Return `count` problems of a split.

        Raises:
            ValueError: The family has fewer different problems.
        """
        found = [problem for problem, _ in zip(self.problems(split, distinct), range(count), strict=False)]
        if len(found) < count:
            raise ValueError(f"task {self.name} has only {len(found)} different {split} problems, not {count}")
        return found

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with one token per word and the chat template of `tah run tiny`."""
        states, variables = ([f"{letter}{number}" for number in range(count)] for letter, count in _WORDS[self.name])
        words = [*states, *variables]
        if self.name == "chain":
            words += [f"{variable}={word}" for variable in variables for word in [*variables, *states]]
        if self.name in ("hops", "follow"):
            words += [f"{one}>{other}" for one in states for other in states]
        return word_tokenizer([*LEAD, *words])

    def rows(self, problems: Iterable[Problem], tokenizer: PreTrainedTokenizerFast) -> Rows:
        """Return the rows of the problems for the trainer."""
        return Rows(list(problems), tokenizer)

    def question(self, problem: Problem) -> dict[str, Any]:
        """Return a problem in the format of `scores.score_answers`."""
        return question(problem)


def split_of(line: str, steps: int) -> str:
    """Return the split of a line.

    A line of one step may be a fact that no model can derive, so all such lines are for training.
    """
    tenth = int.from_bytes(hashlib.sha256(line.encode()).digest()[:4], "big") % 10
    return "train" if steps == 1 and len(line.split()) == 2 else HELD_OUT.get(tenth, "train")


def chain(longest: int, fixed: random.Random) -> Draw:
    """Draw `CHAINS` chains of `longest` variables each, so that neither length nor order reveals the answer."""

    def draw(rng: random.Random, steps: int) -> tuple[list[str], str]:
        names, values = rng.sample(range(VARIABLES), CHAINS * longest), rng.sample(range(STATES), CHAINS)
        definitions = []
        for number, value in enumerate(values):
            before = f"s{value}"
            for name in names[number * longest : (number + 1) * longest]:
                definitions.append(f"v{name}={before}")
                before = f"v{name}"
        rng.shuffle(definitions)
        return [*definitions, f"v{names[steps - 1]}"], f"s{values[0]}"

    return draw


def fold(longest: int, fixed: random.Random) -> Draw:
    operation = [fixed.choices(range(STATES), k=STATES) for _ in range(STATES)]

    def draw(rng: random.Random, steps: int) -> tuple[list[str], str]:
        operands = rng.choices(range(STATES), k=steps + 1)
        value = operands[0]
        for operand in operands[1:]:
            value = operation[value][operand]
        return [f"s{operand}" for operand in operands], f"s{value}"

    return draw


def compose(longest: int, fixed: random.Random) -> Draw:
    functions = [fixed.sample(range(STATES), STATES) for _ in range(FUNCTIONS)]

    def draw(rng: random.Random, steps: int) -> tuple[list[str], str]:
        state, chosen = rng.randrange(STATES), rng.choices(range(FUNCTIONS), k=steps)
        words = [f"s{state}", *(f"f{number}" for number in chosen)]
        for number in chosen:
            state = functions[number][state]
        return words, f"s{state}"

    return draw


def hops(longest: int, fixed: random.Random) -> Draw:
    """Draw one cycle through all words: no number of steps below `CYCLE` leads back, and one hop is one lookup."""

    def draw(rng: random.Random, steps: int) -> tuple[list[str], str]:
        order = rng.sample(range(CYCLE), CYCLE)
        facts = [f"e{one}>e{order[at - CYCLE + 1]}" for at, one in enumerate(order)]
        rng.shuffle(facts)
        at = rng.randrange(CYCLE)
        return [*facts, f"n{steps}", f"e{order[at]}"], f"e{order[(at + steps) % CYCLE]}"

    return draw


def follow(longest: int, fixed: random.Random) -> Draw:
    """Draw trees of `longest` levels over `PLACES` words, with as many words on each level.

    The line does not contain the number of lookups: the first lookup may or may not reach the answer.
    """

    widths = [ROOTS, *[(PLACES - ROOTS) // longest] * longest]

    def draw(rng: random.Random, steps: int) -> tuple[list[str], str]:
        return arrows.follow(rng, PLACES, widths, steps)

    return draw


TASKS = {"chain": chain, "fold": fold, "compose": compose, "hops": hops, "follow": follow}
_WORDS = {
    "chain": (("s", STATES), ("v", VARIABLES)),
    "fold": (("s", STATES), ("v", 0)),
    "compose": (("s", STATES), ("f", FUNCTIONS)),
    "hops": (("e", CYCLE), ("n", CYCLE)),
    "follow": (("e", PLACES), ("n", 0)),
}


class Rows(Dataset):
    """Encode problems for `data.rows.Collator`, equal to the tokenizer's encoding of the conversation.

    One array of token ids contains all rows, because there are many.
    """

    def __init__(self, problems: list[Problem], tokenizer: PreTrainedTokenizerFast) -> None:
        ids = tokenizer.get_vocab()
        _, user, assistant, end = (ids[word] for word in SPECIAL)
        lead = [ids[word] for word in LEAD]
        rows = []
        for problem in problems:
            line = [ids[word] for word in problem.line.split()]
            rows.append([user, *line, assistant, *lead, line[-1], ids[problem.answer], end])
        self.lengths = np.array([len(row) for row in rows])
        self.ids = np.zeros((len(rows), int(self.lengths.max(initial=0))), np.int16)
        for at, row in enumerate(rows):
            self.ids[at, : len(row)] = row
        self.depth_labels: np.ndarray | None = None  # [rows, T]; None without a reference model

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, Any]:
        length = self.lengths[at]
        row = {"input_ids": self.ids[at, :length], "supervised": np.arange(length) >= length - MADE, "row": at}
        if self.depth_labels is not None:
            row["depth_labels"] = self.depth_labels[at, :length]
        return row


def question(problem: Problem) -> dict[str, Any]:
    """Return a problem in the format of `scores.score_answers`."""
    answer = f"{problem.line.split()[-1]} {problem.answer}"
    reply = " ".join([*LEAD, answer])
    messages = [{"role": "user", "content": problem.line}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "answer": answer}
