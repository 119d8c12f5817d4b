r"""Which letter an answer to a multiple-choice question settles on.

An answer settles on a letter by a statement: a box, "the answer is C", "C is correct", "I choose C", "therefore, C".
The last statement counts, so that a model may correct itself. Without any statement the letter that the reply begins
with counts ("C. 12", "(C) The mitochondria"), then one that its last line consists of or ends with.

A letter that is merely mentioned is no statement ("option A is wrong because ..."), a statement that names several
letters settles on none ("A or C"), and neither the article "A" nor the pronoun "I" is a letter. Before anything is
searched, the reply is rewritten without markup (`plain`), so that `**C**`, `\mathbf{C}` and `<answer>C</answer>` need
no patterns of their own. The patterns look some 80 characters ahead at most: the time grows with the reply's length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from .markup import plain
from .reply import Grade, Verdict, after_thoughts, boxes

LETTERS = "ABCDEFGHIJ"

# -- one letter ------------------------------------------------------------------------------------------------------

LETTER = re.compile(
    r"(?:(?i:the |answer|(?P<noun>option|choice|letter))[ :]*)*"
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


# -- statements ------------------------------------------------------------------------------------------------------

FILLING = (
    r"(?:[ \n,:>=–—-]|(?:therefore|thus|hence|then|so|clearly|indeed|definitely|actually|still|most|likely|"
    r"probably|obviously|"
    r"simply|just|only|now|really|certainly|again|the|correct|final|answer|that of|given by|represented by|"
    r"found in)\b){0,8}"
)
SETTLES = re.compile(
    r"(?i)\b(?:(?:answer|ans|solution|conclusion|guess)\b(?! (?:choices|options))"
    r"|(?:correct|right|best|appropriate|suitable|accurate|final|my|chosen|selected|answer) (?:answer )?(?:option|"
    r"choice|letter|statement|response|one)\b"
    r"|\b(?:correct|result)(?= ?:)|\b(?:option|choice|letter|pick)(?= (?:is|should be|must be)\b))"
    r"(?:(?!\b(?:is|are|was|were|not|never|neither)\b|n['’]t\b)[^.!?\n;:=]){0,80}?"
    r"(?:['’]s\b|\bis\b|\bare\b|\b(?P<modal>must|should|has to|have to|ought to|would|will|needs to|can only|"
    r"seems to|appears to|turns out to)\b(?: [a-z]+)? be\b|[:=→⇒➔➜]|[-=]+>| [-–—] |\n)"
    + FILLING
    + r"(?P<several>(?:either|both|between|neither)\b)?(?:not (?:option )?[(\[]?[A-J][)\]]?[,;:]? (?:but|it['’]?s|"
    r"it is)(?: rather| instead| actually)? )?"
)
CORRECT = re.compile(
    r"(?P<other>\b[A-J]\)?(?: or | and | "
    r"nor |, | ?/ ?)(?:[Oo]ption |[Cc]hoice )?)?[(\[\"“']?(?<![\w'’-])(?P<letter>[A-J])"
    r"(?P<label>[.:)\]\"”'][^.!?;\n]{0,60}?)?,? (?:(?P<verb>is|are|was|must be|should be|would be|has to be|"
    r"seems to be)\b"
    r"(?i: (?:the|indeed|clearly|therefore|thus|definitely|actually|most|more|likely|only|one|both|all|obviously|my|"
    r"certainly))*"
    r"(?i: (?:best|appropriate|accurate|suitable|final|valid)){0,2}"
    r"(?i: (?:correct|right)(?! (?:in|about|only|if|when|that|for|as far)\b|[-\w])| (?:answer|option|choice)\b)"
    r"|best [a-z]{3,12}s\b|is the best(?=[.!]|$)|the (?:best|correct|right) (?:answer|option|choice)\b)"
)
BEFORE_CORRECT = re.compile(
    r"(?i)(?:^|[.!?:;,\n(\"“]|\b(?:option|choice|answer|letter|so|therefore|thus|hence|that|think|believe|and|"
    r"actually|but|means|say|only|or|nor))[ (\[\"“]*$"
)
CHOOSES = re.compile(
    r"(?i)\b(?:i|we|i['’]d|i['’]ll|let['’]s|let us|you)\b(?: (?:would|will|should|must|can|therefore|thus|then|"
    r"am going to))*"
    r" (?:choose|select|pick|go with|opt for|say|answer|guess|conclude)(?: with)?(?: that)?(?: it['’]s| it is)?[ :]+"
    r"|\bgoing with |\b(?:leav(?:es|ing)|left with)(?: us with| only| just)* "
    r"|(?:答案|选项|故选|应选|选择?)(?:应该?)?(?:是|为|选)?[ :]*"
)
CONCLUDES = re.compile(
    r"(?i)(?:(?:^|[.,;:!?\n] ?)(?:therefore|thus|hence|so|finally|actually|correction|no|wait|sorry|rather|instead|"
    r"overall|probably|definitely|clearly|obviously|likely|certainly|must be|should be|in conclusion|ans\.|"
    r"(?:so )?i (?:think|believe|guess))[,:]? (?:actually,? |no,? |that means |we (?:get|have) )?|\b)"
    r"(?:(?:it|this|that)(?:['’]s| is| must be| has to be| should be)(?: actually| therefore| clearly)? )?"
)
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
NO_ANSWER = re.compile(
    r"(?i)\b(?:incorrect|wrong|initial|previous|first|earlier|original|tempting|alternative|another|suppose|assume|"
    r"assuming|"
    r"supposing|if|whether|that the)(?: (?:the|that|my))*(?: (?:correct|right))? *$"
)
THOUGHT = re.compile(
    r"(?i)\b(?:might|may|could|tempt\w*|mistak\w+|some|many|students?|people|at first|initially)\b.{0,40}"
    r"\b(?:th(?:ink|ought)|say|said|believe|argue|guess|assume|conclude|claim|suppose)\w*\b"
    r"(?!.*\b(?:but|however|so|therefore|thus|hence|yet|actually)\b)"
)


def statements(text: str) -> Iterator[Named]:
    """Where a plain text states which letter is the answer, in any order."""
    for cue in _each(SETTLES, text):
        found = named(text, cue.end())
        if cue["several"]:
            found = Named(cue.end(), cue.end(), None, True)
        if found and not _listed(text, found.at) and not _doubted(text, cue, found):
            yield found
    for cue in CORRECT.finditer(text):
        if cue["other"]:
            yield Named(cue.start("letter"), cue.end(), None, True)
        elif not text.startswith("?", cue.end()) and _meant(text, cue):
            yield Named(cue.start("letter"), cue.end(), cue["letter"], True)
    for pattern in (CHOOSES, CONCLUDES):
        for cue in pattern.finditer(text):
            found = named(text, cue.end()) if cue[0] else None
            before = "" if cue[0][:1] in ".,;:!?\n" else _sentence(text, cue.start())[-20:]
            if found and found.firm and not re.search(r"(?i)\b(?:not|never|cannot|if|whether)\b|n['’]t\b", before):
                yield found


def _each(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Every match, those included that begin within another."""
    found = pattern.search(text)
    while found:
        yield found
        found = pattern.search(text, found.start() + 1)


