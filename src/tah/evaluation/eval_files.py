"""What an evaluation leaves in its directory, and how it is read back.

    run.json                      what was asked: model, data, protocol; and versions
    samples/POLICY/TASK.jsonl     an answer a line, appended batch by batch; verdicts are added when a task is done
    questions/TASK.jsonl          the questions with their right answers or tests, so that answers can be graded again
    results.json, results.md      made from the samples

A line has `policy`, `task`, `question` (its id), `number`, `sample`, `prompt` (a hash), `verdict` (null until it is
graded), the fields of [`Generated`] (text, token counts, depths, seconds), and from when it is graded those of
[`Graded`]: gold, extracted, reason and grader. Answers to lm-eval's own tasks are not graded here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import differences, write_atomically
from ..progress import Work

LOCK = ".lock"
# Entries of run.json that may differ when a run is continued. `overrides` and `ours` only name what `sampling` and
# `tasks` hold.
FACTS = ("tah", "model", "versions", "batch_size", "device", "started", "overrides", "ours")


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted: the sample-th to a question, by its number in the task's data."""

    task: str
    number: int
    sample: int
    prompt: str
    options: dict[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Generated:
    """An answer and what it cost.

    Args:
        text: without prompt and special tokens; with thoughts, and the <think> or code block that the prompt opened.
        prompt_tokens: of the prompt.
        tokens: produced, an end token included.
        finished: it ended by itself, not at the limit.
        depths: passes that predicting the `tokens` took together.
        iterated: how many of them took more than one.
        passes: of all tokens that ran, those of the prompt included; the last one produced never ran.
        seconds: its share of its batch's time.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finished: bool
    depths: int
    iterated: int
    passes: int
    seconds: float


# -- the run ---------------------------------------------------------------------------------------------------------


def open_run(directory: Path, settings: dict[str, Any]) -> None:
    """Begin a run, or continue the one that is there; within `alone`.

    Raises:
        ValueError: it holds something else, or a run with other settings; says which.
    """
    path = directory / "run.json"
    if not path.exists():
        if any(entry.suffix != ".tmp" and entry.name != LOCK for entry in directory.iterdir()):
            raise ValueError(f"{directory} is not empty and holds no evaluation; choose another directory")
        write_atomically(path, json.dumps(settings, indent=2) + "\n")
        return
    before, after = read_run(directory), json.loads(json.dumps(settings))
    unknown = () if "dtype" in before else ("dtype",)  # older runs did not record it
    if differs := differences(before, after, without=(*FACTS, *unknown)):
        raise ValueError(f"{directory} holds an evaluation with {differs}; give the same, or another directory")


@contextmanager
def alone(directory: Path, tidy: bool = True) -> Iterator[None]:
    """Keep other processes out of a run's directory, which is made if need be.

    Args:
        directory: of the run.
        tidy: remove a run in which there is no answer to keep.

    Raises:
        ValueError: another one is in it, or it cannot be written to.
    """
    if directory.is_file():
        raise ValueError(f"{directory} is a file; give a directory for the results")
    fresh, lock = not directory.exists(), FileLock(directory / LOCK)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process evaluates into {directory}; wait for it or choose another") from None
    except OSError as error:
        raise ValueError(f"{directory} cannot be written to ({error.strerror}); choose another") from error
    try:
        yield
    finally:
        lock.release()
        if tidy and {path.name for path in directory.iterdir()} <= {LOCK, "run.json", "questions"}:
            shutil.rmtree(directory / "questions", ignore_errors=True)
            for name in (LOCK, "run.json"):
                (directory / name).unlink(missing_ok=True)
            if fresh:
                directory.rmdir()


def read_run(directory: Path) -> dict[str, Any]:
    """`run.json` of an evaluation.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = directory / "run.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no evaluation (no run.json); give the -o directory of tah eval")
    try:
        found = json.loads(path.read_text("utf-8"))
        if "tah" not in found:
            raise ValueError(f"{directory} holds no evaluation (its run.json is another's); give a tah eval directory")
        if found["tah"] != 1:
            raise ValueError(f"{path} has format {found['tah']}; this version reads 1")
        for facts in found["tasks"].values():  # runs from before there were protocols
            facts.setdefault("samples", found["sampling"]["samples"])
        return {"backend": "transformers", "protocol": "default", "overrides": {}, "ours": {}} | found
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}); evaluate again into another directory"
        ) from error


