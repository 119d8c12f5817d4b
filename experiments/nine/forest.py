"""Draw forests for `follow` and `relations`: each place has an arrow to another one, a root to itself."""

from __future__ import annotations

import random
from collections.abc import Mapping

from .problem import ODDS, SYMBOLS


def forest(rng: random.Random, places: int, roots: int) -> dict[str, str]:
    """Return where the arrow of each place leads; a place is at most `max(ODDS)` arrows from its root."""
    names = rng.sample(SYMBOLS, places)
    target = {name: name for name in names[:roots]}
    inner, level = names[:roots], dict.fromkeys(names[:roots], 0)
    for name in names[roots:]:
        above = rng.choice(inner)
        target[name], level[name] = above, level[above] + 1
        if level[name] < max(ODDS):
            inner.append(name)
    return target


def path(target: Mapping[str, str], place: str, answered: Mapping[str, str]) -> list[str]:
    """Return the places on the way from a place to its root.

    The path is empty for a root, and where a question that is already answered lies on it: its answer would save steps.
    """
    found = []
    while target[place] != place:
        place = target[place]
        found.append(place)
    return [] if any(place in answered for place in found) else found
