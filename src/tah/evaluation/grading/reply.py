"""The final statement of a model's reply: its last box, a list of boxes, or "the answer is ..."."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Grade = Literal["right", "wrong", "unparsed", "untestable"]

BRACE = re.compile(r"(?P<box>\\{1,2}(?:f?boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)  # an escaped brace is text
# Content of a box that is only mentioned: "the answer in \boxed{}", "as \boxed{...}"
PLACEHOLDER = re.compile(r"(?:[\s.?_~]|\\[,;:! ]|\\[lc]?dots\b|\\text\s*\{\s*\})*")


@dataclass(frozen=True)
class Verdict:
    """The grade of one reply, with its reason.

    Args:
        grade: `right`, `wrong`, `unparsed` (the reply has no answer), or `untestable` (the tests of the item cannot
            run). All but `right` count as not right.
        extracted: Answer in the reply, as text; None if there is none.
        reason: Reason in one line; None if the grade follows from `extracted` and the right answer.
    """

    grade: Grade
    extracted: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Box:
    r"""A `\boxed{content}` in a text, at `text[start:end]`."""

    start: int
    end: int
    content: str


def after_thoughts(text: str) -> str:
    """Return the reply without its thoughts; an empty string if the thoughts do not end."""
    text = text.rsplit("</think>", 1)[-1]
    return "" if "<think>" in text else text


def boxes(text: str) -> list[Box]:
    r"""Return the boxes of a text in order.

    Braces may be nested to any depth. A box inside a box is part of its content. Boxes that are not closed or have no
    content (`\boxed{}`, `\boxed{...}`) are left out.
    """
    opened: list[tuple[int, int] | None] = []  # per open brace: start of its box and of the content, or None
    found: list[tuple[int, int, int, int]] = []
    for brace in BRACE.finditer(text):
        if brace[0] == "}":
            if opened and (box := opened.pop()):
                while found and found[-1][0] > box[0]:  # each box is dropped at most once, so the time is linear
                    found.pop()
                found.append((*box, brace.start(), brace.end()))
        elif brace["box"]:
            opened.append(brace.span())
        elif brace[0] == "{":
            opened.append(None)
    whole = (Box(start, end, text[inner:inner_end]) for start, inner, inner_end, end in found)
    return [box for box in whole if not PLACEHOLDER.fullmatch(box.content)]


# -- several boxes, and none -------------------------------------------------------------------------------------------

# Text between two boxes of one list: punctuation, "and", "x =", and words without a statement. Only one alternative can
# match at each place, so the time is linear in the length of the text.
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
SEPARATE = re.compile(  # more than a list has: a step, a doubt, another sentence
    r"[.!?:=]\s|\b(?:not|no|but|so|then|hence|thus|therefore|wrong|wait|which|gives|becomes|hmm|actually|rather|sorry|correct|mean|get)\b",
    re.IGNORECASE,
)
# A doubt withdraws the boxes before it. So does a conclusion, unless it is that of another part.
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
# Text after a list that leaves one of its members
ONE_IS_LEFT = re.compile(
    r"(?<!\bthe )\bonly (?:the )?(?:first|second|third|last|former|latter|one|positive|negative|larger|smaller|"
    r"[$\\(]*[a-z]?\s?=?\s?-?\d+)(?![\d.])(?! (?:\w+ )?(?:solutions?|roots?|values?|numbers?)\b)",
    re.IGNORECASE,
)
MINUS_BEFORE = re.compile(r"(?:^|[\s$=(\[])-$|[$=(\[]\s*-\s?$")
FACTOR_AFTER = re.compile(r"\s?\\pi(?![a-zA-Z])|_(?:\{\d+\}|\d+)|[xyz](?!\w)")
FARTHEST = 200  # maximum number of characters between two boxes of one list
ANSWER = re.compile(
    r"\banswers?\b(?:[^.\n:]{0,40}?(?:\bis\b|\bare\b|:)|"
    r"\s+(?=(?:can|could|must|should|will|is|are) ?n['o]))[\s*]*([^\n]+)",
    re.IGNORECASE,
)
# "not 42, it is 43" states 43
NOT_BUT = re.compile(
    r"^not\b[^,;]*?(?:[,;]\s*|\s(?=but\b|rather\b))(?:but|it is|it's|rather|instead)(?: rather)?\s+(?=\S)",
    re.IGNORECASE,
)
# A phrase with a number that is not the answer: "at least 5", "3 or 5", "10x"
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
MOST = 64  # maximum number of different boxes of one statement; equal boxes count once


def final_boxes(text: str, found: list[Box]) -> list[list[str]]:
    r"""Return the contents of the boxes that can be the final statement of a reply.

    The first candidate is the last list of boxes. The second one has all boxes since the last correction, if these are
    more. `\boxed{1} or \boxed{2}` is a list. `\boxed{7}. Wait, no: \boxed{12}` ends with a list of one box, the only
    candidate.

    Args:
        text: Reply without its thoughts.
        found: Boxes of the reply, at least one.
    """
    between = [text[one.end : other.start] for one, other in zip(found, found[1:], strict=False)]
    listed = since = len(found) - 1
    while listed > 0 and _is_list(between[listed - 1]):
        listed -= 1
    while since > 0 and not _takes_back(between[since - 1]):
        since -= 1
    spans = [found[listed:], found[since:]] if since < listed else [found[listed:]]
    if ONE_IS_LEFT.search(text[found[-1].end : found[-1].end + FARTHEST]):
        spans = [span for span in spans if len(span) == 1]  # the reply withdraws all but one member of a list
    distinct = [list(dict.fromkeys(_with_neighbours(text, box) for box in span)) for span in spans]
    return [contents for contents in distinct if len(contents) <= MOST]


def _with_neighbours(text: str, box: Box) -> str:
    r"""Return the content of a box with a sign before and a factor or base after it: `-\boxed{12}`, `\boxed{12}\pi`."""
    sign = "-" if MINUS_BEFORE.search(text[max(0, box.start - 4) : box.start]) else ""
    after = FACTOR_AFTER.match(text, box.end)
    return f"{sign}{box.content}{after[0] if after else ''}"


def _is_list(between: str) -> bool:
    """Return whether two boxes with this text between them belong to one list."""
    joined = len(between) <= 40 and JOINED.search(between) and not SEPARATE.search(between)
    return len(between) <= FARTHEST and bool(joined or LIST.fullmatch(between))


def _takes_back(between: str) -> bool:
    """Return whether a text between two boxes withdraws the first box."""
    doubt = DENIAL.search(between) or (HESITATION.search(between) and not ADDITION.search(between))
    return bool(doubt or (CONCLUSION.search(between) and not ANOTHER.search(between)))


def corrected_number(text: str) -> str | None:
    """Return the number of "the answer is ..." after a doubt that follows the last box; None if there is none."""
    doubt = DENIAL.search(text) or HESITATION.search(text)
    found = ANSWER.findall(text[doubt.end() :][-2000:]) if doubt else []
    phrase = REASON.sub("", _sentence(found[-1])) if found else ""
    return phrase if len(phrase) <= 40 and NUMBER.match(phrase) else None


def is_no_value(phrase: str) -> bool:
    """Return whether the phrase after "the answer is" denies, bounds or lists numbers, or is a formula."""
    letters = re.sub(r"\\[a-zA-Z]+", "", phrase)
    formula = FORMULA.fullmatch(letters) and not LONG_NAME.search(letters)
    return bool(BOUND.search(phrase) or SEVERAL.search(phrase) or formula)


def _sentence(phrase: str) -> str:
    """Return the first sentence of a phrase, without "not ..., but"."""
    end = SENTENCE.search(phrase)
    return NOT_BUT.sub("", phrase[: end.start() if end else None].strip("* "))


def answer_phrase(text: str) -> tuple[str | None, bool]:
    """Return the answer phrase of a reply without boxes, and whether it follows "the answer is".

    The phrase follows the last "the answer is", or is the whole reply if that is one short line. None if neither is
    there, or if numbers follow the phrase.
    """
    tail = text[-2000:].strip()
    if phrases := ANSWER.findall(tail):
        phrase = phrases[-1]
        end = SENTENCE.search(phrase)
        rest = tail[tail.rindex(phrase) + (end.end() if end else len(phrase)) :]
        return (None if re.search(r"\d", rest) else _sentence(phrase)), True
    return (tail.strip("*# ") if len(text) <= 80 and "\n" not in text.strip() else None), False
