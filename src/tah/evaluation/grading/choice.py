r"""Grading of multiple-choice answers: finds the letter that a reply states.

A statement is a box, "the answer is C", "C is correct", "I choose C" or "therefore, C". The last statement counts, so a
model may correct itself. Without a statement, the first of these counts: the letter at the beginning of the reply
("C. 12", "(C) The mitochondria"), a last line that is a letter, a letter for which an argument is given ("option B
satisfies all conditions"), the letter at the end of the reply.

A mentioned letter is not a statement ("option A is wrong because ..."). A statement with several letters ("A or C")
gives no answer. The article "A" and the pronoun "I" are not letters.

`plain` first removes the markup of the reply, so `**C**`, `\mathbf{C}` and `<answer>C</answer>` need no patterns. The
patterns match at most about 80 characters, so the time is linear in the length of the reply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from .reply import Grade, Verdict, after_thoughts, boxes

LETTERS = "ABCDEFGHIJ"

# -- the text without Markdown, LaTeX's text commands and tags ---------------------------------------------------------

FULL_WIDTH = str.maketrans("：（）［］．，‑−", ":()[].,--")
BREAKS = re.compile(r"\\\\|\\[,;:! ~]|\\q?quad\b|\\[hv]space\*?\{[^{}]{0,20}\}|~|&nbsp;|[^\S\n]")
# A single letter in bold, code, a formula, quotes or a command such as \mathbf. Such a letter is not an article.
MARKED = re.compile(
    r"(?<![\w\\])(?:(?P<mark>\*{1,3}|_{1,3}|`{1,3}|\"|')[ (\[{<]{0,2}(?P<letter>[A-Za-z])[)\]}>]?[.:]?[)\]}>]?"
    r" ?(?P=mark)|\${1,2}[ (\[{]{0,2}(?P<formula>[A-Z])[ )\]}]{0,2}\.?\${1,2}|\\\( ?(?P<inline>[A-Z]) ?\\\))(?!\w)"
)
COMMANDS = re.compile(
    r"\\(?:text)?color ?\{\w+\}|\\(?:text|math|operatorname|emph|underline)[a-z]*\b|\\(?:left|right|bf|rm|sf|tt|it|"
    r"large|Large|displaystyle|mbox|hbox|checkmark)\b"
)
COMMAND = re.compile(r"\\(?:text|math|operatorname|emph|underline)[a-z]* ?\{ ?[(\[]?([A-Za-z])[)\]]?[.:]? ?\}")
# "5\\text{ A}" is in ampere: after a number a letter that is not bold is a unit, unless it is in parentheses.
UNIT = re.compile(r"(\d\}?) ?\\(?:text|textrm|mathrm|operatorname|mbox) ?\{ ?([A-Z]) ?\}")
# A letter times a power or an index is a formula: "C e^{2t}", "$A x^2$".
FACTOR = re.compile(r"(?<![\w\\])([A-J]) (?=[a-z][\^_]\{)|(?<=[$(])([A-J]) (?=[a-z][\^_(])")
ANSWER_TAG = re.compile(r"<(?:final_?)?answer>|<answer:", re.IGNORECASE)
TAGS = re.compile(r"</?(?:b|strong|i|em|code|p|u|span|br|div|mark|(?:final_?)?answer)\b[^<>\n]{0,80}>", re.IGNORECASE)
MARKS = re.compile(r"\\f?boxed\b|\\\$|\\[()\[\]{}]|[*`${}]|__+")
LINES = re.compile(r"(?: ?\n ?)+")
HEAD = re.compile(r"^(?:[#>•+✅✓☑✔👉➡-]+\ufe0f? )+", re.MULTILINE)


def plain(text: str) -> str:
    """Return the text without markup: one space or line break between words, marked letters in parentheses."""
    text = BREAKS.sub(" ", text.translate(FULL_WIDTH))
    text = re.sub(" +", " ", text)
    text = TAGS.sub("\n", ANSWER_TAG.sub("\nAnswer: ", text)) if "<" in text else text
    text = FACTOR.sub(r"\1\2·", UNIT.sub(r"\1 \2", text))
    for _ in range(2):  # \text{\textbf{C}}
        text = COMMAND.sub(r"{(\1) }", text)
    text = COMMANDS.sub("", text)
    text = MARKED.sub(lambda found: f" ({found['letter'] or found['formula'] or found['inline']}) ", text)
    text = re.sub(r"\( ?(\([A-Za-z]\)) ?\)", r"\1", text)
    text = re.sub(" +", " ", MARKS.sub("", text))
    return HEAD.sub("", LINES.sub("\n", text)).strip()


# -- one letter --------------------------------------------------------------------------------------------------------

LETTER = re.compile(
    r"(?:(?i:the |answer|(?P<noun>option|choice|letter))[ :]*){0,4}(?:[(\[<\"“‘'«]{1,2} ?(?P<wrapped>[A-Ja-j])"
    r" ?[.:]?[)\]>\"”’'»]{1,2}(?P<label>[.):])?(?!\w)|[(\[<\"“‘«]?(?:(?P<labelled>[A-Ja-j])(?:[.):]| :)(?!\w)|"
    r"(?P<bare>[A-J])(?![\w.'’^])|(?P<small>[a-j])[.,;!]?(?=\n|$)))"
)
VERB = re.compile(
    r" ?(?i:is|are|was|were|does|do|did|has|have|can|cannot|can't|could|would|will|may|might|isn['’]t|doesn['’]t|"
    r"gives?|"
    r"describes?|refers?|says?|states?|represents?|means|shows?|seems|contains?|involves?|incorrect|wrong|false|not)\b"
)
# Text that can follow the letter "A" or "I", but not the article or the pronoun.
JOINED = re.compile(
    r" (?:because|since|as|which|whereas|but|due to|according to|based on|while(?! ago)|and|or|in this case|here|"
    r"for (?:this|these|the following) reasons?|\((?!or |and )[^()\n]{1,80}\)[.!]?(?=\n|$)|not \(?[A-J]\b|[-–—] )|$"
)
FORMULA = re.compile(
    r" ?(?:[=+^_/<>|×÷·%&]|[-–]\w|\\(?:cup|cap|times|cdot|pm|to|in|l?eq?|ge?|ne|sub|sup|approx|sim)[a-z]*)|\("
)
# Names that begin with a letter: a kind of cells, a key in music, a genus, an author.
NAME = re.compile(
    r"(?:B (?:cells?|lymphocytes?|vitamins?)|G proteins?|C (?:fib(?:er|re)s?|programs?)|[AI] bands?|H (?:bonds?|"
    r"zones?)|D loops?|F (?:tests?|statistics?|distributions?)|[A-G] (?:major|minor|flat|sharp)|A\. thaliana|"
    r"B\. (?:subtilis|anthracis|cereus)|C\. (?:elegans|albicans|difficile|botulinum|tetani)|D\. melanogaster|E\. coli|"
    r"H\. (?:pylori|sapiens|erectus)|F\. Scott Fitzgerald|J\. (?:Edgar Hoover|Robert Oppenheimer))\b"
)
OTHER = re.compile(
    r"[.)]? ?\(?(?P<or>,? ?(?:and/or|or(?: else)?|nor|as well as|(?=(?:possibly|maybe|perhaps)\b))\b|/|"
    r"[-–—](?= ?\(?[A-J]\)?[.]?(?:\n|$)))?(?P<and>, ?and\b|and\b|[,;&])? ?"
    r"(?:(?:also|possibly|maybe|perhaps|even|either)\b ?)*(?:(?i:option|choice|answer) ?)?"
    r"[(\[\"'“]?(?P<letter>[A-J])[)\]\"'”]?(?![\w'’])(?P<rest> ?[^ ]{0,10})"
)


class Letter(NamedTuple):
    """A letter at a place in a text.

    Attributes:
        at: Start of the place.
        end: End of the place.
        letter: The letter; None for several letters.
        firm: Whether the letter ends its line or sentence, or is marked as a label.
    """

    at: int
    end: int
    letter: str | None
    firm: bool


def letter_at(text: str, at: int) -> Letter | None:
    """Return the letter at this place of a plain text; None if there is none, or if it is another word."""
    found = LETTER.match(text, at)
    if not found:
        return None
    kind = str(found.lastgroup) if found.lastgroup != "label" else "wrapped"
    letter, rest = found[kind], text[found.end() : found.end() + 60]
    if kind != "wrapped" and not found["noun"] and NAME.match(text, found.start(kind)):
        return None
    other = joined_letter(rest)
    if other:
        return Letter(at, found.end(), letter.upper() if other == letter.upper() else None, True)
    if rest.startswith("?") or (kind != "labelled" and FORMULA.match(rest)):
        return None
    firm = kind in ("labelled", "small") or bool(re.match(r"$|[\n.,;!:]| [-–—] | ?✓| ?✅| [-$]?\d", rest))
    if kind == "labelled":
        return None if VERB.match(rest) else Letter(at, found.end(), letter.upper(), True)
    if kind == "wrapped":
        firm = firm or not VERB.match(rest)
    elif rest.startswith((" \\", "\\")):
        return None
    elif letter in "AI" and not found["noun"] and not JOINED.match(rest):
        if not firm or rest[1:2] in tuple("-$0123456789"):
            return None
    elif not firm and not rest.startswith((" ", ")", "]", '"', "”")):
        return None
    return Letter(at, found.end(), letter.upper(), firm or bool(JOINED.match(rest)))


def joined_letter(rest: str) -> str | None:
    """Return the second letter of "A or C", given the text after the first one. In "B, option B" it is the same."""
    found = OTHER.match(rest)
    if not found or (found["or"] is None and found["and"] is None):
        return None
    other, after = found["letter"], found["rest"]
    if other in "AI" and re.match(r" [a-z]", after) and not re.match(r" (?:or|and|but|are|both)\b", after):
        return None  # "C, A large ...", "C, I think"
    if found["and"] == ";" and re.match(r" (?:and|or)", after):
        return None  # a separate sentence
    alone = found["or"] is not None or re.match(r"$|\n| ?[.,;:)&/!?]| (?:or|and|are|both)\b", after)
    return str(other) if alone else None


def sentence_before(text: str, at: int) -> str:
    """Return the sentence up to a place, at most 80 characters of it."""
    return re.split(r"[.!?;\n]", text[max(0, at - 80) : at])[-1]


def option_lines(text: str) -> list[tuple[int, str]]:
    """Return places and letters of the lines that begin with a labelled letter, like the options of a list."""
    lines = re.finditer(r"^(?:(?i:option|choice) )?[(\[]?([A-J])(?:[.):\]]|(?=\n|$| [-–—] ))(?!\w)", text, re.MULTILINE)
    return [(line.start(), line[1]) for line in lines]


def is_listed(text: str, at: int) -> bool:
    """Return whether this line is in a list of options: a neighbouring line has the neighbouring letter."""
    if at and text[at - 1] != "\n":
        return False
    first = max(0, at - 400)
    lines = option_lines(text[first : at + 400])
    for here, (start, letter) in enumerate(lines):
        if first + start == at:
            beside = [number for number in (here - 1, here + 1) if 0 <= number < len(lines)]
            return any(ord(lines[number][1]) - ord(letter) == number - here for number in beside)
    return False


# -- statements --------------------------------------------------------------------------------------------------------

FILLING = (
    r"(?:[ \n,:>=–—-]|(?:therefore|thus|hence|then|so|clearly|indeed|definitely|actually|still|most|likely|probably|"
    r"obviously|simply|just|only|now|really|certainly|again|the|correct|final|answer|that of|given by|represented by|"
    r"found in)\b){0,8}"
)
SETTLES = re.compile(
    r"(?i)\b(?:(?:answer|ans|solution|conclusion|guess)\b(?! (?:choices|options))|(?:correct|right|best|appropriate|"
    r"suitable|accurate|final|my|chosen|selected|answer) (?:answer )?(?:option|choice|letter|statement|response|one)\b|"
    r"\b(?:correct|result)(?= ?:)|\b(?:option|choice|letter|pick)(?= (?:is|should be|must be)\b))(?:(?!\b(?:is|are|was|"
    r"were|not|never|neither)\b|n['’]t\b)[^.!?\n;:=]){0,80}?(?:\bisn['’]t\b(?= [^.!?\n]{1,20}\b(?:but|it['’]?s|"
    r"it is)\b)|['’]s\b|\bis\b|\bare\b|\b(?P<modal>must|should|has to|have to|ought to|would|will|needs to|can only|"
    r"seems to|appears to|turns out to)\b(?: [a-z]+)? be\b|[:=→⇒➔➜]|[-=]+>| [-–—] |\n)"
    + FILLING
    + r"(?P<several>(?:either|both|between|neither)\b)?(?:(?:not |(?<=n['’]t ))(?:option )?[(\[]?[A-J][)\]]?"
    r"[,;:]? (?:but|it['’]?s|it is)(?: rather| instead| actually)? )?"
)
CORRECT = re.compile(
    r"(?P<other>\b[A-J]\)?(?: or | and | nor |, | ?/ ?)(?:[Oo]ption |"
    r"[Cc]hoice )?)?[(\[\"“']?(?<![\w'’-])(?P<letter>[A-J])(?P<label>(?:[.:)\]\"”]|"
    r"'(?!\w))[^.!?;\n]{0,60}?)?,? (?:(?P<verb>is|are|was|must be|should be|would be|has to be|"
    r"seems to be)\b(?i: (?:the|indeed|clearly|therefore|thus|definitely|actually|most|more|likely|only|one|both|all|"
    r"obviously|my|certainly))*(?i: (?:best|appropriate|accurate|suitable|final|valid)){0,2}(?i: (?:correct|"
    r"right)(?! (?:in|about|only|if|when|that|for|as far)\b|[-\w])| (?:answer|option|choice)\b)|best [a-z]{3,12}s\b|"
    r"is the best(?=[.!]|$)|the (?:best|correct|right) (?:answer|option|choice)\b)"
)
BEFORE_CORRECT = re.compile(
    r"(?i)(?:^|[.!?:;,\n(\"“]|\b(?:option|choice|answer|letter|so|therefore|thus|hence|that|think|believe|and|"
    r"actually|but|means|say|only|or|nor))[ (\[\"“]*$"
)
CHOOSES = re.compile(
    r"(?i)\b(?:i|we|i['’]d|i['’]ll|let['’]s|let us|you)\b(?: (?:would|will|should|must|can|therefore|thus|then|"
    r"am going to))* (?:choose|select|pick|go with|opt for|say|answer|guess|conclude)(?: with)?(?: that)?(?: it['’]s|"
    r" it is)?[ :]+|\bgoing with |\b(?:leav(?:es|ing)|left with)(?: us with| only| just)* |(?:答案|选项|故选|应选|"
    r"选择?)(?:应该?)?(?:是|为|选)?[ :]*"
)
CONCLUDES = re.compile(
    r"(?i)(?:(?:^|[.,;:!?\n] ?)(?:therefore|thus|hence|so|finally|actually|correction|no|wait|sorry|rather|instead|"
    r"overall|probably|definitely|clearly|obviously|likely|certainly|must be|should be|in conclusion|ans\.|"
    r"(?:so )?i (?:think|believe|guess))[,:]? (?:actually,? |no,? |that means |we (?:get|have) )?|\b)"
    r"(?:(?:it|this|that)(?:['’]s| is| must be| has to be| should be)(?: actually| therefore| clearly)? )?"
)
NO_ANSWER = re.compile(
    r"(?i)\b(?:incorrect|wrong|initial|previous|first|earlier|original|tempting|alternative|another|suppose|assume|"
    r"assuming|supposing|if|whether|that the)(?: (?:the|that|my))*(?: (?:correct|right))? *$"
)
THOUGHT = re.compile(
    r"(?i)\b(?:might|may|could|tempt\w*|mistak\w+|some|many|students?|people|at first|initially)\b.{0,40}"
    r"\b(?:th(?:ink|ought)|say|said|believe|argue|guess|assume|conclude|claim|suppose)\w*\b"
    r"(?!.*\b(?:but|however|so|therefore|thus|hence|yet|actually)\b)"
)
# Text between two boxes of one statement.
JOINS = re.compile(r"[,&/]|,? ?(?:(?:and/or|or|and|else|also|even|maybe|perhaps|possibly)(?: |$))+")


def statements(text: str) -> Iterator[Letter]:
    """Yield the statements of a plain text about the right letter, in any order."""
    for cue in _overlapping(SETTLES, text):
        found = letter_at(text, cue.end())
        if cue["several"]:
            found = Letter(cue.end(), cue.end(), None, True)
        if found and not is_listed(text, found.at) and not _is_doubted(text, cue, found):
            yield found
    for cue in CORRECT.finditer(text):
        if cue["other"]:
            yield Letter(cue.start("letter"), cue.end(), None, True)
        elif not text.startswith("?", cue.end()) and _is_meant(text, cue):
            yield Letter(cue.start("letter"), cue.end(), cue["letter"], True)
    for pattern in (CHOOSES, CONCLUDES):
        for cue in pattern.finditer(text):
            found = letter_at(text, cue.end()) if cue[0] else None
            before = "" if cue[0][:1] in ".,;:!?\n" else sentence_before(text, cue.start())[-20:]
            if found and found.firm and not re.search(r"(?i)\b(?:not|never|cannot|if|whether)\b|n['’]t\b", before):
                yield found


def _overlapping(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Yield every match, including those that begin within another one."""
    found = pattern.search(text)
    while found:
        yield found
        found = pattern.search(text, found.start() + 1)


