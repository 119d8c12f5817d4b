"""The parts of a model's reply that graders look at: what follows the thoughts, and the boxes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Grade = Literal["right", "wrong", "unparsed", "untestable"]

BOX = re.compile(r"\\f?boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text


@dataclass(frozen=True)
class Verdict:
    """The grade of one reply, and what it rests on.

    Args:
        grade: `unparsed` where no answer can be found, `untestable` where the item's own tests cannot be run; both
            count as not right.
        extracted: the answer that was found in the reply, as text; None where none was found.
        reason: why, in one line, where the grade does not follow from `extracted` beside the right answer.
    """

    grade: Grade
    extracted: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Box:
    r"""A `\boxed{content}` in a text: `text[start:end]` is the whole of it."""

    start: int
    end: int
    content: str


def after_thoughts(text: str) -> str:
    """The reply without its thoughts; empty where the thoughts were not closed."""
    text = text.rsplit("</think>", 1)[-1]
    return "" if "<think>" in text else text


def boxes(text: str) -> Iterator[Box]:
    r"""The boxes of a text in their order, with braces nested to any depth; a box within a box is part of its content.

    A box that is empty or not closed is left out.
    """
    at = 0
    while found := BOX.search(text, at):
        depth, at = 1, found.end()
        for brace in BRACE.finditer(text, found.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                at = brace.end()
                if text[found.end() : brace.start()].strip():
                    yield Box(found.start(), at, text[found.end() : brace.start()])
                break
