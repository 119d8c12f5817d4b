r"""Grading of mathematical answers.

The final statement of the reply (`reply.py`) is normalized and split into values (`notation.py`, `values.py`). Each
value is compared with a value of the right answer (`expressions.py`): by math-verify if both can be parsed completely,
else as text.

`choice.py` grades letters. Its `grade_choice` can also be imported from here.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from math_verify.errors import TimeoutException
from math_verify.parser import (
    ExprExtractionConfig,
    LatexExtractionConfig,
    extract_target_from_pred,
    get_extraction_regexes,
)
from math_verify.utils import timeout

from .grading.choice import grade_choice as grade_choice
from .grading.expressions import LONGEST, equal, is_whole, matched, plain_text, read, region, same, unknowns
from .grading.notation import SIGNS, inner, members, normalized, split_list
from .grading.reply import (
    Grade,
    Verdict,
    after_thoughts,
    answer_phrase,
    boxes,
    corrected_number,
    final_boxes,
    is_no_value,
)
from .grading.values import TUPLE, Value, coordinates, named_values, read_value, same_coordinates, same_unit

SECONDS = 5  # time limit of parsing and comparing together; some expressions would take forever
# For replies without a box, in the paper's order: LaTeX before plain numbers. Unlike in the paper, the search continues
# after a candidate that cannot be parsed, such as "**18**".
EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
INEQUALITY = re.compile(r"[<>]|\\(?:leq|geq|ne|cup|setminus|cap)(?![a-zA-Z])|[(\[].*,.*[)\]]")
PROSE = {
    sign: to for sign, to in SIGNS.items() if to in (" ", "") or sign == ord("\u2212")
}  # in prose a dash is not a minus
GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+")  # a number with commas between thousands, or a list without spaces
DECIMAL_COMMA = re.compile(r"-?\d+,(?!\d{3}$)\d+|-?0,\d+")  # 3,14; but 3,000 is three thousand
MOST = 4  # maximum number of forms in which an answer gives one value
SHOWN = 1000  # maximum length of an extracted answer in characters


@dataclass(frozen=True)
class Gold:
    """A right answer.

    Args:
        text: Whole answer, normalized.
        values: One or several values. Their order does not matter.
        mathematics: Whether every value can be parsed as mathematics. Otherwise values are compared as text.
    """

    text: str
    values: tuple[Value, ...]
    mathematics: bool

    @property
    def reason(self) -> str | None:
        """Reason of verdicts on answers to this question, or None."""
        return None if self.mathematics else "compared as text"


def read_math(gold: str) -> Gold:
    """Parse a right answer. Call it in the main thread only, because its time limit uses a signal.

    Args:
        gold: LaTeX or plain text, with or without dollar signs. Several values are joined by commas, "and" or "or", or
            form a set.

    Raises:
        ValueError: The answer is neither mathematics nor words.
        RuntimeError: The caller is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("mathematics can be graded in the main thread only; use one process per grader instead")
    try:
        return _read_math(gold)
    except TimeoutException:  # not cached: on a less busy machine the time may suffice
        return Gold(*_cut(gold), False)


@functools.lru_cache(maxsize=65536)
def _read_math(gold: str) -> Gold:
    text, values = _cut(gold)
    try:
        known = timeout(SECONDS)(lambda: all(is_whole(value.bare) for value in values))()
    except RecursionError:
        known = False
    return Gold(text, values, known)


def _cut(gold: str) -> tuple[str, tuple[Value, ...]]:
    """Return the normalized text of a right answer, and its values."""
    text = normalized(gold)
    balanced = len(re.findall(r"(?<!\\)\{", text)) == len(re.findall(r"(?<!\\)\}", text))
    if not balanced or not re.search(r"\w", text.replace(r"\boxed", "")):
        raise ValueError(f"the answer {gold!r} cannot be parsed as mathematics; write it as LaTeX")
    return text, tuple(_unlike([read_value(part, gold=True) for part in members(text)], _same_text))


