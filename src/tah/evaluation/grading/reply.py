"""What a model's reply states in the end: its last box, a list of boxes, or "the answer is ..."; and its verdict."""

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


# -- several boxes, and none -------------------------------------------------------------------------------------------

# Between two boxes of one list: marks, "and", "x =", and words that only point. One alternative fits at each place, so
# that this takes time in proportion to the text.
POINTING = (
    "and|or|also|as|well|both|either|the|other|another|one|first|second|third|next|last|is|are|solutions?|roots?|values?|numbers?|"
    "answers?|text|quad|qquad|mathrm|textbf|respectively|we|have|case|if|when|while|for|in"
)
LIST = re.compile(
    rf"(?:[\s$,;&*~{{}}()\[\]!|>•–—-]|\\(?=[a-zA-Z\\,;:!\s()\[\]])|\b(?:{POINTING})\b|\b[a-zA-Z](?:_\{{?\w+\}}?)?\s?=|"
    rf"\b\d{{1,2}}\.(?=\s))*",
    re.IGNORECASE,
)
JOINED = re.compile(
    r"(?:,|;|\band\b|\bor\b)(?:[\s$({\[}*]|\\[,;:! (\[{]|\\text\b|\b[a-zA-Z](?:_\{?\w+\}?)?\s?=)*$", re.IGNORECASE
)
SEPARATE = re.compile(  # says more than a list would: a step, a doubt, another sentence
    r"[.!?:=]\s|\b(?:not|no|but|so|then|hence|thus|therefore|wrong|wait|which|gives|becomes|hmm|actually|rather|sorry|correct|mean|get)\b",
    re.IGNORECASE,
)
# After a doubt, what was boxed before is no longer said; nor after a conclusion, unless it is that of another part
DENIAL = re.compile(
    r"\b(?:instead|correction|corrected|wrong|mistake|mistaken|sorry|incorrect|rather|oops|not right|not correct|"
    r"misread|does(?:n't| not)|fails?|failed|invalid|extraneous|discard\w*|reject\w*|errors?|redo|upon|review\w*|"
    r"attempts?|should be|left with|only (?:valid|correct|acceptable|admissible|feasible)|but the (?:\w+ )?answers?)\b|"
    r"\bno[,:]\s|\bonly[\s$(]*(?:[a-z]\s?=\s?)?$",
    re.IGNORECASE,
)
HESITATION = re.compile(
    r"\b(?:wait|actually|hmm|recheck|reconsider|let me (?:re|try|check|double)\w*)\b", re.IGNORECASE
)
ADDITION = re.compile(r"\b(?:but|and|is|are|we|have|get) also\b[^.!?\n]{0,40}$", re.IGNORECASE)
CONCLUSION = re.compile(
    r"\b(?:final answers?|(?:the|our|my) (?:answers?|solutions?) (?:is|are)|total of|in total|altogether|"
    r"(?:so|thus|hence|therefore),? (?:the|our|my|all|both))\b",
    re.IGNORECASE,
)
ANOTHER = re.compile(
    r"\b(?:part|case|question|problem|second|third|other|another|larger|smaller|largest|smallest)\b|\([b-e]\)|\b[2-9]\.",
    re.IGNORECASE,
)
# Said behind a list: one of its members is left
ONE_IS_LEFT = re.compile(
    r"(?<!\bthe )\bonly (?:the )?(?:first|second|third|last|former|latter|one|positive|negative|larger|smaller|"
    r"[$\\(]*[a-z]?\s?=?\s?-?\d+)(?![\d.])(?! (?:\w+ )?(?:solutions?|roots?|values?|numbers?)\b)",
    re.IGNORECASE,
)
MINUS_BEFORE = re.compile(r"(?:^|[\s$=(\[])-$|[$=(\[]\s*-\s?$")
FACTOR_AFTER = re.compile(r"\s?\\pi(?![a-zA-Z])|_(?:\{\d+\}|\d+)|[xyz](?!\w)")
FARTHEST = 200  # characters between two boxes of one list
ANSWER = re.compile(
    r"\banswers?\b(?:[^.\n:]{0,40}?(?:\bis\b|\bare\b|:)|"
    r"\s+(?=(?:can|could|must|should|will|is|are) ?n['o]))[\s*]*([^\n]+)",
    re.IGNORECASE,
)
# "not 42, it is 43" says 43
NOT_BUT = re.compile(
    r"^not\b[^,;]*?(?:[,;]\s*|\s(?=but\b|rather\b))(?:but|it is|it's|rather|instead)(?: rather)?\s+(?=\S)",
    re.IGNORECASE,
)
# A phrase that holds a number and does not say that this is the answer: "at least 5", "3 or 5", "10x"
BOUND = re.compile(
    r"^[^\d\\]*(?:\b(?:not|cannot|least|most|more|less|fewer|greater|larger|"
    r"smaller|between|neither|either|whether|up to|over|under)\b|n't\b)",
    re.IGNORECASE,
)
SEVERAL = re.compile(
    r"\d(?:\s*[a-zA-Z]+(?=\s+(?:or|and)\b)|[\s$*)\]}\\]*)(?:,\s+|"
    r",?\s*\b(?:or|and|to|out of)\b\s*)[\s$*(\[{]*(?:[a-z]\s?=\s?)?[-\\]?[\d\\]",
    re.IGNORECASE,
)
REASON = re.compile(r",?\s+(?:because|since|as|which|so|when|after|per|that)\b.*", re.IGNORECASE)
NUMBER = re.compile(r"[$(\s]*(?:\\[(\[])?\s*(?:[a-zA-Z]\s?=\s?)?(?:-?[\d.]|\\(?!boxed)[a-zA-Z])")
FORMULA = re.compile(r"[\w\s+\-*/^!.,$()\[\]{}\\]*", re.ASCII)
LONG_NAME = re.compile(r"(?<!\\)\b[a-zA-Z]{2,}")
SENTENCE = re.compile(r"[.!](?=\s|\*|$)")
MOST = 64  # different boxes of one statement; a model that repeats itself may write one a thousand times


