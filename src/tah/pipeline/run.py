"""A recipe's steps in one directory: what is done is skipped, what has changed is done again and says why.

    DIR/recipe.yaml         every field of the recipe, as it was used last
    DIR/steps/<step>.json   what the step's result was made from, and whether it is whole
    DIR/<step>/             the result
    DIR/old/                results that no longer fit the recipe

A step's fingerprint is over the part of the recipe that it reads, the fingerprints of the steps it needs, the seed and
the version of tah. Under torchrun the first process keeps the records; the others wait for it, or take part where a
step is made together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ..checkpoints.contents import sizes_of, wrong
from ..files import write_atomically
from ..training.recipe import Recipe

State = Literal["missing", "unfinished", "changed", "damaged", "finished"]
POLL = 0.2  # seconds between looks at what another process does


@dataclass(frozen=True)
class Step:
    """One step of a chain.

    Args:
        name: of the step, and of its record.
        directory: of its result, below the run's.
        make: makes the result; called with the recipe and the run's directory.
        reads: the part of the recipe that decides about the result, flat.
        needs: steps whose results it reads.
        together: every process takes part, else the first alone.
        resumes: goes on from what a killed run has left, else that is removed first.
        check: called before any step of the chain begins; raises `ValueError` for what would make this one fail.
    """

    name: str
    directory: str
    make: Callable[[Recipe, Path], object]
    reads: dict[str, Any]
    needs: tuple[str, ...] = ()
    together: bool = False
    resumes: bool = False
    check: Callable[[Recipe, Path], None] | None = None


class Run:
    """A recipe's chain of steps in a directory.

    Args:
        recipe: what to make.
        directory: where; made when the first step begins.
        steps: in an order in which every step comes after those it needs.
        note: takes a line about each step.

    Raises:
        ValueError: the directory is a file, or a model.
    """

    def __init__(
        self, recipe: Recipe, directory: Path, steps: Sequence[Step], note: Callable[[str], None] = lambda line: None
    ) -> None:
        self.recipe, self.directory, self.note = recipe, Path(directory), note
        if self.directory.is_file():
            raise ValueError(f"{self.directory} is a file; choose another --output")
        if (self.directory / "config.json").exists():
            raise ValueError(f"{self.directory} is a model; choose another --output")
        self.steps = {step.name: step for step in steps}
        self.lead = int(os.environ.get("RANK", 0)) == 0
        self.wanted: dict[str, dict[str, Any]] = {}
        for step in steps:
            facts = {
                "reads": step.reads,
                "needs": {name: self.wanted[name]["fingerprint"] for name in step.needs},
                "seed": recipe.seed,
                "tah": _version(),
            }
            self.wanted[step.name] = {"step": step.name, "fingerprint": fingerprint(facts), **facts}

    def result(self, name: str) -> Path:
        return self.directory / self.steps[name].directory

    def state(self, name: str) -> State:
        """Of a step's result.

        `changed`: it was made, or begun, for something else; `difference` says what. `damaged`: it was finished, but
        its files are not what they were; `damage` says which.
        """
        record = self._record(name)
        if record is None or not self.result(name).is_dir():
            return "missing"
        if record["fingerprint"] != self.wanted[name]["fingerprint"]:
            return "changed"
        if not record["finished"]:
            return "unfinished"
        return "finished" if self.damage(name) is None else "damaged"

    def damage(self, name: str) -> str | None:
        """What is wrong with a finished result, as far as sizes and the heads of weights tell; None if nothing is."""
        record, result = self._record(name) or {}, self.result(name)
        if not result.is_dir():
            return f"{result} is missing"
        for place, size in record.get("files", {}).items():
            if found := wrong(result / place, size):
                return f"{result / place} {found}"
        return None

    def difference(self, name: str) -> str:
        """How what a result was made from differs from what is wanted now, in words."""
        before, now = self._record(name), self.wanted[name]
        assert before is not None
        pairs = [(key, before["reads"].get(key), now["reads"].get(key)) for key in before["reads"] | now["reads"]]
        pairs += [(key, before[key], now[key]) for key in ("seed", "tah")]
        found = [f"{key} was {_short(old)}, is {_short(new)}" for key, old, new in pairs if old != new]
        needs = before["needs"] | now["needs"]
        found += [f"{key} is another" for key in needs if before["needs"].get(key) != now["needs"].get(key)]
        return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")

    def closure(self, names: Sequence[str]) -> list[str]:
        """`names` and everything they need, in order."""
        found = set(names)
        for name in reversed(self.steps):
            if name in found:
                found.update(self.steps[name].needs)
        return [name for name in self.steps if name in found]

    def make(self, names: Sequence[str]) -> None:
        """Make the results of these steps and of all they need, as far as they are not there.

        Raises:
            ValueError: the directory is in use or cannot be written to, something in it was not made by this chain, or
                a step's `check` found a mistake. In these cases nothing has been made or moved.
        """
        with self._alone():
            if self.lead:
                self._check([self.steps[name] for name in self.closure(names)])
                self.recipe.save(self.directory / "recipe.yaml")
            for name in self.closure(names):
                if self.lead:
                    self._make(self.steps[name])
                else:
                    self._follow(self.steps[name])

    # -- one step ----------------------------------------------------------------------------------------------------

    def _check(self, steps: Sequence[Step]) -> None:
        todo = [(step, state) for step in steps if (state := self.state(step.name)) != "finished"]
        for step, state in todo:
            if state == "missing" and (result := self.result(step.name)).exists():
                raise ValueError(f"{result} exists and was not made by this chain; move it or choose another --output")
        for step, _ in todo:
            if step.check is not None:
                step.check(self.recipe, self.directory)

    def _make(self, step: Step) -> None:
        """On the first process."""
        state, result = self.state(step.name), self.result(step.name)
        if state == "finished":
            self.note(f"{step.name}: done before")
            return
        if state in ("changed", "damaged"):
            why = self.difference(step.name) if state == "changed" else self.damage(step.name)
            kept = self._move_aside(step)
            self.note(f"{step.name}: again, {why}; what was there is now in {kept}")
        elif state == "unfinished" and step.resumes:
            self.note(f"{step.name}: going on")
        elif state == "unfinished":
            self.note(f"{step.name}: once more, a run was killed")
            shutil.rmtree(result)
        else:
            self.note(f"{step.name}: begins")
        for left in self.directory.glob(f".{step.directory}.*"):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        self._write(step, finished=False)
        start, cpu = time.monotonic(), time.process_time()
        try:
            step.make(self.recipe, self.directory)
        except BaseException:
            if not any(path.is_file() for path in result.rglob("*")):  # nothing came of it
                shutil.rmtree(result, ignore_errors=True)
                self._path(step.name).unlink(missing_ok=True)
            raise
        spent = {"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        self._write(step, finished=True, files=sizes_of(result), **spent)

    def _follow(self, step: Step) -> None:
        """On the other processes: take part where the step is made together, and wait until it is done."""
        self._wait(lambda: self._begun(step.name))
        if step.together and self.state(step.name) != "finished":
            step.make(self.recipe, self.directory)
        self._wait(lambda: self.state(step.name) == "finished")

    def _begun(self, name: str) -> bool:
        """Whether the first process has come to this step: whatever it makes again is no longer called finished."""
        record = self._record(name)
        if record is None or record["fingerprint"] != self.wanted[name]["fingerprint"]:
            return False
        return not record["finished"] or self.damage(name) is None

    def _wait(self, reached: Callable[[], bool]) -> None:
        while not reached():  # torchrun ends all processes when one has failed
            time.sleep(POLL)

    def _move_aside(self, step: Step) -> Path:
        """Results take long to make, so none is deleted because a recipe has changed."""
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
        try:
            record: dict[str, Any] = json.loads(self._path(name).read_text("utf-8"))
            if not {"fingerprint", "reads", "needs", "seed", "tah", "finished"} <= set(record):
                raise ValueError("entries are missing")
            return record
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self._path(name)} is damaged; delete it and {self.result(name)}") from error

    def _write(self, step: Step, finished: bool, **more: Any) -> None:
        record = self.wanted[step.name] | {"finished": finished} | more
        write_atomically(self._path(step.name), json.dumps(record, indent=1) + "\n")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the directory's lock, and leave no directory behind in which nothing was made."""
        if not self.lead:
            yield
            return
        fresh = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        lock = FileLock(self.directory / ".lock")  # of the system: it ends with the process, however that ends
        new = [path for name in (".lock", "recipe.yaml") if not (path := self.directory / name).exists()]
        try:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(
                    f"{self.directory} is in use by another process, which holds {lock.lock_file}; wait for it or "
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
        """Where no step has begun, take away the files that came with this call."""
        steps = self.directory / "steps"
        if steps.is_dir() and not any(steps.iterdir()):
            steps.rmdir()
        if not steps.is_dir():
            for path in new:
                path.unlink(missing_ok=True)


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that change with any part of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested dictionaries as one, with names joined by dots."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: entry for inner in value for key, entry in flat(value[inner], f"{name}.{inner}").items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _version() -> str:
    try:
        return version("tah")
    except PackageNotFoundError:  # run from a source tree
        from .. import __version__

        return __version__
