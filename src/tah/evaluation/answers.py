r"""Whether a mathematical answer is right.

What the reply states (`reply.py`) is normalized and cut into values (`notation.py`, `values.py`). Each value is
compared with one of the right answer's, by math-verify where both can be read whole, else as text (`expressions.py`).

`choice.py` grades letters; its `grade_choice` can be imported from here too.
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

SECONDS = 5  # for reading and comparing together; an expression may be made to explode
# For replies without a box, in the paper's order: LaTeX before plain numbers. Unlike the paper's, the search goes on
# after a candidate that cannot be parsed, as "**18**" cannot.
EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
INEQUALITY = re.compile(r"[<>]|\\(?:leq|geq|ne|cup|setminus|cap)(?![a-zA-Z])|[(\[].*,.*[)\]]")
PROSE = {sign: to for sign, to in SIGNS.items() if to in (" ", "") or sign == ord("\u2212")}  # a dash is no minus there
GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+")  # a number with commas between thousands, or a list without spaces
DECIMAL_COMMA = re.compile(r"-?\d+,(?!\d{3}$)\d+|-?0,\d+")  # 3,14; but 3,000 is three thousand
MOST = 4  # forms in which an answer may give the same value
SHOWN = 1000  # characters of an extracted answer


@dataclass(frozen=True)
class Gold:
    """A right answer.

    Args:
        text: all of it, normalized.
        values: one, or several, of which the order does not matter.
        mathematics: each value can be read as mathematics; else it is compared as text.
    """

    text: str
    values: tuple[Value, ...]
    mathematics: bool

    @property
    def reason(self) -> str | None:
        """Of verdicts on answers to this one."""
        return None if self.mathematics else "compared as text"


def read_math(gold: str) -> Gold:
    """Read the right answer. This works in the main thread only, because the time limit is a signal.

    Args:
        gold: LaTeX or plain, with or without dollars; several values with commas, "and", "or", or as a set.

    Raises:
        ValueError: it cannot be read, neither as mathematics nor as words.
        RuntimeError: it was called in another thread than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("mathematics is graded in the main thread only; use a process for each grader instead")
    try:
        return _read_math(gold)
    except TimeoutException:  # is not remembered: on a machine that is less busy the time may suffice
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
    """The text of a right answer, normalized, and its values."""
    text = normalized(gold)
    balanced = len(re.findall(r"(?<!\\)\{", text)) == len(re.findall(r"(?<!\\)\}", text))
    if not balanced or not re.search(r"\w", text.replace(r"\boxed", "")):
        raise ValueError(f"the answer {gold!r} cannot be read as mathematics; write it as LaTeX")
    return text, tuple(_unlike([read_value(part, gold=True) for part in members(text)], _same_text))


def grade_math(gold: str, text: str) -> Grade:
    """The grade of `judge_math`."""
    return judge_math(gold, text).grade


def judge_math(gold: str, text: str) -> Verdict:
    """Grade a mathematical answer. This works in the main thread only, as `read_math` does.

    Args:
        gold: the right answer, as in `read_math`.
        text: the whole answer.

    Raises:
        ValueError: the right answer cannot be read.
        RuntimeError: it was called in another thread than the main one.
    """
    started = time.monotonic()
    wanted = read_math(gold)
    # "90,120" is a number of five digits, unless a reply gives 90 and 120 in a box each. It is read here: reading has
    # a time limit of its own, and there is one signal only
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
        why = f"comparing took more than {limit} s" if isinstance(error, TimeoutException) else "nested too deeply"
        return Verdict("wrong" if shown else "unparsed", shown, why)


