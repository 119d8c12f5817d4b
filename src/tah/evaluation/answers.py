"""Whether a mathematical answer is right: math-verify, and what it reads wrongly.

`letters.py` grades letters; its `grade_choice` can be imported from here too.
"""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

from .letters import grade_choice as grade_choice
from .reply import Grade, Verdict, after_thoughts, boxes

SECONDS = 5  # for each of parsing and comparing; an expression may be made to explode
# The paper's order (spec D.1): boxed LaTeX before other LaTeX before plain numbers. Unlike the paper's, the search
# goes on after a candidate that cannot be parsed, as "**18**" cannot.
EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])")


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
    """The grade of `judge_math`."""
    return judge_math(gold, text).grade


def judge_math(gold: str, text: str) -> Verdict:
    """Grade a mathematical answer.

    Args:
        gold: the right answer, as in `read_math`.
        text: the whole answer.
    """
    wanted = read_math(gold)
    said = _last_box(after_thoughts(text))
    found = parse(_scientific(said), EXTRACTION, parsing_timeout=SECONDS)
    if not found:
        return Verdict("unparsed")
    return Verdict("right" if verify(wanted, found, timeout_seconds=SECONDS) else "wrong", str(found[-1]))


def _last_box(text: str) -> str:
    """What follows the last box but one: math-verify makes a set of boxes that are close to each other."""
    found = list(boxes(text))
    return text[found[-2].end :] if len(found) > 1 else text


def _scientific(text: str) -> str:
    """1e-3 in LaTeX; math-verify reads Euler's number."""
    return SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