def grade_math(gold: str, text: str) -> Grade:
    """Return the grade of `judge_math`."""
    return judge_math(gold, text).grade


def judge_math(gold: str, text: str) -> Verdict:
    """Return the verdict on a mathematical answer. Call it in the main thread only, like `read_math`.

    Args:
        gold: Right answer, as in `read_math`.
        text: Whole answer, with its thoughts.

    Raises:
        ValueError: The right answer cannot be parsed.
        RuntimeError: The caller is not the main thread.
    """
    started = time.monotonic()
    wanted = read_math(gold)
    # "90,120" is a number of five digits, unless a reply has 90 and 120 in a box each. The list is parsed here, because
    # parsing has its own time limit and there is only one signal.
    listed = read_math(wanted.text.replace(",", ", ")) if GROUPED.fullmatch(wanted.text) else None
    reply = after_thoughts(text)
    found = boxes(reply)
    stated = final_boxes(reply, found) if found else []
    if found and (later := corrected_number(reply[found[-1].end :])):
        stated = [[later]]
    shown = ", ".join(stated[0])[:SHOWN] if stated else None
    limit = max(1, round(SECONDS - (time.monotonic() - started)))
    try:
        return timeout(limit)(lambda: _boxed(wanted, listed, stated) if found else _unboxed(wanted, reply))()
    except (TimeoutException, RecursionError) as error:
        why = f"the comparison took more than {limit} s" if isinstance(error, TimeoutException) else "nested too deeply"
        return Verdict("wrong" if shown else "unparsed", shown, why)


def _boxed(gold: Gold, listed: Gold | None, stated: list[list[str]]) -> Verdict:
    """Return the verdict on boxes.

    Args:
        gold: Right answer.
        listed: Right answer as a list, if its commas can also separate values.
        stated: Contents of boxes, as from `final_boxes`.
    """
    if not stated:
        return Verdict("wrong", None, "its boxes do not form one answer")
    # A right answer of one value must be in the last list: a box on the way to it is not a part of it
    for parts in stated if len(gold.values) > 1 else stated[:1]:
        if _is_right(gold, parts):
            return Verdict("right", ", ".join(parts)[:SHOWN], gold.reason)
    last = stated[0]
    shown = ", ".join(last)[:SHOWN]
    # Number of values that are separated by boxes or words, not only by commas between digits
    apart = len(last) if len(last) > 1 else len(members(normalized(last[0][:LONGEST])))
    if listed and apart == len(listed.values) and _is_right(listed, last):
        return Verdict("right", shown, "the right answer counts as a list")
    return Verdict("wrong", shown, gold.reason)


def _unboxed(gold: Gold, reply: str) -> Verdict:
    """Return the verdict on a reply without a box: the text after "the answer is", else the result of math-verify."""
    phrase, named = answer_phrase(reply)
    if phrase and _is_right(gold, [phrase]):
        return Verdict("right", phrase, gold.reason)
    if phrase and named and is_no_value(phrase):  # its first number is not the answer
        return Verdict("wrong", phrase[:SHOWN], gold.reason)
    text = reply.translate(PROSE).replace(r"\$", "")
    try:
        found = extract_target_from_pred(text, get_extraction_regexes(EXTRACTION), fallback_mode="first_match")
    except Exception:  # any type, for example for a number of a hundred thousand digits
        found = []
    if not found:
        return Verdict("wrong", phrase, gold.reason) if phrase and gold.reason else Verdict("unparsed")
    if not gold.mathematics or isinstance(found[0], str):
        return Verdict("wrong", str(found[-1])[:SHOWN], gold.reason)
    several = len(gold.values) > 1 and isinstance(found[0], (sympy.FiniteSet, sympy.Tuple))
    values = list(found[0]) if several else found[:1]
    right = matched([read(value.bare) for value in gold.values], values, same)
    return Verdict("right" if right else "wrong", str(found[-1])[:SHOWN])


# -- values ----------------------------------------------------------------------------------------------------------


