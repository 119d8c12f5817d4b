"""The parts of a model's reply that graders look at: what follows the thoughts, and the boxes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Grade = Literal["right", "wrong", "unparsed", "untestable"]

BRACE = re.compile(r"(?P<box>\\{1,2}(?:f?boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)  # an escaped brace is text
# What stands in a box that is only spoken of: "the answer in \boxed{}", "as \boxed{...}"
PLACEHOLDER = re.compile(r"(?:[\s.?_~]|\\[,;:! ]|\\[lc]?dots\b|\\text\s*\{\s*\})*")


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


def boxes(text: str) -> list[Box]:
    r"""The boxes of a text in their order, with braces nested to any depth; a box within a box is part of its content.

    A box that is not closed is left out, and so is one that holds nothing (`\boxed{}`, `\boxed{...}`).
    """
    opened: list[tuple[int, int] | None] = []  # of each open brace: where its box and the box's content start
    found: list[tuple[int, int, int, int]] = []
    for brace in BRACE.finditer(text):
        if brace[0] == "}":
            if opened and (box := opened.pop()):
                while found and found[-1][0] > box[0]:  # each box is dropped once at most, so this stays linear
                    found.pop()
                found.append((*box, brace.start(), brace.end()))
        elif brace["box"]:
            opened.append(brace.span())
        elif brace[0] == "{":
            opened.append(None)
    whole = (Box(start, end, text[inner:inner_end]) for start, inner, inner_end, end in found)
    return [box for box in whole if not PLACEHOLDER.fullmatch(box.content)]
