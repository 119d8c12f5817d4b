"""Questions of the benchmarks, from the Hub or a local JSONL file, and lm-eval's call of the grader.

Each kind of task has one schema, in memory and in a file (`id` is optional):

    math     {"id", "question", "answer"}                   answer: LaTeX or plain
    choice   {"id", "question", "choices": [...], "answer"}    answer: the letter, A for the first
    code     {"id", "prompt", "entry_point", "test"}           as in HumanEval; or "test_list", "code" as in MBPP
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
    """Return the questions of a task. lm-eval calls this as its `custom_dataset`.

    Args:
        name: Name of the task, without prefix.
        kind: Kind of the task, which determines the schema.
        hub: Hub id of the dataset.
        split: Split of the dataset.
        read: Function from a row of the Hub to the schema. None as its result leaves out the row.
        subsets: Configurations of the dataset, in order.
        data: Local files by task name, used instead of the Hub.
        sources: Other values of `hub`, `split`, `read` and `subsets`, by task name.
        others: Other metadata of the task; unused.

    Raises:
        ValueError: A row does not have the schema, or the dataset cannot be loaded.
    """
    if name in (sources or {}):
        return load(name=name, kind=kind, data=data, **(sources or {})[name])
    if name in (data or {}):
        rows = read_file(Path((data or {})[name]), kind)
    else:
        try:
            found = [row for subset in subsets for row in load_dataset(hub, subset, split=split)]
        except Exception as error:  # the Hub, the network and the cache raise many types
            raise ValueError(
                f"task {name}: {hub} cannot be loaded ({first_line(error)}); give a file: --data {name}=FILE.jsonl"
            ) from error
        rows = [row for row in map(read, found) if row is not None]
        for number, row in enumerate(rows):
            check(row, kind, f"{hub} row {number}")
    filled = [complete_row(row, kind, number) for number, row in enumerate(rows)]
    if twice := [row for row, times in Counter(row["id"] for row in filled).items() if times > 1]:
        raise ValueError(
            f"task {name}: two questions have the id {twice[0]!r}; give each question a different id (without an "
            "id, a question has its number, from 0)"
        )
    return {"test": Dataset.from_list(filled)}


def read_file(path: Path, kind: Kind) -> list[Row]:
    """Return the rows of a JSONL file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: The file cannot be read, or a line does not have the schema. The message names the line.
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
            raise ValueError(f"{path} line {number} {error}; write one question per line") from error
        check(row, kind, f"{path} line {number}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no questions")
    return rows