def _is_meant(text: str, cue: re.Match[str]) -> bool:
    """Return whether "C is correct" is about the option C, and is neither denied nor supposed."""
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


def _is_doubted(text: str, cue: re.Match[str], found: Letter) -> bool:
    """Return whether a statement is a supposition, an opinion of others, or about a wrong answer."""
    before = sentence_before(text, cue.start())
    if NO_ANSWER.search(before) or THOUGHT.search(before):
        return not re.search(
            r"(?i)\b(?:so|conclude|means|shows|say|think|believe|is|confident|sure) that the *$", before
        )
    conditional = f"{before} {text[found.end : found.end + 12]}"
    return (cue["modal"] or "").lower() == "would" and re.search(r"(?i)\b(?:if|were|had)\b", conditional) is not None


# -- without a statement -----------------------------------------------------------------------------------------------

MENTIONS = re.compile(
    r"(?i)\b(?:correspond(?:s|ing)? (?:to|with)|match(?:es|ing)?(?: with)?|agrees with|aligns? with|is|it['’]s|"
    r"that['’]s|gives?|(?:leads|points|brings)(?: us| me)? to|represented by|given by|found in|choosing|selecting|"
    r"go with)(?: the)?(?: correct)?(?: answer)? (?=(?:option|choice|letter|answer)\b)"
)
LAST = re.compile(r"(?:\(([A-J])\)|\b(?:option|choice) \(?([A-J])\)?)(?=[.!]?$)", re.IGNORECASE)
SENTENCE = re.compile(r"[.!?:]\s\(?([A-J])\)?[.!]?$")
DENIED = re.compile(
    r"(?i)\b(?:not|never|neither|nor|cannot|wrong|incorrect\w*|false|eliminat\w+|rul(?:es?|ed|ing) out|discard\w*|"
    r"exclud\w+|reject\w*|unlike|except|than|instead|whereas|while|although|though|contrast|compar\w+|distractor|"
    r"other)\b|n['’]t\b"
)
# Without a statement: an argument for the letter after it.
FOR = re.compile(
    r"(?i)(?:(?:^|[.!:;\n] ?)(?:(?:so|then|thus|therefore|finally|please),? )?(?:choose|select|pick) |"
    r"\b(?:looks|seems) like |\b(?:false|incorrect|untrue|inaccurate|wrong) (?:statement|sentence)(?: here)? is |"
    r"\bstatement (?:that|which) is (?:not true|not correct|false|incorrect|untrue) is |"
    r"\bthe (?:exception|odd one out) is )"
)
# An argument for the letter before it.
FITS = re.compile(
    r"(?i:^|[.!?:;,\n] ?|\b(?:option|choice|statement|only|that|so|thus|hence|"
    r"therefore) )[(\[]?(?P<letter>[A-J])[)\]]? (?i:(?:alone |clearly |indeed )?(?:satisfies|fulfil?ls|meets|matches|"
    r"fits|agrees with|is consistent with) (?:this|these|that|those|all|both|every|each|our|my|the)\b|"
    r"is the (?:only )?(?:correct|right|true|false|incorrect|wrong) (?:one|statement|sentence)\b)"
)
# A result and an arrow to a letter. With a single capital before the arrow it is a reaction or a map ("A + B → C").
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


