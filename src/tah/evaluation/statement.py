"""What a reply states in the end: its last box, the list of boxes that this one closes, or "the answer is ..."."""

from __future__ import annotations

import re

from .reply import Box

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
    r"\b(?:instead|correction|corrected|wrong|mistake|mistaken|sorry|incorrect|rather|oops|not right|not correct|misread|no,|"
    r"does(?:n't| not)|fails?|failed|invalid|extraneous|discard\w*|reject\w*|errors?|redo|upon|review\w*|attempts?|should be|"
    r"left with|only (?:valid|correct|acceptable|admissible|feasible)|but the (?:\w+ )?answers?)\b|"
    r"\bonly[\s$(]*(?:[a-z]\s?=\s?)?$",
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
    r"(?<!\bthe )\bonly (?:the )?(?:first|second|third|last|former|latter|one|positive|negative|larger|smaller|[$\\(]*[a-z]?\s?=?\s?-?\d+)"
    r"(?![\d.])(?! (?:\w+ )?(?:solutions?|roots?|values?|numbers?)\b)",
    re.IGNORECASE,
)
FARTHEST = 200  # characters between two boxes of one list
ANSWER = re.compile(r"\banswers?\b[^.\n:]{0,40}?(?:\bis\b|\bare\b|:)[\s*]*([^\n]+)", re.IGNORECASE)
SENTENCE = re.compile(r"[.!](?=\s|\*|$)")
MOST = 64  # different boxes of one statement; a model that repeats itself may write one a thousand times


def statements(text: str, found: list[Box]) -> list[list[str]]:
    r"""The contents of the boxes that a reply may state in the end: of its last list, then of all since a correction.

    `\boxed{1} or \boxed{2}` is a list; `\boxed{7}. Wait, no: \boxed{12}` ends in a list of one, and only that.

    Args:
        text: the reply without its thoughts.
        found: its boxes.
    """
    if not found:
        return []
    between = [text[one.end : other.start] for one, other in zip(found, found[1:], strict=False)]
    listed = since = len(found) - 1
    while listed > 0 and _is_list(between[listed - 1]):
        listed -= 1
    while since > 0 and not _takes_back(between[since - 1]):
        since -= 1
    spans = [found[listed:], found[since:]] if since < listed else [found[listed:]]
    if ONE_IS_LEFT.search(text[found[-1].end : found[-1].end + FARTHEST]):
        spans = [span for span in spans if len(span) == 1]  # no list stands
    distinct = [list(dict.fromkeys(box.content for box in span)) for span in spans]
    return [contents for contents in distinct if len(contents) <= MOST]


def _is_list(between: str) -> bool:
    if len(between) > FARTHEST:
        return False
    if LIST.fullmatch(between):
        return True
    return len(between) <= 40 and bool(JOINED.search(between)) and not SEPARATE.search(between)


def _takes_back(between: str) -> bool:
    if DENIAL.search(between) or (HESITATION.search(between) and not ADDITION.search(between)):
        return True
    return bool(CONCLUSION.search(between) and not ANOTHER.search(between))


def said(text: str) -> str | None:
    """What follows the last "the answer is", or all of a reply of one short line; None where neither is there.

    Args:
        text: a reply without boxes.
    """
    tail = text[-2000:].strip()
    if phrases := ANSWER.findall(tail):
        phrase = phrases[-1]
        end = SENTENCE.search(phrase)
        rest = tail[tail.rindex(phrase) + (end.end() if end else len(phrase)) :]
        return None if re.search(r"\d", rest) else phrase[: end.start() if end else None].strip("* ")
    return tail.strip("*# ") if len(text) <= 80 and "\n" not in text.strip() else None
