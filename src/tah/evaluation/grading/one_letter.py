"""One letter in a plain text: whether what stands at a place is meant as a letter, and what stands around it."""

from __future__ import annotations

import re
from typing import NamedTuple

LETTER = re.compile(
    r"(?:(?i:the |answer|(?P<noun>option|choice|letter))[ :]*){0,4}"
    r"(?:[(\[<\"“‘'«]{1,2} ?(?P<wrapped>[A-Ja-j]) ?[.:]?[)\]>\"”’'»]{1,2}(?P<label>[.):])?(?!\w)"
    r"|[(\[<\"“‘«]?(?:(?P<labelled>[A-Ja-j])(?:[.):]| :)(?!\w)|(?P<bare>[A-J])(?![\w.'’^])"
    r"|(?P<small>[a-j])[.,;!]?(?=\n|$)))"
)
VERB = re.compile(
    r" ?(?i:is|are|was|were|does|do|did|has|have|can|cannot|can't|could|would|will|may|might|isn['’]t|doesn['’]t|"
    r"gives?|"
    r"describes?|refers?|says?|states?|represents?|means|shows?|seems|contains?|involves?|incorrect|wrong|false|not)\b"
)
# After a bare "A" or "I", which may be an article or a pronoun, only what cannot follow these.
JOINED = re.compile(
    r" (?:because|since|as|which|whereas|but|due to|according to|based on|while(?! ago)|and|or|in this case|here|"
    r"for (?:this|these|the following) reasons?|\((?!or |and )[^()\n]{1,80}\)[.!]?(?=\n|$)|not \(?[A-J]\b|[-–—] )|$"
)
FORMULA = re.compile(
    r" ?(?:[=+^_/<>|×÷·%&]|[-–]\w|\\(?:cup|cap|times|cdot|pm|to|in|l?eq?|ge?|ne|sub|sup|approx|sim)[a-z]*)|\("
)
# A letter that belongs to the name of something else: a kind of cells, a key in music, a genus, an author.
NAME = re.compile(
    r"(?:B (?:cells?|lymphocytes?|vitamins?)|G proteins?|"
    r"C (?:fib(?:er|re)s?|programs?)|[AI] bands?|H (?:bonds?|zones?)|"
    r"D loops?|F (?:tests?|statistics?|distributions?)|[A-G] (?:major|minor|flat|sharp)|A\. thaliana|"
    r"B\. (?:subtilis|anthracis|cereus)|C\. (?:elegans|albicans|difficile|botulinum|tetani)|D\. melanogaster|E\. coli|"
    r"H\. (?:pylori|sapiens|erectus)|F\. Scott Fitzgerald|J\. (?:Edgar Hoover|Robert Oppenheimer))\b"
)
OTHER = re.compile(
    r"[.)]? ?\(?(?P<or>,? ?(?:and/or|or(?: else)?|nor|as well as|(?=(?:possibly|maybe|perhaps)\b))\b|/|"
    r"[-–—](?= ?\(?[A-J]\)?[.]?(?:\n|$)))?(?P<and>, ?and\b|and\b|[,;&])? ?"
    r"(?:(?:also|possibly|maybe|perhaps|even|either)\b ?)*(?:(?i:option|choice|answer) ?)?"
    r"[(\[\"'“]?(?P<letter>[A-J])[)\]\"'”]?(?![\w'’])(?P<rest> ?[^ ]{0,10})"
)


class Named(NamedTuple):
    """A letter at a place in a text: None for several at once."""

    at: int
    end: int
    letter: str | None
    firm: bool  # it ends its line or sentence, or is marked as a label


def named(text: str, at: int) -> Named | None:
    """The letter that begins at this place, if it is meant as one; `text` is plain."""
    found = LETTER.match(text, at)
    if not found:
        return None
    kind = str(found.lastgroup) if found.lastgroup != "label" else "wrapped"
    letter, rest = found[kind], text[found.end() : found.end() + 60]
    if kind != "wrapped" and not found["noun"] and NAME.match(text, found.start(kind)):
        return None
    other = another(rest)
    if other:
        return Named(at, found.end(), letter.upper() if other == letter.upper() else None, True)
    if rest.startswith("?") or (kind != "labelled" and FORMULA.match(rest)):
        return None
    firm = kind in ("labelled", "small") or bool(re.match(r"$|[\n.,;!:]| [-–—] | ?✓| ?✅| [-$]?\d", rest))
    if kind == "labelled":
        return None if VERB.match(rest) else Named(at, found.end(), letter.upper(), True)
    if kind == "wrapped":
        firm = firm or not VERB.match(rest)
    elif rest.startswith((" \\", "\\")):
        return None
    elif (
        letter in "AI"
        and (not firm or rest[1:2] in tuple("-$0123456789"))
        and not found["noun"]
        and not JOINED.match(rest)
    ):
        return None
    elif not firm and not rest.startswith((" ", ")", "]", '"', "”")):
        return None
    return Named(at, found.end(), letter.upper(), firm or bool(JOINED.match(rest)))


def another(rest: str) -> str | None:
    """The letter that what follows a letter joins to it, as in "A or C"; the same letter in "B, option B"."""
    found = OTHER.match(rest)
    if not found or (found["or"] is None and found["and"] is None):
        return None
    other, after = found["letter"], found["rest"]
    if other in "AI" and re.match(r" [a-z]", after) and not re.match(r" (?:or|and|but|are|both)\b", after):
        return None  # "C, A large ...", "C, I think"
    if found["and"] == ";" and re.match(r" (?:and|or)", after):
        return None  # a sentence of its own
    alone = found["or"] is not None or re.match(r"$|\n| ?[.,;:)&/!?]| (?:or|and|are|both)\b", after)
    return str(other) if alone else None


def sentence_before(text: str, at: int) -> str:
    """The sentence up to a place, as far as 80 characters before it."""
    return re.split(r"[.!?;\n]", text[max(0, at - 80) : at])[-1]


def option_lines(text: str) -> list[tuple[int, str]]:
    """Places and letters of the lines that begin with a labelled letter, as options in a list do."""
    lines = re.finditer(r"^(?:(?i:option|choice) )?[(\[]?([A-J])(?:[.):\]]|(?=\n|$| [-–—] ))(?!\w)", text, re.MULTILINE)
    return [(line.start(), line[1]) for line in lines]


def is_listed(text: str, at: int) -> bool:
    """Whether the line at this place is one of a list of options: the next or the last but one in the alphabet follows
    or precedes."""
    near = text[max(0, at - 400) : at + 400]
    place = at - max(0, at - 400)
    if place and near[place - 1] != "\n":
        return False
    found = option_lines(near)
    here = next((number for number, (start, _) in enumerate(found) if start == place), None)
    if here is None:
        return False
    letter = ord(found[here][1])
    after = here + 1 < len(found) and ord(found[here + 1][1]) == letter + 1
    return after or (here > 0 and ord(found[here - 1][1]) == letter - 1)
