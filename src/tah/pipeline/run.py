"""A recipe's steps in one directory: what is done is skipped, and what has changed is done again, with the reason.

    DIR/recipe.yaml         every field of the recipe, as it was used last
    DIR/steps/<step>.json   what the step's result was made from, and whether it is whole
    DIR/<step>/             the result
    DIR/old/                results that no longer fit the recipe

A step's fingerprint is over the part of the recipe that it reads, the fingerprints of the steps it needs, the seed and
the version of tah. Under torchrun the first process keeps the records; the others wait for it, or take part where a
step is made together.
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

from ..checkpoints.contents import sizes_of, version_of, wrong
from ..config import FORMER_FIELDS
from ..errors import short
from ..files import write_atomically
from ..progress import SILENT, Reporter
from ..training.recipe import Recipe

FORMER_NAMES = {now: before for before, now in FORMER_FIELDS.items()}

POLL = 0.2  # seconds between looks at what another process does


@dataclass(frozen=True)
class Step:
    """One step of a chain.

    Args:
        name: of the step, and of its record.
        directory: of its result, below the run's.
        make: makes the result; called with the recipe, the run's directory and a reporter.
        reads: the part of the recipe that decides about the result, flat.
        needs: steps whose results it reads.
        together: every process takes part, else the first alone.
        resumes: continues what a killed run has left, else that is removed first.
        single: trains in the first process alone, where torchrun's others would be waited for without end: refused.
        check: called before any step of the chain begins; raises `ValueError` for what would make this one fail.
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

    A step is done where its record has the fingerprint that is wanted now and the mark `finished`, and its files have
    the sizes that were recorded. Everything else follows from these.

    Args:
        recipe: what to make.
        directory: where; made when the first step begins.
        steps: in an order in which every step comes after those it needs.
        progress: reports a line about each step, and what the steps report; by the first process only.

    Raises:
        ValueError: the directory is a file, or a model.
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
        self.wanted: dict[str, dict[str, Any]] = {}  # the record of each step, but for what is known at its end
        self.former: dict[str, str] = {}  # the fingerprint that the step has in a record of an older version
        for step in steps:
            facts = self._facts(step.reads, {name: self.wanted[name]["fingerprint"] for name in step.needs})
            self.wanted[step.name] = {"step": step.name, "fingerprint": fingerprint(facts), **facts}
            reads = {_renamed(key, FORMER_NAMES): value for key, value in step.reads.items()}
            self.former[step.name] = fingerprint(self._facts(reads, {name: self.former[name] for name in step.needs}))

    def _facts(self, reads: dict[str, Any], needs: dict[str, str]) -> dict[str, Any]:
        return {"reads": reads, "needs": needs, "seed": self.recipe.seed, "tah": version_of("tah")}

    def result(self, name: str) -> Path:
        return self.directory / self.steps[name].directory

    def begun(self, name: str) -> bool:
        """Whether there is a result of this step, finished or not."""
        return self._record(name) is not None and self.result(name).is_dir()

    def finished(self, name: str) -> bool:
        """Whether there is a whole result of what is wanted."""
        record = self._record(name)
        return record is not None and bool(record["finished"]) and self.change(name) is None

    def difference(self, name: str) -> str | None:
        """How what a result was made from differs from what is wanted now, in words; None where it does not."""
        before, now = self._record(name), self.wanted[name]
        if before is None or before["fingerprint"] in (now["fingerprint"], self.former[name]):
            return None
        old, new = ({**record["reads"], "seed": record["seed"], "tah": record["tah"]} for record in (before, now))
        pairs = [(key, old.get(key), new.get(key)) for key in old | new]
        found = [f"{key} was {short(a, json.dumps)}, is {short(b, json.dumps)}" for key, a, b in pairs if a != b]
        for key in before["needs"] | now["needs"]:
            same = key in now["needs"] and before["needs"].get(key) in (now["needs"][key], self.former[key])
            found += [] if same else [f"{key} is another"]
        return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")

    def change(self, name: str) -> str | None:
        """As `difference`, or how a finished result differs from what was recorded: its files are compared by size,
        and weights also by their head."""
        record, result = self._record(name), self.result(name)
        if record is None or (record["finished"] and not result.is_dir()):
            return f"{result} is missing"
        if (found := self.difference(name)) is not None:
            return found
        damage = ((result / place, wrong(result / place, size)) for place, size in record.get("files", {}).items())
        return next((f"{path} {found}" for path, found in damage if found), None)

    def make(self, names: Sequence[str]) -> None:
        """Make the results of these steps and of all they need, as far as they are not there.

        Raises:
            ValueError: the directory is in use or cannot be written to, something in it was not made by this chain, or
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
        for step in todo:
            if self._record(step.name) is None and (result := self.result(step.name)).exists():
                raise ValueError(f"{result} exists and was not made by this chain; move it or choose another --output")
        for step in todo:
            if step.check is not None:
                step.check(self.recipe, self.directory)

    def _make(self, step: Step) -> None:
        """On the first process."""
        if self.finished(step.name):
            self.progress.note(f"{step.name}: done before")
            return
        self.progress.note(f"{step.name}: {self._clear(step)}")
        for left in self.directory.glob(f".{step.directory}.*"):  # of processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        self._write(step, finished=False)
        start, cpu, result = time.monotonic(), time.process_time(), self.result(step.name)
        try:
            self._work(step)
        except BaseException:
            if not any(path.is_file() for path in result.rglob("*")):  # nothing came of it
                shutil.rmtree(result, ignore_errors=True)
                self._path(step.name).unlink(missing_ok=True)
            raise
        spent = {"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        self._write(step, finished=True, files=sizes_of(result), **spent)

    def _clear(self, step: Step) -> str:
        """Make room for a step's result; what there was of it and what happened to that, in words."""
        if not self.begun(step.name):
            return "begins"
        if (why := self.change(step.name)) is not None:
            return f"again, {why}; what was there is now in {self._move_aside(step)}"
        if step.resumes:
            return "going on"
        shutil.rmtree(self.result(step.name))
        return "once more, a run was killed"

    def _work(self, step: Step) -> None:
        if step.single and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this step is done by one process: start the command once without torchrun")
        step.make(self.recipe, self.directory, self.progress)
        gc.collect()  # a model's memory, before the next step takes its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _follow(self, step: Step) -> None:
        """On the other processes: take part where the step is made together, and wait until it is done."""
        # The first process has come to this step when the record is of what is wanted: it does not leave one that is
        # marked as finished beside a result that it makes again.
        wait_until(lambda: self.change(step.name) is None)
        if step.together and not self.finished(step.name):
            self._work(step)
        wait_until(lambda: self.finished(step.name))

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


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait for another process; torchrun ends all of them when one has failed."""
    while not reached():
        time.sleep(POLL)


def device_of_process() -> torch.device:
    """Where this process of torchrun computes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that change with any part of a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested dictionaries as one, with names joined by dots."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: entry for inner in value for key, entry in flat(value[inner], f"{name}.{inner}").items()}


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """`model.reembed` as `model.next_input`, or the other way round."""
    name = key.removeprefix("model.")
    return f"model.{names[name]}" if name != key and name in names else key
