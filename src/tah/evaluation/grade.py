"""Grading of answers to a question of any kind, with what each verdict rests on."""

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

# Rises with every change that can change a verdict. 1 graded the answers whose lines name no grader.
GRADER = 2
sandbox = functools.cache(Sandbox)
LONGEST_GOLD = 2000  # characters; the tests of a program may have megabytes, and are in the file of the questions


@dataclass(frozen=True)
class Graded:
    """The grade of one answer, and what is needed to see why.

    Args:
        verdict: right, wrong, unparsed or untestable.
        gold: the right answer; of a program its tests, of which the beginning is kept.
        extracted: what was found in the answer and compared; None where nothing was found.
        reason: one line, where the verdict does not follow from `extracted` beside `gold`.
        grader: the version of the grader, see `grader`.
    """

    verdict: Grade
    gold: str
    extracted: str | None
    reason: str | None
    grader: str


@functools.cache
def grader() -> str:
    """The version of the grader; results of two versions are not compared."""
    return f"{GRADER} (math-verify {version('math-verify')})"


def grade(kind: Kind, row: Mapping[str, Any], texts: Sequence[str]) -> Iterator[Graded]:
    """Grade answers to a question.

    Args:
        kind: of the question.
        row: the question, as `tah.evaluation.tasks.rows.load` returns it.
        texts: the answers, with their thoughts.

    Raises:
        ValueError: a program cannot be run in a sandbox here.
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
    row = {"task_id": row.get("id", "an item")} | dict(row)  # what reasons call it
    for text, found in zip(texts, grade_all([row] * len(texts), texts, sandbox()), strict=True):
        code = extract_code(text, entry_point_of(row)).strip("\n") or None
        reason = found.reason if found.status in ("passed", "wrong") else f"{found.status}: {found.reason}"
        yield Graded(grades.get(found.status, "wrong"), gold[:LONGEST_GOLD], code, reason or None, grader())
