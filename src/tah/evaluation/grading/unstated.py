"""Which letter a reply without a statement settles on: what it begins with, what it mentions, what it ends with."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .one_letter import Named, is_listed, named, option_lines, sentence_before

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
# What speaks for a letter behind it, where nothing says more.
FOR = re.compile(
    r"(?i)(?:(?:^|[.!:;\n] ?)(?:(?:so|then|thus|therefore|finally|please),? )?(?:choose|select|pick) |"
    r"\b(?:looks|seems) like |\b(?:false|incorrect|untrue|inaccurate|wrong) (?:statement|sentence)(?: here)? is |"
    r"\bstatement (?:that|which) is (?:not true|not correct|false|incorrect|untrue) is |"
    r"\bthe (?:exception|odd one out) is )"
)
# The same for a letter before it.
FITS = re.compile(
    r"(?i:^|[.!?:;,\n] ?|\b(?:option|choice|statement|only|that|so|thus|hence|therefore) )"
    r"[(\[]?(?P<letter>[A-J])[)\]]? "
    r"(?i:(?:alone |clearly |indeed )?(?:satisfies|fulfil?ls|meets|matches|fits|agrees with|is consistent with) "
    r"(?:this|these|that|those|all|both|every|each|our|my|the)\b|"
    r"is the (?:only )?(?:correct|right|true|false|incorrect|wrong) (?:one|statement|sentence)\b)"
)
# A result and an arrow to a letter; a lone capital before it would make it a reaction or a map ("A + B → C").
ARROW = re.compile(
    r"^(?:(?:(?!(?<![\w'’])[A-Z](?![\w'’]))[^\n]){0,200}?"
    r"(?:→|⇒|[-=]+>|\\(?:[Rr]ight|[Ll]ongright)arrow|\\implies)|∴|\\therefore) ?\(?(?P<letter>[A-J])\)?[.!]?$",
    re.MULTILINE,
)
LIMITED = re.compile(r"(?i)\b(?:but|yet|however|if|when|unless|partial\w*|partly|almost|nearly|first|some|would)\b")
GOOD = re.compile(r"(?i)^(?:yes|true|correct|right|valid)\b|\b(?:yes|true|correct|right|valid)\)?$|[✓✅✔]")
BAD = re.compile(
    r"(?i)^no\b|\bno$|\b(?:incorrect|wrong|false|untrue|invalid|not (?:quite )?(?:correct|right|true|valid))\b"
    r"|n['’]t\b|[✗❌✘]"
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
    remarks = [*_remarks(text)]
    if remarks:
        agree = len({remark.letter for remark in remarks}) == 1
        return remarks[-1] if agree else remarks[-1]._replace(letter=None)
    cues = (cue for cue in MENTIONS.finditer(text) if not DENIED.search(sentence_before(text, cue.start())))
    mentions = (named(text, cue.end()) for cue in cues)
    return max(filter(None, mentions), key=lambda found: found.end, default=None) or ending(text[at:])


def ending(line: str) -> Named | None:
    """The letter at the end of a line that names no other and denies nothing."""
    found = LAST.search(line)
    letters = set(re.findall(r"\(([A-J])\)|\b(?i:option|choice) \(?([A-J])\b", line))
    if not found or DENIED.search(line) or len({one or other for one, other in letters}) > 1:
        return None
    return Named(found.start(), found.end(), (found[1] or found[2]).upper(), True)


def _remarks(text: str) -> Iterator[Named]:
    """What speaks for a letter without a statement; nothing that is denied or limited in its sentence."""
    cues = [(cue, named(text, cue.end())) for cue in FOR.finditer(text)]
    for pattern in (FITS, ARROW):
        cues += [(cue, Named(cue.start("letter"), cue.end(), cue["letter"], True)) for cue in pattern.finditer(text)]
    for cue, found in cues:
        if not found or not found.firm:
            continue
        before = "" if cue[0][:1] in ".!?:;\n" else sentence_before(text, cue.start())
        after = re.split(r"[.!?;\n]|, (?:unlike|while|whereas|and)\b", text[found.end : found.end + 80])[0]
        if not any(words.search(part) for words in (DENIED, LIMITED) for part in (before, after)):
            yield found
    lines = option_lines(text)
    # What the lines of a list say about their options, without the options' letters.
    heads = [text[at : at + 200].split("\n", 1)[0] for at, _ in lines]
    said = [re.sub(r"(?i)^(?:option |choice )?\W?\w[^\w✓✅✔✗❌✘]*", "", line, count=1) for line in heads]
    good = [bool(GOOD.search(line.rstrip(" .!"))) and not BAD.search(line) for line in said]
    bad = [bool(BAD.search(line.rstrip(" .!"))) for line in said]
    if (good.count(True), bad.count(True)) == (1, len(lines) - 1) and len(lines) > 1:
        start, letter = lines[good.index(True)]
        yield Named(start, start + 1, letter, True)