def without_statement(text: str) -> Letter | None:
    """Return the letter of a text without a statement: at the beginning, with an argument, or at the end."""
    found = letter_at(text, 0)
    if found and found.firm and not is_listed(text, 0) and not re.search(r"[?]", text[found.end : found.end + 1]):
        return found
    at = text.rfind("\n") + 1
    found = letter_at(text, at)
    if found and found.firm and not is_listed(text, at):
        return found
    sentence = SENTENCE.search(text)
    if sentence:
        return Letter(sentence.start(), sentence.end(), sentence[1], True)
    remarks = [*_remarks(text)]
    if remarks:
        agree = len({remark.letter for remark in remarks}) == 1
        return remarks[-1] if agree else remarks[-1]._replace(letter=None)
    cues = (cue for cue in MENTIONS.finditer(text) if not DENIED.search(sentence_before(text, cue.start())))
    mentions = (letter_at(text, cue.end()) for cue in cues)
    return max(filter(None, mentions), key=lambda found: found.end, default=None) or letter_at_end(text[at:])


def letter_at_end(line: str) -> Letter | None:
    """Return the letter at the end of a line, if the line has no other letter and no denial."""
    found = LAST.search(line)
    letters = set(re.findall(r"\(([A-J])\)|\b(?i:option|choice) \(?([A-J])\b", line))
    if not found or DENIED.search(line) or len({one or other for one, other in letters}) > 1:
        return None
    return Letter(found.start(), found.end(), (found[1] or found[2]).upper(), True)


