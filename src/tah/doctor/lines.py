"""A line of the result of `tah doctor`: one measurement, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import first_line

OK, FAILED, SKIPPED, MEASURED = STATUSES = ("ok", "failed", "skipped", "measured")


class Skip(Exception):
    """A check cannot run here. The message is the reason."""


@dataclass(frozen=True)
class Found:
    """What a check has measured.

    Args:
        text: The measurement in words.
        right: Whether it is as it should be; None if there is no right or wrong.
        values: The numbers of the measurement, for JSON.
    """

    text: str
    right: bool | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """The result of one check.

    Args:
        section: `versions`, `devices`, `families`, `kernels`, `method` or `speed`.
        name: Name of the check, which is unique in its section.
        status: One of `STATUSES`.
        found: The measurement in words; the reason of a line that is skipped.
        values: The numbers of the measurement.
    """

    section: str
    name: str
    status: str
    found: str
    values: dict[str, Any]


def line_of(section: str, name: str, check: Callable[[], Found]) -> Line:
    """Run a check and return its line. An error of any kind is a failed line, so that the other checks still run."""
    try:
        found = check()
    except Skip as reason:
        return Line(section, name, SKIPPED, str(reason), {})
    except Exception as error:
        return Line(section, name, FAILED, f"{type(error).__name__}: {first_line(error)}", {})
    status = MEASURED if found.right is None else OK if found.right else FAILED
    return Line(section, name, status, found.text, found.values)
