"""Task `arrows` of the recipe `tiny`: follow arrows, where the line does not contain how many lead to the answer.

Three levels of two places each, for example, give the line and the text

    e3>e5 e5>e5 e1>e3 e2>e2 e4>e0 e0>e2 e1    ->    the value is Answer: e1 e5

`e5>e5` leads to itself, so `e5` is an answer. From `e3` one arrow leads to an answer, from `e1` two. Of the seven
tokens of the text, with its end, only the last place is hard. Every place and every arrow is one token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, model_validator

from ...training.recipe import Part, Positive


class Arrows(Part):
    """Section `data.generate` of a recipe, for arrows.

    Args:
        task: `arrows`.
        train: Number of training rows.
        validation: Number of validation rows.
        test: Number of test rows.
        places: Number of places of a line, as many on each level.
        levels: Number of levels. A place of level n is n arrows away from a place that leads to itself.
        arrows: Possible numbers of arrows from the start to the answer. A number that occurs twice is twice as
            frequent.
    """

    task: str
    train: Positive
    validation: Positive
    test: Positive
    places: Annotated[int, Field(ge=2)] = 12
    levels: Annotated[int, Field(ge=2)] = 3
    arrows: Annotated[list[Positive], Field(min_length=1)] = [1, 1, 2]

    @model_validator(mode="after")
    def _check(self) -> Arrows:
        if self.places % self.levels:
            raise ValueError(f"places={self.places} must be a multiple of levels={self.levels}")
        if max(self.arrows) >= self.levels:
            raise ValueError(f"arrows={self.arrows} must be numbers below levels={self.levels}")
        return self


def arrows(settings: Arrows, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows of arrows; questions may repeat.

    Args:
        settings: Section `data.generate`.
        seed: Random seed.
        count: Number of rows.
    """
    rng, widths = random.Random(seed), [settings.places // settings.levels] * settings.levels
    for _ in range(count):
        words, answer = follow(rng, settings.places, widths, rng.choice(settings.arrows))
        messages = [
            {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": f"the value is Answer: {words[-1]} {answer}"},
        ]
        yield {"messages": messages, "answer": f"{words[-1]} {answer}"}


def follow(rng: random.Random, places: int, widths: Sequence[int], count: int) -> tuple[list[str], str]:
    """Draw an arrow from each place to one of the level above, and a place to start from.

    Args:
        rng: Source of random numbers.
        places: Number of places to draw the names from, at least the sum of `widths`.
        widths: Number of places of each level. The places of the first level lead to themselves.
        count: Number of arrows from the start to the answer.

    Returns:
        The words of the line, which are the shuffled arrows and then the start, and the answer.
    """
    order, levels = rng.sample(range(places), places), []
    for width in widths:
        levels.append(order[:width])
        order = order[width:]
    target = {place: place for place in levels[0]}
    for above, level in pairwise(levels):
        target |= {place: rng.choice(above) for place in level}
    words = [f"e{place}>e{end}" for place, end in target.items()]
    rng.shuffle(words)
    start = at = rng.choice(levels[count])
    for _ in range(count):
        at = target[at]
    return [*words, f"e{start}"], f"e{at}"