def _meant(text: str, cue: re.Match[str]) -> bool:
    """Whether "C is correct" speaks of the option C, and is not denied or supposed."""
    at = cue.start("letter")
    before = _sentence(text, at)
    if not BEFORE_CORRECT.search(text[max(0, at - 12) : at]) or (cue["verb"] == "are" and cue["label"] is None):
        return False
    if re.search(r"(?i)\b(?:not|unlike)(?: option| choice)? *\(?$", before):
        return False
    denied = r"|\bnot\b|n['’]t\b" if cue["verb"] is None else ""
    return not re.search(rf"(?i)\b(?:if|whether|suppose|neither)\b{denied}", before)


def _sentence(text: str, at: int) -> str:
    """The sentence up to a place, as far as 80 characters before it."""
    return re.split(r"[.!?;\n]", text[max(0, at - 80) : at])[-1]


def _doubted(text: str, cue: re.Match[str], found: Named) -> bool:
    """Whether a statement is a supposition, what others think, or of another answer than the right one."""
    before = _sentence(text, cue.start())
    if NO_ANSWER.search(before) or THOUGHT.search(before):
        return not re.search(
            r"(?i)\b(?:so|conclude|means|shows|say|think|believe|is|confident|sure) that the *$", before
        )
    conditional = f"{before} {text[found.end : found.end + 12]}"
    return (cue["modal"] or "").lower() == "would" and re.search(r"(?i)\b(?:if|were|had)\b", conditional) is not None


