"""Let `lookahead.py` and `measure.py` train and score one model on all nine tasks, or on some of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from . import TASKS, problems
from .problem import Problem
from .rows import Rows, question, tokenizer

PREFIX = "nine"
CHOICES = (PREFIX, *(f"{PREFIX}-{task}" for task in TASKS))  # values of `lookahead.py --task`


@dataclass(frozen=True)
class Mixture:
    """Represent the nine tasks in turn, with the methods of `tasks.Task`.

    Args:
        name: `nine` for all tasks, `nine-TASK` for one.
        seed: Random seed of the problems.
    """

    name: str
    seed: int

    @property
    def members(self) -> tuple[str, ...]:
        """Return the names of the tasks."""
        _, _, only = self.name.partition("-")
        return (only,) if only else tuple(TASKS)

    def problems(self, split: str, distinct: bool) -> Iterator[Problem]:
        """Yield problems of a split, the tasks in turn, without end.

        Args:
            split: `train`, `validation` or `test`. Lines of the last two occur once only.
            distinct: Yield each line once only.
        """
        every = zip(*(problems(task, split, self.seed) for task in self.members), strict=True)
        seen: set[str] = set()
        for problem in itertools.chain.from_iterable(every):
            if distinct:
                if problem.line in seen:
                    continue
                seen.add(problem.line)
            yield problem

    def take(self, split: str, count: int, distinct: bool) -> list[Problem]:
        """Return `count` problems of a split."""
        return list(itertools.islice(self.problems(split, distinct), count))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer that all nine tasks share."""
        return tokenizer()

    def rows(self, problems: Iterable[Problem], tokenizer: PreTrainedTokenizerFast) -> Rows:
        """Return the rows of the problems for the trainer."""
        return Rows(problems)

    def question(self, problem: Problem) -> dict[str, Any]:
        """Return a problem in the format of `scores.score_answers`, for `read=str.strip`."""
        return question(problem)