# -- answers ---------------------------------------------------------------------------------------------------------


class Samples:
    """The answers of one policy to one task, in a file that grows.

    Args:
        directory: of the run.
        policy: its name.
        task: its name.
        ids: of the questions, by number.

    Attributes:
        repaired: what was wrong with the file, in a line.
        scores: the file for the metrics of one of lm-eval's own tasks.
        work: counts new answers.

    Raises:
        ValueError: a line other than the last is damaged.
    """

    def __init__(self, directory: Path, policy: str, task: str, ids: Sequence[str] = ()) -> None:
        self.path = directory / "samples" / policy / f"{task.replace(':', '.')}.jsonl"
        self.scores = self.path.with_suffix(".json")
        self.policy, self.task, self.ids = policy, task, ids
        self.work: Work | None = None
        self.repaired: str | None = None
        self.size: int | None = None  # of the whole lines, where something follows them
        self.lines: dict[tuple[int, int], dict[str, Any]] = {}  # by number and sample
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        *lines, rest = content.split(b"\n")  # what follows the last newline was interrupted
        size = len(content) - len(rest)
        for at, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
                _generated(found)
                key, *_ = (found["number"], found["sample"]), found["prompt"], found["question"], found["verdict"]
                self.lines[key] = found
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if at < len(lines):
                    raise ValueError(
                        f"{self.path} line {at} is damaged ({type(error).__name__}); delete that line to have it "
                        "answered again"
                    ) from error
                size -= len(line) + 1
        if size < len(content):
            self.repaired = f"{self.path}: the last line was cut short and is answered again"
            self.size = size

    def find(self, asked: Asked) -> Generated | None:
        """The answer, if it is there.

        Raises:
            ValueError: it was given to another prompt.
        """
        line = self.lines.get((asked.number, asked.sample))
        if line is not None and line["prompt"] != _hash(asked.prompt):
            raise ValueError(
                f"{self.path}: question {line['question']} was asked with another prompt (chat template or tokenizer "
                "changed); choose another directory"
            )
        return None if line is None else _generated(line)

    def add(self, answers: Sequence[tuple[Asked, Generated]]) -> None:
        """Append answers. A crash leaves a last line that is cut short at most, and that is repaired."""
        text = ""
        for asked, answer in answers:
            line = {
                "policy": self.policy,
                "task": self.task,
                "question": self.ids[asked.number],
                "number": asked.number,
                "sample": asked.sample,
                "prompt": _hash(asked.prompt),
                "verdict": None,
                **asdict(answer),
            }
            self.lines[asked.number, asked.sample] = line
            text += _line(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.size is not None:
            os.truncate(self.path, self.size)
            self.size = None
        with open(self.path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if self.work is not None:
            self.work.advance(len(answers))

    @property
    def graders(self) -> set[str]:
        """The versions of the grader that gave the verdicts."""
        return {line.get("grader", "1") for line in self.lines.values() if line["verdict"] is not None}

    def graded(self, answers: int) -> bool:
        """Whether so many are there and graded."""
        return sum(line["verdict"] is not None for line in self.lines.values()) == answers

    def grade(self, graded: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        """Write down the fields of `Graded` for the samples of each question, by number; the lines are in their order
        then."""
        for (number, sample), line in self.lines.items():
            line.update(graded[number][sample])
        self.lines = dict(sorted(self.lines.items()))
        write_atomically(self.path, "".join(map(_line, self.lines.values())))


def facts_of_data(questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tells the questions of a task from others: their number and a hash."""
    text = json.dumps(questions, sort_keys=True, default=str)
    return {"questions": len(questions), "data": hashlib.sha256(text.encode()).hexdigest()[:16]}


def write_questions(directory: Path, task: str, questions: Iterable[Mapping[str, Any]]) -> None:
    """Keep the questions of a task beside the answers."""
    write_atomically(directory / "questions" / f"{task}.jsonl", "".join(map(_line, questions)))


def read_questions(directory: Path, task: str) -> list[dict[str, Any]] | None:
    """The questions that were kept; None in a run of before they were.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / "questions" / f"{task}.jsonl"
    if not path.is_file():
        return None
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it, and give the data again") from error


def _generated(line: Mapping[str, Any]) -> Generated:
    return Generated(**{field.name: line[field.name] for field in fields(Generated)})


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=str) + "\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
