"""All checks of `tah doctor` for a model, and their result as one page."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..markdown import table
from ..progress import SILENT, Reporter
from ..session import Session
from .compare import Tolerance
from .kernel import kernel_line
from .lines import FAILED, STATUSES, Line
from .machine import device_lines, family_lines, version_lines
from .method import Subject, attention_lines, method_lines
from .speed import speed_lines

COLUMNS = ("section", "check", "result", "found")


@dataclass(frozen=True)
class Report:
    """The result of `tah doctor`.

    Args:
        model: Name of the model.
        device: Device of the checks.
        dtype: Data type of the model.
        tolerance: How far apart two computations of the same tokens may be in this data type.
        seconds: Seconds that the checks took.
        lines: The checks, in order.
    """

    model: str
    device: str
    dtype: str
    tolerance: Tolerance
    seconds: float
    lines: list[Line]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not any(line.status == FAILED for line in self.lines)

    @property
    def title(self) -> str:
        """What was checked, in one line."""
        return f"{self.model}, {self.dtype} on {self.device}"

    @property
    def summary(self) -> str:
        """The number of lines by status, such as `25 ok, 0 failed, 5 skipped, 6 measured in 12 s`."""
        counts = [f"{sum(line.status == status for line in self.lines)} {status}" for status in STATUSES]
        return f"{', '.join(counts)} in {self.seconds:.0f} s"

    def as_dict(self) -> dict[str, Any]:
        """Return the entries that `--json` prints. Numbers that JSON does not have, NaN and infinity, are None."""
        return _finite({"passed": self.passed, **asdict(self)})

    def markdown(self) -> str:
        """Return the result as a Markdown table with a title and a summary."""
        rows = [(line.section, line.name, line.status, line.found.replace("|", "\\|")) for line in self.lines]
        return f"{self.title}\n\n{table(COLUMNS, rows)}\n\n{self.summary}"


def _finite(value: Any) -> Any:
    """Return `value` with None for each number in it that is NaN or infinite."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def doctor(session: Session, progress: Reporter = SILENT) -> Report:
    """Check whether this machine computes TaH correctly with a model, and measure how fast.

    Args:
        session: Model on the device of the checks. It is the same afterwards.
        progress: Reporter, which counts the checks.

    Raises:
        ValueError: The model has too few positions.
    """
    start, model = time.perf_counter(), session.model
    subject = Subject.of(model)
    lines = []
    with progress.work("checking", None, "checks") as work:
        for line in _lines(subject):
            lines.append(line)
            work.advance()
    return Report(
        model=session.source,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        tolerance=subject.tolerance,
        seconds=time.perf_counter() - start,
        lines=lines,
    )


def _lines(subject: Subject) -> Iterator[Line]:
    device = subject.model.device
    yield from version_lines()
    yield from device_lines(device)
    yield from family_lines(device)
    yield from attention_lines(subject)
    yield kernel_line(device)
    yield from method_lines(subject)
    yield from speed_lines(subject.model)