def _starts(text: str) -> list[tuple[int, str]]:
    """Places and letters of the lines that begin with a labelled letter, as options in a list do."""
    lines = re.finditer(r"^(?:(?i:option|choice) )?[(\[]?([A-J])(?:[.):\]]|(?=\n|$| [-–—] ))(?!\w)", text, re.MULTILINE)
    return [(line.start(), line[1]) for line in lines]


def _listed(text: str, at: int) -> bool:
    """Whether the line at this place is one of a list of options: the next or the last but one in the alphabet follows
    or precedes."""
    near = text[max(0, at - 400) : at + 400]
    place = at - max(0, at - 400)
    if place and near[place - 1] != "\n":
        return False
    found = _starts(near)
    here = next((number for number, (start, _) in enumerate(found) if start == place), None)
    if here is None:
        return False
    letter = ord(found[here][1])
    after = here + 1 < len(found) and ord(found[here + 1][1]) == letter + 1
    return after or (here > 0 and ord(found[here - 1][1]) == letter - 1)


# -- the whole reply -------------------------------------------------------------------------------------------------


def judge_choice(gold: str, text: str, choices: int) -> Verdict:
    """Grade a letter.

    Args:
        gold: the right letter.
        text: the whole answer.
        choices: how many letters there are to choose from, beginning with A.
    """
    found = settled(after_thoughts(text))
    if found is None:
        return Verdict("unparsed", None, "it settles on no letter")
    if found.letter is None:
        return Verdict("unparsed", None, "it names several letters")
    if found.letter not in LETTERS[:choices]:
        return Verdict(
            "unparsed", found.letter, f"there is no choice {found.letter}: the last is {LETTERS[choices - 1]}"
        )
    return Verdict("right" if found.letter == gold else "wrong", found.letter)


def grade_choice(gold: str, text: str, choices: int) -> Grade:
    """The grade of `judge_choice`."""
    return judge_choice(gold, text, choices).grade


def letter_of(text: str, choices: int) -> str | None:
    """The letter that an answer settles on, None where it settles on none of the choices."""
    found = settled(after_thoughts(text))
    return found.letter if found and found.letter and found.letter in LETTERS[:choices] else None


def settled(text: str) -> Named | None:
    """The last statement of an answer, boxes included, else what it begins or ends with."""
    pieces, at = [], 0
    last: Named | None = None
    for box in boxes(text):
        pieces.append(plain(text[at : box.start]))
        last = _stated(pieces[-1]) or last
        found = _boxed(plain(box.content))
        if found and found.letter and last and re.fullmatch(r"[,&/]|,? ?(?:or|and|and/or)", pieces[-1]):
            found = found if found.letter == last.letter else found._replace(letter=None)
        if found and not re.match(r"[ .\n$]*\bis (?:not|incorrect|wrong)\b", text[box.end : box.end + 30]):
            last = found
        at = box.end
    last = _stated(plain(text[at:])) or last
    return last or _unstated(plain(text))


def _stated(text: str) -> Named | None:
    return max(statements(text), key=lambda found: found.end, default=None)


def _boxed(text: str) -> Named | None:
    """The letter in the content of a box: at its beginning, in a statement, at its end."""
    found = named(text, 0)
    if found and found.end < len(text) and re.match(r"[AI]\b(?![.):]) ?\d", text):
        found = None
    return found or _stated(text) or _ending(text)


def _unstated(text: str) -> Named | None:
    """The letter that a text without statements begins with, is mentioned as matching, or ends with."""
    found = named(text, 0)
    if found and found.firm and not _listed(text, 0) and not re.search(r"[?]", text[found.end : found.end + 1]):
        return found
    at = text.rfind("\n") + 1
    found = named(text, at)
    if found and found.firm and not _listed(text, at):
        return found
    sentence = SENTENCE.search(text)
    if sentence:
        return Named(sentence.start(), sentence.end(), sentence[1], True)
    mentions = (
        named(text, cue.end()) for cue in MENTIONS.finditer(text) if not DENIED.search(_sentence(text, cue.start()))
    )
    return max(filter(None, mentions), key=lambda found: found.end, default=None) or _ending(text[at:])


def _ending(line: str) -> Named | None:
    """The letter at the end of a line that names no other and denies nothing."""
    found = LAST.search(line)
    letters = set(re.findall(r"\(([A-J])\)|\b(?i:option|choice) \(?([A-J])\b", line))
    if not found or DENIED.search(line) or len({one or other for one, other in letters}) > 1:
        return None
    return Named(found.start(), found.end(), (found[1] or found[2]).upper(), True)
