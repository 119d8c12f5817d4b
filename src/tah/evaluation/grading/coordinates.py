"""Coordinates with names: `(a,b)=(1,2)`, `x=1, y=2`, and how they are compared with a tuple."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .dress import Value, dressed, inner, split

NAME = re.compile(r"^((?:\\[a-zA-Z]+|[a-zA-Z])[a-zA-Z_{}0-9\s]*)=(?!=)\s*")  # x, x_{1}, \angle A B C
TUPLE = re.compile(r"^(\([^()]*,[^()]*\))\s*=\s*(\(.*\))$")
COLUMN = re.compile(
    r"^\\begin\{[pb]matrix\}((?:(?!\\\\|\\begin)[^&])*(?:\\\\(?:(?!\\\\|\\begin|\\end)[^&])+)+)\\end\{[pb]matrix\}$"
)
AXES = ("x", "y", "z")  # the only names that have an order of their own
Coordinate = tuple[str | None, Value]


def coordinates(text: str, gold: bool = False) -> list[Coordinate] | None:
    r"""The coordinates of `(1,2)`, of `(a,b)=(1,2)` with their names, or of a column; None where the text is no tuple.

    Args:
        text: of one value, undressed.
        gold: it is the right answer.
    """
    if column := COLUMN.match(text):
        return [(None, dressed(part, gold)) for part in column[1].split(r"\\")]
    names: list[str | None] = []
    if named := TUPLE.match(text):
        names = [re.sub(r"\s", "", name) for name in split(named[1][1:-1])]
        text = named[2]
    within = inner(text.rpartition("=")[2].strip(), "(") if NAME.match(text) else inner(text, "(")
    parts = split(within) if within else []
    if len(parts) < 2 or (names and len(names) != len(parts)):
        return None
    return list(zip(names or [None] * len(parts), (dressed(part, gold) for part in parts), strict=True))


def one_by_one(values: Sequence[Value]) -> list[Coordinate]:
    """Values of a list as coordinates, with the names they have."""
    found: list[Coordinate] = []
    for value in values:
        name = NAME.match(value.text)
        bare = dressed(value.text[name.end() :]) if name else value
        found.append((re.sub(r"\s", "", name[1]) if name else None, bare))
    return found


def same_coordinates(
    gold: Sequence[Coordinate], said: Sequence[Coordinate], alike: Callable[[Value, Value], bool]
) -> bool:
    """Whether two lists of coordinates are the same: by name where both have these names, else in their order.

    Args:
        gold: of the right answer.
        said: of the answer.
        alike: whether two values are the same.
    """
    if len(gold) != len(said):
        return False
    names = [[name for name, _ in side] for side in (gold, said)]
    if None not in names[0] and sorted(map(str, names[0])) == sorted(map(str, names[1])):
        order = [names[1].index(name) for name in names[0]]
        said = [said[at] for at in order]
    elif set(names[0]) == {None} or set(names[1]) == {None}:
        gold, said = _by_axis(gold), _by_axis(said)
    return all(alike(one, other) for (_, one), (_, other) in zip(gold, said, strict=True))


def _by_axis(side: Sequence[Coordinate]) -> list[Coordinate]:
    """In the order of x, y and z, where these are the names."""
    return sorted(side, key=lambda one: str(one[0])) if all(name in AXES for name, _ in side) else list(side)
