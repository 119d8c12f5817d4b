"""Reading and writing the files of an evaluation directory.

    run.json                          settings (model, data, protocol) and versions
    samples/POLICY/TASK.jsonl         one answer per line, appended by batch; a finished task has verdicts too
    samples/POLICY/TASK.jsonl.partN   answers of process N of several, until the first process joins them
    questions/TASK.jsonl              questions with their right answers or tests, so that answers can be graded again
    results.json, results.md          computed from the samples

A line of samples has `policy`, `task`, `question` (its id), `number`, `sample`, `prompt` (a hash), `verdict` (null
until the answer is graded), and the fields of `Generated` (text, token counts, depths, seconds). A graded line also has
the fields of `Graded`: gold, extracted, reason and grader. Answers to lm-eval's own tasks are not graded here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import differences, write_atomically
from ..processes import Processes
from ..progress import Work

LOCK = ".lock"
# Entries of run.json that may differ when a run is continued. `overrides` and `ours` only repeat values of `sampling`
# and `tasks`.
FACTS = ("tah", "model", "versions", "batch_size", "device", "started", "overrides", "ours")


@dataclass(frozen=True)
class Asked:
    """A request for one answer: sample number `sample` of the question `number` of the task's data."""

    task: str
    number: int
    sample: int
    prompt: str
    options: dict[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Generated:
    """An answer and its cost.

    Args:
        text: Text without prompt and special tokens, with the thoughts, and with the `<think>` or code block that the
            prompt opened.
        prompt_tokens: Number of tokens of the prompt.
        tokens: Number of generated tokens, with the end token.
        finished: Whether the answer ended before the limit.
        depths: Total number of passes that predicted the generated tokens.
        iterated: Number of generated tokens whose prediction took more than one pass.
        passes: Total number of passes of all input tokens, with those of the prompt. The last generated token is never
            an input.
        seconds: Share of the time of the batch.
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
    """Begin a run in a directory, or check that the run there has the same settings. Call it inside `alone`.

    Raises:
        ValueError: The directory has other files, or a run with other settings. The message names them.
    """
    path = directory / "run.json"
    if not path.exists():
        if any(entry.suffix != ".tmp" and entry.name != LOCK for entry in directory.iterdir()):
            raise ValueError(f"{directory} is not empty and has no evaluation; choose another directory")
        write_atomically(path, json.dumps(settings, indent=2) + "\n")
        return
    before, after = read_run(directory), json.loads(json.dumps(settings))
    unknown = () if "dtype" in before else ("dtype",)  # older runs do not have it
    if differs := differences(before, after, without=(*FACTS, *unknown)):
        raise ValueError(
            f"{directory} has an evaluation with {differs}; give the same settings, or choose another directory"
        )


@contextmanager
def alone(directory: Path, tidy: bool = True) -> Iterator[None]:
    """Lock the directory of a run against other processes. The directory is made if it does not exist.

    Args:
        directory: Directory of the run.
        tidy: Whether to remove a run without answers at the end.

    Raises:
        ValueError: Another process has the lock, or the directory cannot be written to.
    """
    if directory.is_file():
        raise ValueError(f"{directory} is a file; choose a directory for the results")
    fresh, lock = not directory.exists(), FileLock(directory / LOCK)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process evaluates into {directory}; wait for it, or choose another directory"
        ) from None
    except OSError as error:
        raise ValueError(f"{directory} cannot be written to ({error.strerror}); choose another directory") from error
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
    """Return the content of the `run.json` of an evaluation.

    Raises:
        ValueError: The file does not exist, or is damaged.
    """
    path = directory / "run.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no evaluation (no run.json); give the -o directory of tah eval")
    try:
        found = json.loads(path.read_text("utf-8"))
        if "tah" not in found:
            raise ValueError(
                f"{directory} has no evaluation (its run.json is not of tah eval); give the -o directory of tah eval"
            )
        if found["tah"] != 1:
            raise ValueError(f"{path} has format {found['tah']}; this version reads 1")
        for facts in found["tasks"].values():  # runs of versions without protocols
            facts.setdefault("samples", found["sampling"]["samples"])
        return {"backend": "transformers", "protocol": "default", "overrides": {}, "ours": {}} | found
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}); evaluate again into another directory"
        ) from error


# -- answers ---------------------------------------------------------------------------------------------------------


class Samples:
    """The answers of one policy to one task, in a file to which answers are appended.

    Of several processes, the first one appends to the file, and each of the others to a part of its own.

    Args:
        directory: Directory of the run.
        policy: Name of the policy.
        task: Name of the task.
        ids: Ids of the questions, by number.
        processes: Processes that share the answers. By default this process answers alone.

    Attributes:
        repaired: Note about an incomplete last line, or None.
        scores: Path of the metrics, for a task of lm-eval.
        work: Progress counter of new answers.

    Raises:
        ValueError: A line before the last is damaged.
    """

    def __init__(
        self,
        directory: Path,
        policy: str,
        task: str,
        ids: Sequence[str] = (),
        processes: Processes | None = None,
    ) -> None:
        self.path = directory / "samples" / policy / f"{task.replace(':', '.')}.jsonl"
        self.scores = self.path.with_suffix(".json")
        self.policy, self.task, self.ids, self.processes = policy, task, ids, processes or Processes()
        self.work: Work | None = None
        self.added = 0  # answers of this process in this call
        self.repaired: str | None = None
        self.size: int | None = None  # bytes of the complete lines; None if no incomplete line follows them
        self.lines: dict[tuple[int, int], dict[str, Any]] = {}  # by number and sample
        if self.path.exists():
            self.lines, size, self.repaired = _read(self.path)
            if self.repaired and self.processes.lead:
                self.size = size

    def find(self, asked: Asked) -> Generated | None:
        """Return the answer to a request, or None if the file does not have it.

        Raises:
            ValueError: The answer belongs to another prompt.
        """
        line = self.lines.get((asked.number, asked.sample))
        if line is not None and line["prompt"] != _hash(asked.prompt):
            raise ValueError(
                f"{self.path}: question {line['question']} was answered with another prompt (the chat template or the "
                "tokenizer has changed); choose another directory"
            )
        return None if line is None else _generated(line)

    def add(self, answers: Sequence[tuple[Asked, Generated]]) -> None:
        """Append answers. After a crash at most the last line is incomplete, and the next run repairs it."""
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
        path = self.path if self.processes.lead else part_of(self.path, self.processes.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.size is not None:
            os.truncate(path, self.size)
            self.size = None
        with open(path, "ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.added += len(answers)
        self._count(len(answers))

    def _count(self, answers: int) -> None:
        """Count new answers of this process, and show those of all processes."""
        if self.processes.world > 1:
            total = self.processes.add(f"answers of {self.policy} to {self.task}", answers)
            answers = 0 if self.work is None else total - (self.work.done - self.work.first)
        if self.work is not None:
            self.work.advance(answers)

    def join(self) -> None:
        """End the share of this process. The first process waits for the others, and joins their parts to the file.

        Raises:
            OtherProcessFailed: Another process has failed.
        """
        key = f"share of {self.policy} of {self.task} in process"
        if not self.processes.lead:
            self.processes.tell(f"{key} {self.processes.rank}", str(self.added))
            return
        for number in range(1, self.processes.world):
            added = int(self.processes.wait_for(f"{key} {number}", meanwhile=lambda: self._count(0)))
            part = part_of(self.path, number)
            there = partial(_has, part, added)
            self.processes.see(there, f"{part} lacks answers of process {number}")
        self._count(0)
        self.lines, *_ = _join(self.path)
        self.size = None

    @property
    def graders(self) -> set[str]:
        """Versions of the grader of all verdicts."""
        return {line.get("grader", "1") for line in self.lines.values() if line["verdict"] is not None}

    def graded(self, answers: int) -> bool:
        """Return whether the file has exactly this number of graded answers."""
        return sum(line["verdict"] is not None for line in self.lines.values()) == answers

    def grade(self, graded: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        """Add the fields of `Graded` to the answers, and sort the lines by question and sample.

        Args:
            graded: Fields of each sample of a question, by the question's number.
        """
        for (number, sample), line in self.lines.items():
            line.update(graded[number][sample])
        self.lines = dict(sorted(self.lines.items()))
        write_atomically(self.path, "".join(map(_line, self.lines.values())))


def facts_of_data(questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number and a hash of the questions of a task."""
    text = json.dumps(questions, sort_keys=True, default=str)
    return {"questions": len(questions), "data": hashlib.sha256(text.encode()).hexdigest()[:16]}


def write_questions(directory: Path, task: str, questions: Iterable[Mapping[str, Any]]) -> None:
    """Write the questions of a task into the directory of a run."""
    write_atomically(directory / "questions" / f"{task}.jsonl", "".join(map(_line, questions)))


def read_questions(directory: Path, task: str) -> list[dict[str, Any]] | None:
    """Return the questions of a task from the directory of a run; None for a run of a version that did not keep them.

    Raises:
        ValueError: The file is damaged.
    """
    path = directory / "questions" / f"{task}.jsonl"
    if not path.is_file():
        return None
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it, and give --data again") from error


# -- lines ------------------------------------------------------------------------------------------------------------


def join_parts(directory: Path) -> list[str]:
    """Join the parts that the processes of an earlier, killed call left in the directory of a run.

    Returns:
        Notes about incomplete last lines.
    """
    paths = {path.with_suffix("") for path in (directory / "samples").glob("*/*.jsonl.part*") if _is_part(path)}
    return [note for path in sorted(paths) for note in _join(path)[1]]


def part_of(path: Path, process: int) -> Path:
    """Return the path of the answers of a process other than the first."""
    return path.with_name(f"{path.name}.part{process}")


def _is_part(path: Path) -> bool:
    return re.fullmatch(r"\.part[0-9]+", path.suffix) is not None


def _join(path: Path) -> tuple[dict[tuple[int, int], dict[str, Any]], list[str]]:
    """Join the parts of a file of answers to it, in the order of questions and samples. The parts are removed.

    Returns:
        The lines by question and sample, and notes about incomplete last lines.

    Raises:
        ValueError: A line before the last of a file is damaged.
    """
    parts = [part for part in path.parent.glob(f"{path.name}.part*") if _is_part(part)]
    lines: dict[tuple[int, int], dict[str, Any]] = {}
    notes = []
    for each in (path, *parts):
        if each.exists():
            found, _, note = _read(each)
            lines = found | lines  # a graded line of the file itself counts before its copy in a part
            notes += [note] if note else []
    lines = dict(sorted(lines.items()))
    if parts:
        write_atomically(path, "".join(map(_line, lines.values())))
    for part in parts:
        part.unlink()
    return lines, notes


def _has(part: Path, answers: int) -> bool:
    """Return whether a part has this number of answers."""
    return not answers or (part.exists() and len(_read(part)[0]) >= answers)


def _read(path: Path) -> tuple[dict[tuple[int, int], dict[str, Any]], int, str | None]:
    """Return the lines of a file of answers, the size of its complete lines in bytes, and a note if there are others.

    Raises:
        ValueError: A line before the last is damaged.
    """
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")  # `rest` is an incomplete line, or empty
    size, kept = len(content) - len(rest), dict[tuple[int, int], dict[str, Any]]()
    for at, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            _generated(found)
            key, *_ = (found["number"], found["sample"]), found["prompt"], found["question"], found["verdict"]
            kept[key] = found
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if at < len(lines):
                raise ValueError(
                    f"{path} line {at} is damaged ({type(error).__name__}); delete that line, and tah eval "
                    "answers its question again"
                ) from error
            size -= len(line) + 1
    note = f"{path}: the last line is incomplete, so its question is answered again"
    return kept, size, note if size < len(content) else None


def _generated(line: Mapping[str, Any]) -> Generated:
    return Generated(**{field.name: line[field.name] for field in fields(Generated)})


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=str) + "\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
