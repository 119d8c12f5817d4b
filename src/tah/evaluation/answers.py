"""Whether an answer is right: math-verify for mathematics, a small extractor for letters.

Both look at what follows the thoughts only. An answer in which nothing can be found is `unparsed`, and one to an item
whose tests cannot be run is `untestable`; both are counted as such beside the wrong ones.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

Grade = Literal["right", "wrong", "unparsed", "untestable"]

SECONDS = 5  # for each of parsing and comparing; an expression may be made to explode
LETTERS = "ABCDEFGHIJ"
# The paper's order (spec D.1): boxed LaTeX before other LaTeX before plain numbers. Unlike the paper's, the search
# goes on after a candidate that cannot be parsed, as "**18**" cannot.
EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})+)\}")
# Upper case only: "a" may be an article.
SAID = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?(?:\s+option)?\b)[\s:*]*(\(?\$?(?:\\text\{)?[A-J]\b)")
LETTER = re.compile(
    r"[\s*$({]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)*(?:[Oo]ption\s+)?\(?([A-Ja-j])"
    r"(?=[\s.):,*$}]|$)(?!\s*=)(?!\W*(?:,|and|or|&)\W*[A-J](?![A-Za-z]))"
)


def after_thoughts(text: str) -> str:
    """What an answer says after its thoughts; nothing where it is still thinking."""
    text = text.rsplit("</think>", 1)[-1]
    return "" if "<think>" in text else text


def read_math(gold: str) -> list[Any]:
    """The right answer as math-verify's expressions. In the main thread only: its time limit is a signal.

    Args:
        gold: LaTeX or plain, with or without dollars.

    Raises:
        ValueError: it cannot be read.
    """
    found: list[Any] = parse(rf"\boxed{{{_scientific(gold)}}}", EXTRACTION, parsing_timeout=SECONDS)
    if not found:
        raise ValueError(f"the answer {gold!r} cannot be read as mathematics; write it as LaTeX")
    return found


def grade_math(gold: str, text: str) -> Grade:
    """Grade a mathematical answer.

    Args:
        gold: the right answer, as in `read_math`.
        text: the whole answer.
    """
    wanted = read_math(gold)
    found = parse(_scientific(_last_box(after_thoughts(text))), EXTRACTION, parsing_timeout=SECONDS)
    if not found:
        return "unparsed"
    return "right" if verify(wanted, found, timeout_seconds=SECONDS) else "wrong"


def _last_box(text: str) -> str:
    """What follows the last box but one: math-verify makes a set of boxes that are close to each other."""
    boxes = list(BOXED.finditer(text))
    return text[boxes[-2].end() :] if len(boxes) > 1 else text


def _scientific(text: str) -> str:
    """1e-3 in LaTeX; math-verify reads Euler's number."""
    return SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)


def grade_choice(gold: str, text: str, choices: int) -> Grade:
    """Grade a letter.

    Args:
        gold: the right letter.
        text: the whole answer.
        choices: how many letters there are to choose from, beginning with A.
    """
    found = letter_of(text, choices)
    return "unparsed" if found is None else "right" if found == gold else "wrong"


def letter_of(text: str, choices: int) -> str | None:
    """The letter an answer settles on: in its last box, else after its last "answer is", else all that it says.

    math-verify finds none in a box or in parentheses.
    """
    text = after_thoughts(text).strip()
    boxed, said = BOXED.findall(text), SAID.findall(text)
    settled = boxed[-1] if boxed else said[-1] if said else text if len(text) <= 4 else ""
    found = LETTER.match(settled)
    letter = found[1].upper() if found else ""
    return letter if letter and letter in LETTERS[:choices] else None
