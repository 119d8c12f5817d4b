"""Make the steps of a recipe in one directory.

A finished step is skipped. A step whose inputs have changed is made again, and a note gives the reason.

    DIR/recipe.yaml         every field of the recipe, from the latest call
    DIR/steps/<step>.json   the inputs of the step's result, and whether the result is complete
    DIR/<step>/             the result
    DIR/old/                results that do not match the recipe

The fingerprint of a step covers the fields of the recipe that the step reads, the fingerprints of the steps that it
needs, the seed and `RESULTS`. Under torchrun the first process keeps the records. The other processes wait for it, and
take part in steps that all processes make together.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..checkpoints.contents import sizes_of, wrong
from ..config import FORMER_FIELDS
from ..errors import short
from ..files import write_atomically
from ..progress import SILENT, Reporter
from ..training.recipe import Recipe

FORMER_NAMES = {now: before for before, now in FORMER_FIELDS.items()}

RESULTS = "0.1.0"  # the first version whose steps give these results; raise it when the result of a step changes
POLL = 0.2  # seconds between checks of another process's progress


@dataclass(frozen=True)
class Step:
    """One step of a chain.

    Args:
        name: Name of the step and of its record.
        directory: Directory of the result, relative to the run's directory.
        make: Function that makes the result, called with the recipe, the run's directory and a reporter.
        reads: Fields of the recipe that the result depends on, as a flat dictionary.
        needs: Names of the steps whose results this step reads.
        together: Whether every process takes part; otherwise only the first process does.
        resumes: Whether the step continues an unfinished result; otherwise that result is removed first.
        single: Whether the step trains in one process only. Under torchrun such a step raises ValueError, because its
            training would wait forever for the other processes.
        check: Function called before any step of the chain begins. It raises ValueError for a mistake that would
            make this step fail.
    """

    name: str
    directory: str
    make: Callable[[Recipe, Path, Reporter], object]
    reads: dict[str, Any]
    needs: tuple[str, ...] = ()
    together: bool = False
    resumes: bool = False
    single: bool = False
    check: Callable[[Recipe, Path], None] | None = None


class Run:
    """A recipe's chain of steps in a directory.

    A step is done if its record is marked `finished` and has the fingerprint of the current recipe, and if its files
    have the recorded sizes.

    Args:
        recipe: Recipe whose steps are made.
        directory: Directory of the run. It is created when the first step begins.
        steps: Steps, each after the steps that it needs.
        progress: Reporter of one note per step and of the steps' own progress. Only the first process reports.

    Raises:
        ValueError: The directory is a file or a model.
    """

    def __init__(self, recipe: Recipe, directory: Path, steps: Sequence[Step], progress: Reporter = SILENT) -> None:
        self.recipe, self.directory = recipe, Path(directory)
        if self.directory.is_file():
            raise ValueError(f"{self.directory} is a file; choose another --output")
        if (self.directory / "config.json").exists():
            raise ValueError(f"{self.directory} is a model; choose another --output")
        self.steps = {step.name: step for step in steps}
        self.lead = int(os.environ.get("RANK", 0)) == 0
        self.progress = progress if self.lead else SILENT
        self.wanted: dict[str, dict[str, Any]] = {}  # record of each step at its start
        self.former: dict[str, str] = {}  # fingerprints in records made before fields were renamed
        for step in steps:
            facts = self._facts(step.reads, {name: self.wanted[name]["fingerprint"] for name in step.needs})
            self.wanted[step.name] = {"step": step.name, "fingerprint": fingerprint(facts), **facts}
            reads = {_renamed(key, FORMER_NAMES): value for key, value in step.reads.items()}
            self.former[step.name] = fingerprint(self._facts(reads, {name: self.former[name] for name in step.needs}))

    def _facts(self, reads: dict[str, Any], needs: dict[str, str]) -> dict[str, Any]:
        return {"reads": reads, "needs": needs, "seed": self.recipe.seed, "tah": RESULTS}

    def result(self, name: str) -> Path:
        """Return the directory of a step's result, whether it exists or not."""
        return self.directory / self.steps[name].directory

    def begun(self, name: str) -> bool:
        """Return whether a result of this step exists, finished or not."""
        return self._record(name) is not None and self.result(name).is_dir()

    def finished(self, name: str) -> bool:
        """Return whether a complete result of this step exists and matches the recipe."""
        record = self._record(name)
        return record is not None and bool(record["finished"]) and self.change(name) is None

    def difference(self, name: str) -> str | None:
        """Return how the inputs of a result differ from the current ones, as a phrase; None if they are the same."""
        before, now = self._record(name), self.wanted[name]
        if before is None or before["fingerprint"] in (now["fingerprint"], self.former[name]):
            return None
        old, new = ({**record["reads"], "seed": record["seed"], "tah": record["tah"]} for record in (before, now))
        pairs = [(key, old.get(key), new.get(key)) for key in old | new]
        found = [f"{key} was {short(a, json.dumps)}, is {short(b, json.dumps)}" for key, a, b in pairs if a != b]
        for key in before["needs"] | now["needs"]:
            same = key in now["needs"] and before["needs"].get(key) in (now["needs"][key], self.former[key])
            found += [] if same else [f"{key} has changed"]
        return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")

    def change(self, name: str) -> str | None:
        """Return why a result cannot be used, as a phrase; None if it can.

        The reason is a `difference` of the inputs, a missing result or a damaged file. Files are compared with the
        record by size, and weights also by their header.
        """
        record, result = self._record(name), self.result(name)
        if record is None or (record["finished"] and not result.is_dir()):
            return f"{result} is missing"
        if (found := self.difference(name)) is not None:
            return found
        damage = ((result / place, wrong(result / place, size)) for place, size in record.get("files", {}).items())
        return next((f"{path} {found}" for path, found in damage if found), None)

    def make(self, names: Sequence[str]) -> None:
        """Make the missing results of these steps and of all steps that they need.

        Args:
            names: Names of the steps.

        Raises:
            ValueError: The directory is in use or not writable, it contains something that this chain did not make, or
                a step's `check` found a mistake. In these cases nothing has been made or moved.
        """
        wanted = set(names)
        for step in reversed(self.steps.values()):
            wanted.update(step.needs if step.name in wanted else ())
        chain = [step for step in self.steps.values() if step.name in wanted]
        with self._alone():
            if self.lead:
                self._check([step for step in chain if not self.finished(step.name)])
                self.recipe.save(self.directory / "recipe.yaml")
            for step in chain:
                (self._make if self.lead else self._follow)(step)

    # -- one step ----------------------------------------------------------------------------------------------------

    def _check(self, todo: Sequence[Step]) -> None:
        """Raise ValueError if one of these steps would overwrite another program's files or fail its check."""
        for step in todo:
            if self._record(step.name) is None and (result := self.result(step.name)).exists():
                raise ValueError(f"{result} exists and was not made by this chain; move it or choose another --output")
        for step in todo:
            if step.check is not None:
                step.check(self.recipe, self.directory)

    def _make(self, step: Step) -> None:
        """Make one step in the first process."""
        if self.finished(step.name):
            self.progress.note(f"{step.name}: done before")
            return
        self.progress.note(f"{step.name}: {self._clear(step)}")
        for left in self.directory.glob(f".{step.directory}.*"):  # left by processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        self._write(step, finished=False)
        start, cpu, result = time.monotonic(), time.process_time(), self.result(step.name)
        try:
            self._work(step)
        except BaseException:
            if not any(path.is_file() for path in result.rglob("*")):  # the step has written nothing
                shutil.rmtree(result, ignore_errors=True)
                self._path(step.name).unlink(missing_ok=True)
            raise
        spent = {"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        self._write(step, finished=True, files=sizes_of(result), **spent)

    def _clear(self, step: Step) -> str:
        """Make room for a step's result. Return what happened to an earlier result, as a phrase for the note."""
        if not self.begun(step.name):
            return "begins"
        if (why := self.change(step.name)) is not None:
            return f"again, {why}; what was there is now in {self._move_aside(step)}"
        if step.resumes:
            return "continues"
        shutil.rmtree(self.result(step.name))
        return "starts over, because a run was killed"

    def _work(self, step: Step) -> None:
        """Run the step's function, then free the memory that it used."""
        if step.single and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this step runs in one process only; run the command once without torchrun")
        step.make(self.recipe, self.directory, self.progress)
        gc.collect()  # frees the model's memory before the next step allocates
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _follow(self, step: Step) -> None:
        """Wait in another process until a step is finished, and take part if all processes make it together."""
        # The first process has reached this step when the record matches the recipe. Before it makes a result again, it
        # replaces a record that is marked as finished.
        wait_until(lambda: self.change(step.name) is None)
        if step.together and not self.finished(step.name):
            self._work(step)
        wait_until(lambda: self.finished(step.name))

    def _move_aside(self, step: Step) -> Path:
        """Move a result to `old` and return its new path.

        A changed recipe never deletes a result, because results take long to make.
        """
        record = self._record(step.name)
        assert record is not None
        name, old = f"{step.directory}-{record['fingerprint'][:8]}", self.directory / "old"
        old.mkdir(exist_ok=True)
        places = (old / name, *(old / f"{name}-{number}" for number in range(2, 1000)))
        kept = next(place for place in places if not place.exists())
        os.replace(self.result(step.name), kept)
        return kept

    # -- records -----------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return self.directory / "steps" / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any] | None:
        """Return the record of a step with the current field names, or None if there is none.

        Raises:
            ValueError: The record is damaged.
        """
        try:
            record: dict[str, Any] = json.loads(self._path(name).read_text("utf-8"))
            if not {"fingerprint", "reads", "needs", "seed", "tah", "finished"} <= set(record):
                raise ValueError("entries are missing")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._path(name)} is damaged; delete it and {self.result(name)}") from error
        record["reads"] = {_renamed(key, FORMER_FIELDS): value for key, value in record["reads"].items()}
        return record

    def _write(self, step: Step, finished: bool, **more: Any) -> None:
        record = self.wanted[step.name] | {"finished": finished} | more
        write_atomically(self._path(step.name), json.dumps(record, indent=1) + "\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the directory's lock, and remove directories that this call created if they stay empty.

        Raises:
            ValueError: Another process holds the lock, or the directory is not writable.
        """
        if not self.lead:
            yield
            return
        fresh = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        lock = FileLock(self.directory / ".lock")  # a lock of the operating system ends with its process
        new = [path for name in (".lock", "recipe.yaml") if not (path := self.directory / name).exists()]
        try:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(
                    f"{self.directory} is in use by another process, which has locked {lock.lock_file}; wait for it or "
                    "choose another --output"
                ) from None
            except OSError as error:
                raise ValueError(
                    f"{self.directory} cannot be written to ({error.strerror or error}); choose another --output"
                ) from error
            try:
                yield
            finally:
                self._tidy(new)
        finally:
            lock.release()
            for path in fresh:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()

    def _tidy(self, new: Sequence[Path]) -> None:
        """Remove the files that this call created if no step has begun."""
        steps = self.directory / "steps"
        if steps.is_dir() and not any(steps.iterdir()):
            steps.rmdir()
        if not steps.is_dir():
            for path in new:
                path.unlink(missing_ok=True)


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait until `reached` returns true.

    There is no time limit: torchrun ends all processes when one fails.
    """
    while not reached():
        time.sleep(POLL)


def device_of_process() -> torch.device:
    """Return the device of this process: the GPU of its local rank under torchrun, or the CPU without CUDA."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def fingerprint(value: Any) -> str:
    """Return a hash of a JSON value: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def flat(value: Any, name: str) -> dict[str, Any]:
    """Return nested dictionaries as one dictionary whose keys are the names joined by dots, starting with `name`."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: entry for inner in value for key, entry in flat(value[inner], f"{name}.{inner}").items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """Return a key of `reads` with its field renamed, for example `model.reembed` as `model.next_input`."""
    name = key.removeprefix("model.")
    return f"model.{names[name]}" if name != key and name in names else key