def check(row: Any, kind: Kind, where: str) -> None:
    """Check that a row has the schema.

    Args:
        row: Row to check.
        kind: Kind of the task.
        where: Place of the row in messages.

    Raises:
        ValueError: The row does not have the schema. The message names the place and the reason.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object of {', '.join(FIELDS[kind])}")
    needed = ("prompt",) if kind == "code" else FIELDS[kind]
    for field in needed:
        if not (row.get(field) or row.get(field) == 0):
            raise ValueError(f"{where} has no {field!r}; a question of kind {kind} has {', '.join(FIELDS[kind])}")
    _check_fields(row, kind, where)
    if not isinstance(row.get("id", ""), str | int) or isinstance(row.get("id"), bool):
        raise ValueError(f"{where}: id {short(row['id'])} is neither a string nor an integer")
    if kind == "math":
        answer = row["answer"]
        number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
        if not isinstance(answer, str) and not number:
            raise ValueError(f"{where}: answer {short(answer)} is neither a string nor a number")
        try:
            read_math(str(row["answer"]).strip())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if kind == "code" and not (row.get("test") or row.get("test_list")):
        raise ValueError(f"{where} has no tests: give 'test' or 'test_list'")
    if kind == "choice":
        _check_choices(row["choices"], row["answer"], where)


def _check_fields(row: Row, kind: Kind, where: str) -> None:
    """Check that the fields of prompts and programs are strings. An empty field counts as missing."""
    for field in set(FIELDS[kind]) - {"answer", "choices"}:
        value = row.get(field)
        if value and field in LISTS and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise ValueError(f"{where}: {field} {short(value)} is not a list of strings")
        if value and field not in LISTS and not isinstance(value, str):
            raise ValueError(f"{where}: {field} {short(value)} is not a string")


def _check_choices(choices: Any, answer: Any, where: str) -> None:
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: choices must be a list of 2 to {len(LETTERS)} entries")
    if wrong := [each for each in choices if isinstance(each, bool) or not isinstance(each, str | int | float)]:
        raise ValueError(f"{where}: choice {short(wrong[0])} is neither a string nor a number")
    letters = LETTERS[: len(choices)]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        hint = "" if isinstance(answer, str) else "; a number could count from 0 or from 1"
        raise ValueError(f"{where}: answer {short(answer)} is not one of the letters {letters}{hint}")


def complete_row(row: Row, kind: Kind, number: int) -> Row:
    """Return a row with all fields of the schema, because all rows of a dataset need the same fields."""
    empty: Row = {"choices": [], "test_list": [], "test_imports": []}
    filled = {field: row.get(field) or empty.get(field, "") for field in FIELDS[kind]}
    if kind == "choice":
        filled["choices"] = [str(choice) for choice in filled["choices"]]
    if kind == "math":
        answer = str(row["answer"]).strip()
        bare = answer.strip("$")
        filled["answer"] = answer if "$" in bare else bare  # "$1$ and $-2$" keeps its dollar signs
    return {"id": str(row.get("id", row.get("task_id", number)))} | filled


# -- rows of the Hub -------------------------------------------------------------------------------------------------


def plain(row: Row) -> Row:
    """Return a row of a mathematical dataset, whose fields are `question` or `problem`, and `answer`, in any case."""
    names = {name.lower(): value for name, value in row.items()}
    return {"question": names.get("question") or names.get("problem"), "answer": names.get("answer")}


def gsm8k(row: Row) -> Row:
    """Return a row of GSM8K. The answer follows `####` in the solution."""
    return {"question": row["question"], "answer": row["answer"].rsplit("####", 1)[-1].strip()}


def olympiadbench(row: Row) -> Row:
    """Return a row of OlympiadBench. Its answers are a list, usually with one entry, which may have several values."""
    return {"question": row["question"], "answer": ", ".join(answer.strip("$ ") for answer in row["final_answer"])}


def gpqa(row: Row) -> Row:
    """Return a row of GPQA with its choices shuffled by the question as seed. In the data the right choice is first."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    order = random.Random(row["Question"]).sample(range(4), 4)
    choices = [row[names[at]].strip() for at in order]
    return {"question": row["Question"], "choices": choices, "answer": LETTERS[order.index(0)]}


def mmlu(row: Row) -> Row | None:
    """Return a row of MMLU or MMLU-Redux; None for a question of MMLU-Redux whose annotators found an error."""
    if row.get("error_type", "ok") != "ok":
        return None
    return {"question": row["question"], "choices": row["choices"], "answer": LETTERS[int(row["answer"])]}


def arc(row: Row) -> Row:
    """Return a row of ARC. A few questions have numbers instead of letters as labels of the choices."""
    answer = LETTERS[row["choices"]["label"].index(row["answerKey"])]
    return {"question": row["question"], "choices": row["choices"]["text"], "answer": answer}


def program(row: Row) -> Row:
    """Return a row of HumanEval+ or MBPP+ unchanged."""
    return row


# -- answers ---------------------------------------------------------------------------------------------------------


def kind_of(row: Row) -> Kind:
    """Return the kind of a question from `load`."""
    return "code" if "prompt" in row else "choice" if "choices" in row else "math"


def results(doc: Row, results: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Grade the answers to a question for lm-eval. `results` contains one list with all samples of the question."""
    graded = [asdict(answer) for answer in grade(kind_of(doc), doc, results[0])]
    share = {
        verdict: sum(its["verdict"] == verdict for its in graded) / len(graded) for verdict in ("right", "unparsed")
    }
    return {"acc": share["right"], "unparsed": share["unparsed"], "graded": graded}


def count(graded: Sequence[Sequence[Any]]) -> int:
    """Return the number of graded answers."""
    return sum(map(len, graded))
