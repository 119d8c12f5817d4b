"""Tables and percentages as text, for reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], words: int | None = None) -> str:
    """Return a Markdown table.

    Args:
        columns: Names of the columns.
        rows: Rows with one cell per column.
        words: Number of leading text columns; the others hold numbers and are aligned to the right. None sets no
            alignment.
    """
    numbers = 0 if words is None else len(columns) - words
    rule = "| --- " * len(columns) if words is None else "|---" * words + "|--:" * numbers
    head, *body = (f"| {' | '.join(map(str, line))} |" for line in (columns, *rows))
    return "\n".join([head, f"{rule}|", *body])


def percent(share: float | None, form: str = ".1f", unit: str = " %", times: float = 100) -> str:
    """Return a share as a percentage such as `81.8 %`, or `-` for None. With `times=1` it formats any other number."""
    return "-" if share is None else f"{times * share:{form}}{unit}"


def estimate(
    found: Mapping[str, float | None] | None,
    form: str = ".1f",
    unit: str = " %",
    times: float = 100,
    interval: str = " [{}, {}]",
) -> tuple[str, str]:
    """Return the value and the interval of an `Estimate` of `stats/bootstrap.py`: `81.8 %` and ` [80.1, 83.2]`.

    The second text is empty if there is no interval.
    """
    if found is None or found["value"] is None:
        return percent(None), ""
    ends = (found["low"], found["high"])
    between = "" if None in ends else interval.format(*(percent(end, form, "", times) for end in ends))
    return percent(found["value"], form, unit, times), between
