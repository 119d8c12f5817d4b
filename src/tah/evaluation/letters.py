"""Which letter an answer to a multiple-choice question settles on."""

from __future__ import annotations

import re

from .reply import Grade, Verdict, after_thoughts, boxes

LETTERS = "ABCDEFGHIJ"
# Upper case only: "a" may be an article.
SAID = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?(?:\s+option)?\b)[\s:*]*(\(?\$?(?:\\text\{)?[A-J]\b)")
LETTER = re.compile(
    r"[\s*$({]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)*(?:[Oo]ption\s+)?\(?([A-Ja-j])"
    r"(?=[\s.):,*$}]|$)(?!\s*=)(?!\W*(?:,|and|or|&)\W*[A-J](?![A-Za-z]))"
)


def grade_choice(gold: str, text: str, choices: int) -> Grade:
    """The grade of `judge_choice`."""
    return judge_choice(gold, text, choices).grade


def judge_choice(gold: str, text: str, choices: int) -> Verdict:
    """Grade a letter.

    Args:
        gold: the right letter.
        text: the whole answer.
        choices: how many letters there are to choose from, beginning with A.
    """
    found = letter_of(text, choices)
    return Verdict("unparsed") if found is None else Verdict("right" if found == gold else "wrong", found)


def letter_of(text: str, choices: int) -> str | None:
    """The letter an answer settles on: in its last box, else after its last "answer is", else all that it says.

    math-verify finds none in a box or in parentheses.
    """
    text = after_thoughts(text).strip()
    boxed, said = [box.content for box in boxes(text)], SAID.findall(text)
    settled = boxed[-1] if boxed else said[-1] if said else text if len(text) <= 4 else ""
    found = LETTER.match(settled)
    letter = found[1].upper() if found else ""
    return letter if letter and letter in LETTERS[:choices] else None
