"""Problems whose answer is one token that takes several steps to find, with no step written out.

A problem is a line of words; its answer is one more word. Families (`TASKS`):

    chain     "v3=v1 v5=s2 v1=s6 v3": variables defined by one another, shuffled; what is the last word worth? (s6)
    fold      "s3 s0 s5 s2": a fixed random operation, not associative, folded from the left
    compose   "s3 f0 f5 f2": fixed random permutations applied to a state, from left to right
    hops      "e3>e5 e1>e3 e5>e1 n2 e1": a cycle, shuffled; what is n steps after the last word? (e5)

    follow    "e3>e5 e5>e5 e1>e3 e1": where does one arrive, following the arrows until one leads to itself? (e5)

What `chain`, `hops` and `follow` need is in the line, and lines hardly ever repeat. Operation and permutations are
drawn with the seed and never shown: a model has to learn them. A hash of the line decides whether it is for training,
validation or test, so a held-out line is new.

The conversation is `line` -> "the value is Answer: <last word> <answer>": of seven tokens to produce one needs thought.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from tah.pipeline.experiment.tiny import SPECIAL, as_fast

LEAD = ("the", "value", "is", "Answer:")
MADE = len(LEAD) + 3  # supervised tokens of a row: the lead, the line's last word, the answer, the end
STATES, FUNCTIONS, VARIABLES, CHAINS, CYCLE, PLACES, ROOTS = 7, 7, 12, 3, 8, 16, 4
HELD_OUT = {0: "test", 1: "test", 2: "validation"}  # tenths of the hashes; the others are for training

Draw = Callable[[random.Random, int], tuple[list[str], str]]


@dataclass(frozen=True)
class Problem:
    """A line and its answer; `steps` operations, one after another, lead from one to the other."""

    line: str
    answer: str
    steps: int


@dataclass(frozen=True)
class Task:
    """A family of problems.

    Args:
        name: one of `TASKS`.
        seed: of what is fixed within the family, and of the problems drawn.
        steps: operations a problem may take, each as often.
    """

    name: str
    seed: int
    steps: tuple[int, ...]

    def problems(self, split: str, distinct: bool) -> Iterator[Problem]:
        """Problems of a split, without end where they may repeat.

        Args:
            distinct: every line once only; ends when no new one is found for long.
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
        """Raises `ValueError` where the family has fewer different problems."""
        found = [problem for problem, _ in zip(self.problems(split, distinct), range(count), strict=False)]
        if len(found) < count:
            raise ValueError(f"task {self.name} has only {len(found)} different {split} problems, not {count}")
        return found

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word, with the chat template of `tah run tiny`."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        states, variables = ([f"{letter}{number}" for number in range(count)] for letter, count in _WORDS[self.name])
        words = [*states, *variables]
        if self.name == "chain":
            words += [f"{variable}={word}" for variable in variables for word in [*variables, *states]]
        if self.name in ("hops", "follow"):
            words += [f"{one}>{other}" for one in states for other in states]
        vocabulary = {word: at for at, word in enumerate([*SPECIAL, *LEAD, *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(list(SPECIAL))
        return as_fast(tokenizer)


def split_of(line: str, steps: int) -> str:
    """What a problem is for. Lines of one step may be facts, which nobody knows untold: all are for training."""
    tenth = int.from_bytes(hashlib.sha256(line.encode()).digest()[:4], "big") % 10
    return "train" if steps == 1 and len(line.split()) == 2 else HELD_OUT.get(tenth, "train")


def chain(longest: int, fixed: random.Random) -> Draw:
    """`CHAINS` chains of `longest` variables each, so that neither length nor order tells the answer."""

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
    """One cycle through all words, so that no number of steps below `CYCLE` leads back; one hop is one lookup."""

    def draw(rng: random.Random, steps: int) -> tuple[list[str], str]:
        order = rng.sample(range(CYCLE), CYCLE)
        facts = [f"e{one}>e{order[at - CYCLE + 1]}" for at, one in enumerate(order)]
        rng.shuffle(facts)
        at = rng.randrange(CYCLE)
        return [*facts, f"n{steps}", f"e{order[at]}"], f"e{order[(at + steps) % CYCLE]}"

    return draw


def follow(longest: int, fixed: random.Random) -> Draw:
    """Trees of `longest` levels over `PLACES` words, as many words on each level. The line does not say how far it is:
    after one lookup one may have arrived or not."""

    def draw(rng: random.Random, steps: int) -> tuple[list[str], str]:
        order = rng.sample(range(PLACES), PLACES)
        width = (PLACES - ROOTS) // longest
        levels = [order[:ROOTS], *(order[ROOTS + at * width :][:width] for at in range(longest))]
        next_ = {root: root for root in levels[0]}
        for above, level in zip(levels, levels[1:], strict=False):
            next_ |= {place: rng.choice(above) for place in level}
        facts = [f"e{place}>e{target}" for place, target in next_.items()]
        rng.shuffle(facts)
        start = at = rng.choice(levels[steps])
        for _ in range(steps):
            at = next_[at]
        return [*facts, f"e{start}"], f"e{at}"

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
    """Problems as `data.Collator` takes them, equal to the tokenizer's own encoding of the conversation; held as one
    array of token ids, as there are many."""

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
        self.depth_labels: np.ndarray | None = None  # [rows, T], where a reference has labelled them

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, Any]:
        length = self.lengths[at]
        row = {"input_ids": self.ids[at, :length], "supervised": np.arange(length) >= length - MADE, "row": at}
        if self.depth_labels is not None:
            row["depth_labels"] = self.depth_labels[at, :length]
        return row


def question(problem: Problem) -> dict[str, Any]:
    """A problem as `scores.score_answers` takes it."""
    answer = f"{problem.line.split()[-1]} {problem.answer}"
    said = " ".join([*LEAD, answer])
    messages = [{"role": "user", "content": problem.line}, {"role": "assistant", "content": said}]
    return {"messages": messages, "answer": answer}