def final_boxes(text: str, found: list[Box]) -> list[list[str]]:
    r"""The contents of the boxes that a reply may state in the end: of its last list, then of all since a correction.

    `\boxed{1} or \boxed{2}` is a list; `\boxed{7}. Wait, no: \boxed{12}` ends in a list of one, and only that.

    Args:
        text: the reply without its thoughts.
        found: its boxes, of which there is one at least.
    """
    between = [text[one.end : other.start] for one, other in zip(found, found[1:], strict=False)]
    listed = since = len(found) - 1
    while listed > 0 and _is_list(between[listed - 1]):
        listed -= 1
    while since > 0 and not _takes_back(between[since - 1]):
        since -= 1
    spans = [found[listed:], found[since:]] if since < listed else [found[listed:]]
    if ONE_IS_LEFT.search(text[found[-1].end : found[-1].end + FARTHEST]):
        spans = [span for span in spans if len(span) == 1]  # no list stands
    distinct = [list(dict.fromkeys(_with_neighbours(text, box) for box in span)) for span in spans]
    return [contents for contents in distinct if len(contents) <= MOST]


def _with_neighbours(text: str, box: Box) -> str:
    r"""The content of a box with the sign before it and the factor or base after it: `-\boxed{12}`, `\boxed{12}\pi`."""
    sign = "-" if MINUS_BEFORE.search(text[max(0, box.start - 4) : box.start]) else ""
    after = FACTOR_AFTER.match(text, box.end)
    return f"{sign}{box.content}{after[0] if after else ''}"


def _is_list(between: str) -> bool:
    """Whether two boxes with this between them are of one list."""
    joined = len(between) <= 40 and JOINED.search(between) and not SEPARATE.search(between)
    return len(between) <= FARTHEST and bool(joined or LIST.fullmatch(between))


def _takes_back(between: str) -> bool:
    """Whether the box before this text is no longer stated by the one behind it."""
    doubt = DENIAL.search(between) or (HESITATION.search(between) and not ADDITION.search(between))
    return bool(doubt or (CONCLUSION.search(between) and not ANOTHER.search(between)))


def corrected_number(text: str) -> str | None:
    """The number that "the answer is ..." gives after a doubt behind the last box; None without doubt or number."""
    doubt = DENIAL.search(text) or HESITATION.search(text)
    found = ANSWER.findall(text[doubt.end() :][-2000:]) if doubt else []
    phrase = REASON.sub("", _sentence(found[-1])) if found else ""
    return phrase if len(phrase) <= 40 and NUMBER.match(phrase) else None


def is_no_value(phrase: str) -> bool:
    """Whether what follows "the answer is" denies, bounds or lists numbers, or is a formula instead of a number."""
    letters = re.sub(r"\\[a-zA-Z]+", "", phrase)
    formula = FORMULA.fullmatch(letters) and not LONG_NAME.search(letters)
    return bool(BOUND.search(phrase) or SEVERAL.search(phrase) or formula)


def _sentence(phrase: str) -> str:
    """The first sentence."""
    end = SENTENCE.search(phrase)
    return NOT_BUT.sub("", phrase[: end.start() if end else None].strip("* "))


def answer_phrase(text: str) -> tuple[str | None, bool]:
    """Of a reply without boxes: what follows the last "the answer is", or all of one short line; None without either.
    And whether the reply speaks of an answer.
    """
    tail = text[-2000:].strip()
    if phrases := ANSWER.findall(tail):
        phrase = phrases[-1]
        end = SENTENCE.search(phrase)
        rest = tail[tail.rindex(phrase) + (end.end() if end else len(phrase)) :]
        return (None if re.search(r"\d", rest) else _sentence(phrase)), True
    return (tail.strip("*# ") if len(text) <= 80 and "\n" not in text.strip() else None), False
