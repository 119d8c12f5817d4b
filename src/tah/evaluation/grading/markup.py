r"""A reply without its markup: Markdown, LaTeX's text commands, tags. What is left can be searched as prose."""

from __future__ import annotations

import re

FULL_WIDTH = str.maketrans("：（）［］．，‑−", ":()[].,--")
BREAKS = re.compile(r"\\\\|\\[,;:! ~]|\\q?quad\b|\\[hv]space\*?\{[^{}]{0,20}\}|~|&nbsp;|[^\S\n]")
# A letter alone in bold, code, formulas, quotes or a command such as \mathbf: what is marked so is no article.
MARKED = re.compile(
    r"(?<![\w\\])(?:"
    r"(?P<mark>\*{1,3}|_{1,3}|`{1,3}|\"|')[ (\[{<]{0,2}(?P<letter>[A-Za-z])[)\]}>]?[.:]?[)\]}>]? ?(?P=mark)"
    r"|\${1,2}[ (\[{]{0,2}(?P<formula>[A-Z])[ )\]}]{0,2}\.?\${1,2}|\\\( ?(?P<inline>[A-Z]) ?\\\))(?!\w)"
)
COMMANDS = re.compile(
    r"\\(?:text)?color ?\{\w+\}|\\(?:text|math|operatorname|emph|underline)[a-z]*\b|\\(?:left|right|bf|rm|sf|tt|it|"
    r"large|Large|displaystyle|mbox|hbox|checkmark)\b"
)
COMMAND = re.compile(r"\\(?:text|math|operatorname|emph|underline)[a-z]* ?\{ ?[(\[]?([A-Za-z])[)\]]?[.:]? ?\}")
# "5\\text{ A}" is in ampere: what is not bold behind a number is no letter of its own, unless it is in parentheses.
UNIT = re.compile(r"(\d\}?) ?\\(?:text|textrm|mathrm|operatorname|mbox) ?\{ ?([A-Z]) ?\}")
# A letter times a power or an index is a formula: "C e^{2t}", "$A x^2$".
FACTOR = re.compile(r"(?<![\w\\])([A-J]) (?=[a-z][\^_]\{)|(?<=[$(])([A-J]) (?=[a-z][\^_(])")
ANSWER_TAG = re.compile(r"<(?:final_?)?answer>|<answer:", re.IGNORECASE)
TAGS = re.compile(r"</?(?:b|strong|i|em|code|p|u|span|br|div|mark|(?:final_?)?answer)\b[^<>\n]{0,80}>", re.IGNORECASE)
DRESS = re.compile(r"\\f?boxed\b|\\\$|\\[()\[\]{}]|[*`${}]|__+")
LINES = re.compile(r"(?: ?\n ?)+")
HEAD = re.compile(r"^(?:[#>•+✅✓☑✔👉➡-]+\ufe0f? )+", re.MULTILINE)


def plain(text: str) -> str:
    """The text without markup: one space or line break between words, a marked letter in parentheses."""
    text = BREAKS.sub(" ", text.translate(FULL_WIDTH))
    text = re.sub(" +", " ", text)
    text = TAGS.sub("\n", ANSWER_TAG.sub("\nAnswer: ", text)) if "<" in text else text
    text = FACTOR.sub(r"\1\2·", UNIT.sub(r"\1 \2", text))
    for _ in range(2):  # \text{\textbf{C}}
        text = COMMAND.sub(r"{(\1) }", text)
    text = COMMANDS.sub("", text)
    text = MARKED.sub(lambda found: f" ({found['letter'] or found['formula'] or found['inline']}) ", text)
    text = re.sub(r"\( ?(\([A-Za-z]\)) ?\)", r"\1", text)
    text = re.sub(" +", " ", DRESS.sub("", text))
    return HEAD.sub("", LINES.sub("\n", text)).strip()
