r"""Which letter an answer to a multiple-choice question settles on.

An answer settles on a letter by a statement: a box, "the answer is C", "C is correct", "I choose C", "therefore, C".
The last statement counts, so that a model may correct itself. Without any statement the letter that the reply begins
with counts ("C. 12", "(C) The mitochondria"), then one that its last line consists of, that something speaks for, or
that the reply ends with (`unstated.py`).

A letter that is merely mentioned is no statement ("option A is wrong because ..."), a statement that names several
letters settles on none ("A or C"), and neither the article "A" nor the pronoun "I" is a letter. Before anything is
searched, the reply is rewritten without markup (`plain`), so that `**C**`, `\mathbf{C}` and `<answer>C</answer>` need
no patterns of their own. The patterns look some 80 characters ahead at most: the time grows with the reply's length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .markup import plain
from .one_letter import Named, is_listed, named, sentence_before
from .reply import Grade, Verdict, after_thoughts, boxes
from .unstated import ending, unstated

LETTERS = "ABCDEFGHIJ"

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
    r"(?:\bisn['’]t\b(?= [^.!?\n]{1,20}\b(?:but|it['’]?s|it is)\b)|"
    r"['’]s\b|\bis\b|\bare\b|\b(?P<modal>must|should|has to|have to|ought to|would|will|needs to|can only|"
    r"seems to|appears to|turns out to)\b(?: [a-z]+)? be\b|[:=→⇒➔➜]|[-=]+>| [-–—] |\n)"
    + FILLING
    + r"(?P<several>(?:either|both|between|neither)\b)?(?:(?:not |(?<=n['’]t ))(?:option )?[(\[]?[A-J][)\]]?"
    r"[,;:]? (?:but|it['’]?s|it is)(?: rather| instead| actually)? )?"
)
CORRECT = re.compile(
    r"(?P<other>\b[A-J]\)?(?: or | and | "
    r"nor |, | ?/ ?)(?:[Oo]ption |[Cc]hoice )?)?[(\[\"“']?(?<![\w'’-])(?P<letter>[A-J])"
    r"(?P<label>(?:[.:)\]\"”]|'(?!\w))[^.!?;\n]{0,60}?)?,? (?:(?P<verb>is|are|was|must be|should be|would be|has to be|"
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
# Between two boxes that are one statement.
JOINS = re.compile(r"[,&/]|,? ?(?:(?:and/or|or|and|else|also|even|maybe|perhaps|possibly)(?: |$))+")


def statements(text: str) -> Iterator[Named]:
    """Where a plain text states which letter is the answer, in any order."""
    for cue in _each(SETTLES, text):
        found = named(text, cue.end())
        if cue["several"]:
            found = Named(cue.end(), cue.end(), None, True)
        if found and not is_listed(text, found.at) and not _doubted(text, cue, found):
            yield found
    for cue in CORRECT.finditer(text):
        if cue["other"]:
            yield Named(cue.start("letter"), cue.end(), None, True)
        elif not text.startswith("?", cue.end()) and _meant(text, cue):
            yield Named(cue.start("letter"), cue.end(), cue["letter"], True)
    for pattern in (CHOOSES, CONCLUDES):
        for cue in pattern.finditer(text):
            found = named(text, cue.end()) if cue[0] else None
            before = "" if cue[0][:1] in ".,;:!?\n" else sentence_before(text, cue.start())[-20:]
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
    before = sentence_before(text, at)
    if not BEFORE_CORRECT.search(text[max(0, at - 12) : at]) or (cue["verb"] == "are" and cue["label"] is None):
        return False
    if re.search(r"(?i)\b(?:not|unlike)(?: option| choice)? *\(?$", before):
        return False
    if THOUGHT.search(before) and not re.search(r"(?i)\b(?:i|we)\b", before):
        return False  # "it is tempting to say that A is correct"
    denied = r"|\bnot\b|n['’]t\b" if cue["verb"] is None else ""
    return not re.search(rf"(?i)\b(?:if|whether|suppose|neither)\b{denied}", before)


def _doubted(text: str, cue: re.Match[str], found: Named) -> bool:
    """Whether a statement is a supposition, what others think, or of another answer than the right one."""
    before = sentence_before(text, cue.start())
    if NO_ANSWER.search(before) or THOUGHT.search(before):
        return not re.search(
            r"(?i)\b(?:so|conclude|means|shows|say|think|believe|is|confident|sure) that the *$", before
        )
    conditional = f"{before} {text[found.end : found.end + 12]}"
    return (cue["modal"] or "").lower() == "would" and re.search(r"(?i)\b(?:if|were|had)\b", conditional) is not None


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


def settled(text: str) -> Named | None:
    """The last statement of an answer, boxes included, else what it begins or ends with."""
    pieces, at = [], 0
    last: Named | None = None
    for box in boxes(text):
        pieces.append(plain(text[at : box.start]))
        last = _stated(pieces[-1]) or last
        found = _boxed(plain(box.content))
        if found and found.letter and last and JOINS.fullmatch(pieces[-1]):
            found = found if found.letter == last.letter else found._replace(letter=None)
        if found and not re.match(r"[ .\n$]*\bis (?:not|incorrect|wrong)\b", text[box.end : box.end + 30]):
            last = found
        at = box.end
    last = _stated(plain(text[at:])) or last
    return last or unstated(plain(text))


def _stated(text: str) -> Named | None:
    return max(statements(text), key=lambda found: found.end, default=None)


def _boxed(text: str) -> Named | None:
    """The letter in the content of a box: at its beginning, in a statement, at its end."""
    found = named(text, 0)
    if found and found.end < len(text) and re.match(r"[AI]\b(?![.):]) ?\d", text):
        found = None
    return found or _stated(text) or ending(text)
