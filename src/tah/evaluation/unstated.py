"""Which letter a reply without a statement settles on: what it begins with, what it mentions, what it ends with."""

from __future__ import annotations

import re

from .one_letter import Named, is_listed, named, sentence_before

MENTIONS = re.compile(
    r"(?i)\b(?:correspond(?:s|ing)? (?:to|with)|match(?:es|ing)?(?: with)?|agrees with|aligns? with|is|it['’]s|"
    r"that['’]s|gives?|"
    r"(?:leads|points|brings)(?: us| me)? to|represented by|given by|found in|choosing|selecting|"
    r"go with)(?: the)?(?: correct)?"
    r"(?: answer)? (?=(?:option|choice|letter|answer)\b)"
)
LAST = re.compile(r"(?:\(([A-J])\)|\b(?:option|choice) \(?([A-J])\)?)(?=[.!]?$)", re.IGNORECASE)
SENTENCE = re.compile(r"[.!?:]\s\(?([A-J])\)?[.!]?$")
DENIED = re.compile(
    r"(?i)\b(?:not|never|neither|nor|cannot|wrong|incorrect\w*|false|eliminat\w+|rul(?:es?|ed|ing) out|"
    r"discard\w*|exclud\w+|"
    r"reject\w*|unlike|except|than|instead|whereas|while|although|though|contrast|compar\w+|distractor|other)\b|"
    r"n['’]t\b"
)


def unstated(text: str) -> Named | None:
    """The letter that a text without statements begins with, is mentioned as matching, or ends with."""
    found = named(text, 0)
    if found and found.firm and not is_listed(text, 0) and not re.search(r"[?]", text[found.end : found.end + 1]):
        return found
    at = text.rfind("\n") + 1
    found = named(text, at)
    if found and found.firm and not is_listed(text, at):
        return found
    sentence = SENTENCE.search(text)
    if sentence:
        return Named(sentence.start(), sentence.end(), sentence[1], True)
    mentions = (
        named(text, cue.end())
        for cue in MENTIONS.finditer(text)
        if not DENIED.search(sentence_before(text, cue.start()))
    )
    return max(filter(None, mentions), key=lambda found: found.end, default=None) or ending(text[at:])


def ending(line: str) -> Named | None:
    """The letter at the end of a line that names no other and denies nothing."""
    found = LAST.search(line)
    letters = set(re.findall(r"\(([A-J])\)|\b(?i:option|choice) \(?([A-J])\b", line))
    if not found or DENIED.search(line) or len({one or other for one, other in letters}) > 1:
        return None
    return Named(found.start(), found.end(), (found[1] or found[2]).upper(), True)