def _is_right(gold: Gold, parts: Sequence[str]) -> bool:
    """Return whether the boxes of a statement contain the right answer."""
    parts = [re.sub(r"\s+", " ", part) for part in parts]
    if sum(map(len, parts)) > LONGEST:
        return False
    texts = [normalized(part) for part in parts]
    values = [read_value(value) for text in texts for value in members(text)]
    if _names(gold.values) == len(gold.values) > 1 and not _names(values):
        return _for_names(gold, values)  # x=1, y=2 without its names
    if len(gold.values) == 1 and (_one_whole(gold.values[0], texts) or _in_order(gold.values[0], texts, values)):
        return True
    return _values_match(gold, values) or _same_region(gold.text, r" \text{ or } ".join(texts))


def _one_whole(gold: Value, texts: Sequence[str]) -> bool:
    """Return whether the only text is the value with its commas: arguments of a function, a decimal comma."""
    forms = [texts[0], texts[0].replace(",", ".")] if DECIMAL_COMMA.fullmatch(texts[0]) else [texts[0]]
    return len(texts) == 1 and any(_alike(gold, read_value(form)) for form in forms)


def _in_order(gold: Value, texts: Sequence[str], values: Sequence[Value]) -> bool:
    """Return whether the values are the coordinates of the right answer, a tuple."""
    if len(values) < 2 or (len(texts) == 1 and inner(texts[0], r"\{") is not None):  # a set has no order
        return False
    wanted = coordinates(gold.text, gold=True)
    return wanted is not None and same_coordinates(wanted, named_values(values), _alike)


def _values_match(gold: Gold, values: list[Value]) -> bool:
    """Return whether both sides have the same values."""
    if len(values) == 1 and len(gold.values) > 1 and (within := inner(values[0].text, "(")):
        values = [read_value(part) for part in split_list(within)]  # (1, -2) for both of them
    values = _unlike(values, _same_text)
    if len(gold.values) < len(values) <= MOST * len(gold.values):  # some values may be one value in two forms
        values = _unlike(values, _alike)
    return matched(gold.values, values, _alike)


def _names(values: Sequence[Value]) -> int:
    """Return the number of different names of the values, such as x in x=1."""
    return len({name for name, _ in named_values(values) if name})


def _for_names(gold: Gold, values: list[Value]) -> bool:
    """Return whether a tuple, or values without names in the same order, equal the named values of the right answer."""
    wanted = named_values(gold.values)
    if len(values) == 1 and (found := coordinates(values[0].text)):
        return same_coordinates(wanted, found, _alike)
    if len(values) == 1:  # one value for all names
        values = values * len(wanted)
    return len(wanted) == len(values) and all(map(_alike, (value for _, value in wanted), values))


def _same_region(gold: str, text: str) -> bool:
    """Return whether both texts describe the same numbers, as inequalities or intervals."""
    if not (INEQUALITY.search(gold) and INEQUALITY.search(text)) or TUPLE.match(gold) or TUPLE.match(text):
        return False
    unknown = unknowns(gold), unknowns(text)
    if all(unknown) and unknown[0] != unknown[1]:
        return False
    try:
        one, other = region(gold), region(text)
        if one is None or other is None:
            return False
        return one == other or one.symmetric_difference(other).is_empty is True
    except Exception:  # sympy raises any type if it cannot join or compare sets
        return False


def _alike(gold: Value, value: Value) -> bool:
    """Return whether two values are equal, with equal units if both have one."""
    units = (gold.unit or value.unit) and same_unit(gold.unit, value.unit)
    return bool(units and equal(gold.bare, value.bare)) or equal(gold.text, value.text)


def _same_text(one: Value, other: Value) -> bool:
    return plain_text(one.text) == plain_text(other.text)


def _unlike(values: Sequence[Value], alike: Callable[[Any, Any], bool]) -> list[Value]:
    """Return the values without repetitions."""
    kept: list[Value] = []
    for value in values:
        if not any(alike(one, value) for one in kept):
            kept.append(value)
    return kept
