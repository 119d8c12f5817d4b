"""Grading of answers to questions of any kind, with the reason of each verdict."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from .answers import judge_math
from .code_tasks import entry_point_of, extract_code, grade_all
from .grading.choice import judge_choice
from .grading.reply import Grade
from .sandbox import Sandbox

Kind = Literal["math", "choice", "code"]

# Raise this number with every change that can change a verdict. Version 1 graded the answers that name no grader.
GRADER = 2
sandbox = functools.cache(Sandbox)
LONGEST_GOLD = 2000  # characters; tests of a program may have megabytes, and the file of the questions has them too


@dataclass(frozen=True)
class Graded:
    """The grade of one answer, with its reason.

    Args:
        verdict: `right`, `wrong`, `unparsed` or `untestable`.
        gold: Right answer. For a program the beginning of its tests.
        extracted: Part of the answer that was compared; None if the grader found none.
        reason: Reason in one line; None if the verdict follows from `extracted` and `gold`.
        grader: Version of the grader, from `grader()`.
    """

    verdict: Grade
    gold: str
    extracted: str | None
    reason: str | None
    grader: str


@functools.cache
def grader() -> str:
    """Return the version of the grader. Results of two versions cannot be compared."""
    return f"{GRADER} (math-verify {version('math-verify')})"


def grade(kind: Kind, row: Mapping[str, Any], texts: Sequence[str]) -> Iterator[Graded]:
    """Yield the grade of each answer to a question.

    Args:
        kind: Kind of the question.
        row: Question, as `tah.evaluation.tasks.rows.load` returns it.
        texts: Answers, with their thoughts.

    Raises:
        ValueError: The question is a code task, and this machine has no sandbox.
    """
    if kind == "code":
        yield from _programs(row, texts)
        return
    gold = str(row["answer"])
    for text in texts:
        found = judge_math(gold, text) if kind == "math" else judge_choice(gold, text, len(row["choices"]))
        yield Graded(found.grade, gold, found.extracted, found.reason, grader())


def _programs(row: Mapping[str, Any], texts: Sequence[str]) -> Iterator[Graded]:
    grades: dict[str, Grade] = {"passed": "right", "no code": "unparsed", "untestable": "untestable"}
    gold = row["test"] or "\n".join(row["test_list"])
    row = {"task_id": row.get("id", "an item")} | dict(row)  # the name of the item in reasons
    for text, found in zip(texts, grade_all([row] * len(texts), texts, sandbox()), strict=True):
        code = extract_code(text, entry_point_of(row)).strip("\n") or None
        reason = found.reason if found.status in ("passed", "wrong") else f"{found.status}: {found.reason}"
        yield Graded(grades.get(found.status, "wrong"), gold[:LONGEST_GOLD], code, reason or None, grader())