def _remarks(text: str) -> Iterator[Letter]:
    """Yield letters with an argument for them, if the sentence does not deny or limit it."""
    cues = [(cue, letter_at(text, cue.end())) for cue in FOR.finditer(text)]
    for pattern in (FITS, ARROW):
        cues += [(cue, Letter(cue.start("letter"), cue.end(), cue["letter"], True)) for cue in pattern.finditer(text)]
    for cue, found in cues:
        if not found or not found.firm:
            continue
        before = "" if cue[0][:1] in ".!?:;\n" else sentence_before(text, cue.start())
        after = re.split(r"[.!?;\n]|, (?:unlike|while|whereas|and)\b", text[found.end : found.end + 80])[0]
        if not any(words.search(part) for words in (DENIED, LIMITED) for part in (before, after)):
            yield found
    lines = option_lines(text)
    # The remarks in a list of options, without the letters of the options.
    heads = [text[at : at + 200].split("\n", 1)[0] for at, _ in lines]
    said = [re.sub(r"(?i)^(?:option |choice )?\W?\w[^\w✓✅✔✗❌✘]*", "", line, count=1) for line in heads]
    good = [bool(GOOD.search(line.rstrip(" .!"))) and not BAD.search(line) for line in said]
    bad = [bool(BAD.search(line.rstrip(" .!"))) for line in said]
    if (good.count(True), bad.count(True)) == (1, len(lines) - 1) and len(lines) > 1:
        start, letter = lines[good.index(True)]
        yield Letter(start, start + 1, letter, True)


