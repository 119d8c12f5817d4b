"""Tables and shares as text, for every report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], words: int | None = None) -> str:
    """A table in markdown.

    Args:
        columns: their names.
        rows: as many cells each.
        words: so many columns are words, the others numbers, to the right; None leaves it to the reader's program.
    """
    numbers = 0 if words is None else len(columns) - words
    rule = "| --- " * len(columns) if words is None else "|---" * words + "|--:" * numbers
    head, *body = (f"| {' | '.join(map(str, line))} |" for line in (columns, *rows))
    return "\n".join([head, f"{rule}|", *body])


def percent(share: float | None, form: str = ".1f", unit: str = " %", times: float = 100) -> str:
    """`81.8 %`, or - where undefined; with `times` 1 any other number."""
    return "-" if share is None else f"{times * share:{form}}{unit}"


def estimate(
    found: Mapping[str, float | None] | None,
    form: str = ".1f",
    unit: str = " %",
    times: float = 100,
    interval: str = " [{}, {}]",
) -> tuple[str, str]:
    """`81.8 %` and ` [80.1, 83.2]`, of an `Estimate` of `stats/bootstrap.py`; no text where there is no interval."""
    if found is None or found["value"] is None:
        return percent(None), ""
    ends = (found["low"], found["high"])
    between = "" if None in ends else interval.format(*(percent(end, form, "", times) for end in ends))
    return percent(found["value"], form, unit, times), between
