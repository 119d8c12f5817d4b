"""Let `lookahead.py` and `measure.py` train and score one model on all nine tasks, or on some of them."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from . import TASKS, problems
from .problem import Problem
from .rows import Rows, question, tokenizer

PREFIX = "nine"
SHARDS, APART = 8, 1_000_003  # seeds per task with several processes, and their distance
CHOICES = (PREFIX, *(f"{PREFIX}-{task}" for task in TASKS))  # values of `lookahead.py --task`


@dataclass(frozen=True)
class Mixture:
    """Represent the nine tasks in turn, with the methods of `tasks.Task`.

    Args:
        name: `nine` for all tasks, `nine-TASK` for one.
        seed: Random seed of the problems.
        processes: Processes that draw training problems. With more than one, they are drawn once per process of the
            caller, a task has `SHARDS` seeds, the first of which is `seed`, and the rows are in a random order.
        drawn: Number of problems that several processes draw, at least; more rows repeat them.
    """

    name: str
    seed: int
    processes: int = 1
    drawn: int = 0

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

    def training(self, counts: Sequence[int]) -> list[Rows]:
        """Return training rows, the next problems for each of `counts`."""
        if self.processes == 1:
            stream = self.problems("train", distinct=False)
            return [Rows(itertools.islice(stream, count)) for count in counts]
        every = _drawn_by_many(self)
        order = np.resize(np.random.default_rng(self.seed).permutation(len(every)), sum(counts))
        ends = list(itertools.accumulate(counts))
        return [Rows.joined([every], order[end - count : end]) for count, end in zip(counts, ends, strict=True)]

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


@lru_cache(maxsize=1)
def _drawn_by_many(mixture: Mixture) -> Rows:
    jobs = [(task, mixture.seed + APART * shard) for task in mixture.members for shard in range(SHARDS)]
    each = max(1, -(-mixture.drawn // len(jobs)))
    with multiprocessing.get_context("spawn").Pool(mixture.processes) as pool:
        parts = pool.starmap(_drawn, [(*job, each) for job in jobs], chunksize=1)
    return Rows.joined(parts, np.arange(each * len(jobs)))


def _drawn(task: str, seed: int, count: int) -> Rows:
    return Rows(itertools.islice(problems(task, "train", seed), count))