# -- the whole reply ---------------------------------------------------------------------------------------------------


def judge_choice(gold: str, text: str, choices: int) -> Verdict:
    """Return the verdict on a multiple-choice answer.

    Args:
        gold: Right letter.
        text: Whole answer, with its thoughts.
        choices: Number of choices, whose letters begin with A.
    """
    found = final_letter(after_thoughts(text))
    if found is None:
        return Verdict("unparsed", None, "it states no letter")
    if found.letter is None:
        return Verdict("unparsed", None, "it states several letters")
    if found.letter not in LETTERS[:choices]:
        why = f"there is no choice {found.letter}: the last one is {LETTERS[choices - 1]}"
        return Verdict("unparsed", found.letter, why)
    return Verdict("right" if found.letter == gold else "wrong", found.letter)


def grade_choice(gold: str, text: str, choices: int) -> Grade:
    """Return the grade of `judge_choice`."""
    return judge_choice(gold, text, choices).grade


def final_letter(text: str) -> Letter | None:
    """Return the letter of the last statement or box of an answer, or else that of `without_statement`."""
    pieces, at = [], 0
    last: Letter | None = None
    for box in boxes(text):
        pieces.append(plain(text[at : box.start]))
        last = _last_statement(pieces[-1]) or last
        found = _letter_in_box(plain(box.content))
        if found and found.letter and last and JOINS.fullmatch(pieces[-1]):
            found = found if found.letter == last.letter else found._replace(letter=None)
        if found and not re.match(r"[ .\n$]*\bis (?:not|incorrect|wrong)\b", text[box.end : box.end + 30]):
            last = found
        at = box.end
    last = _last_statement(plain(text[at:])) or last
    return last or without_statement(plain(text))


def _last_statement(text: str) -> Letter | None:
    return max(statements(text), key=lambda found: found.end, default=None)


def _letter_in_box(text: str) -> Letter | None:
    """Return the letter in the content of a box: at its beginning, in a statement, or at its end."""
    found = letter_at(text, 0)
    if found and found.end < len(text) and re.match(r"[AI]\b(?![.):]) ?\d", text):
        found = None
    return found or _last_statement(text) or letter_at_end(text)
