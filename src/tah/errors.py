"""Parts of error messages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

LONGEST = 300  # characters of another library's message that we repeat


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to `LONGEST` characters; the name of its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # a heading is nothing by itself
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def short(value: Any, as_text: Callable[[Any], str] = repr) -> str:
    """A value as text, cut to 60 characters."""
    text = as_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def some(names: Collection[str]) -> str:
    """`a, b, c and 2 more`"""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