def _boxed(gold: Gold, listed: Gold | None, stated: list[list[str]]) -> Verdict:
    """What the boxes give; `listed` is the right answer as a list where its commas may separate."""
    if not stated:
        return Verdict("wrong", None, "its boxes are no one answer")
    # A right answer of one value is looked for in the last list only: what was boxed on the way is no part of it
    for parts in stated if len(gold.values) > 1 else stated[:1]:
        if _is_right(gold, parts):
            return Verdict("right", ", ".join(parts)[:SHOWN], gold.reason)
    last = stated[0]
    shown = ", ".join(last)[:SHOWN]
    # Values that boxes or a word set apart, not only commas between digits
    apart = len(last) if len(last) > 1 else len(members(normalized(last[0][:LONGEST])))
    if listed and apart == len(listed.values) and _is_right(listed, last):
        return Verdict("right", shown, "the right answer is read as a list")
    return Verdict("wrong", shown, gold.reason)


def _unboxed(gold: Gold, reply: str) -> Verdict:
    """Without a box: what follows "the answer is", else what math-verify finds."""
    phrase, named = answer_phrase(reply)
    if phrase and _is_right(gold, [phrase]):
        return Verdict("right", phrase, gold.reason)
    if phrase and named and is_no_value(phrase):  # its first number is not the answer
        return Verdict("wrong", phrase[:SHOWN], gold.reason)
    text = reply.translate(PROSE).replace(r"\$", "")
    try:
        found = extract_target_from_pred(text, get_extraction_regexes(EXTRACTION), fallback_mode="first_match")
    except Exception:  # of any type, as of a number of a hundred thousand digits
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
    """Whether the boxes of a statement hold the right answer."""
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
    """Whether the one text is the value, commas and all: a function's arguments, a decimal comma."""
    forms = [texts[0], texts[0].replace(",", ".")] if DECIMAL_COMMA.fullmatch(texts[0]) else [texts[0]]
    return len(texts) == 1 and any(_alike(gold, read_value(form)) for form in forms)


def _in_order(gold: Value, texts: Sequence[str], values: Sequence[Value]) -> bool:
    """Whether the values are the coordinates of the right answer, a tuple."""
    if len(values) < 2 or (len(texts) == 1 and inner(texts[0], r"\{") is not None):  # a set has no order
        return False
    wanted = coordinates(gold.text, gold=True)
    return wanted is not None and same_coordinates(wanted, named_values(values), _alike)


def _values_match(gold: Gold, values: list[Value]) -> bool:
    """Whether each value of the one is a value of the other."""
    if len(values) == 1 and len(gold.values) > 1 and (within := inner(values[0].text, "(")):
        values = [read_value(part) for part in split_list(within)]  # (1, -2) for both of them
    values = _unlike(values, _same_text)
    if len(gold.values) < len(values) <= MOST * len(gold.values):  # some may be one value in two forms
        values = _unlike(values, _alike)
    return matched(gold.values, values, _alike)


def _names(values: Sequence[Value]) -> int:
    """How many different names the values have, as x in x=1."""
    return len({name for name, _ in named_values(values) if name})


def _for_names(gold: Gold, values: list[Value]) -> bool:
    """Whether a tuple, or values without names in the same order, are those of the names of the right answer."""
    wanted = named_values(gold.values)
    if len(values) == 1 and (found := coordinates(values[0].text)):
        return same_coordinates(wanted, found, _alike)
    if len(values) == 1:  # the same for all
        values = values * len(wanted)
    return len(wanted) == len(values) and all(map(_alike, (value for _, value in wanted), values))


def _same_region(gold: str, text: str) -> bool:
    """Whether both describe the same numbers: an inequality and an interval, several of them."""
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
    except Exception:  # sympy's, of any type, where it cannot join or compare them
        return False


def _alike(gold: Value, value: Value) -> bool:
    """Whether two values are the same, and their units where both have one."""
    units = (gold.unit or value.unit) and same_unit(gold.unit, value.unit)
    return bool(units and equal(gold.bare, value.bare)) or equal(gold.text, value.text)


def _same_text(one: Value, other: Value) -> bool:
    return plain_text(one.text) == plain_text(other.text)


def _unlike(values: Sequence[Value], alike: Callable[[Any, Any], bool]) -> list[Value]:
    """The values without repetitions."""
    kept: list[Value] = []
    for value in values:
        if not any(alike(one, value) for one in kept):
            kept.append(value)
    return kept
