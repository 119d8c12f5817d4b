"""Functions that shorten parts of error messages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

LONGEST = 300  # characters quoted from a message of another library


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to `LONGEST` characters.

    An error without a message gives the name of its type.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # a heading needs the line below it
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def short(value: Any, as_text: Callable[[Any], str] = repr) -> str:
    """Return a value as text, cut to 60 characters."""
    text = as_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def some(names: Collection[str]) -> str:
    """Return the first three names in sorted order and the number of the others: `a, b, c and 2 more`."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
