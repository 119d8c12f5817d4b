r"""Normalization of the notation of mathematical answers: signs, spaces, labels and lists.

math-verify also normalizes, but it removes more than notation: `3t` loses its t as a unit, and `x'` its prime. This
module therefore does it first, so that math-verify gets plain mathematics.
"""

from __future__ import annotations

import re
from typing import Any

from .reply import boxes

SPACES = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
MINUS = dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"), "-")
SIGNS = str.maketrans(
    MINUS
    | dict.fromkeys(map(ord, SPACES), " ")
    | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"), "")
    | {ord(one): f" {latex} " for one, latex in {
        "×": r"\times", "·": r"\cdot", "⋅": r"\cdot", "÷": "/", "°": r"^\circ", "π": r"\pi", "∞": r"\infty",
        "≤": r"\leq", "⩽": r"\leq", "≥": r"\geq", "⩾": r"\geq", "≠": r"\ne", "∪": r"\cup", "∩": r"\cap",
        "±": r"\pm", "∓": r"\mp", "√": r"\sqrt", "∈": r"\in", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}", "∅": r"\emptyset", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
        "≡": r"\equiv",
        "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "θ": r"\theta", "λ": r"\lambda", "μ": r"\mu",
        "σ": r"\sigma", "φ": r"\phi", "ω": r"\omega", "，": ", ", "；": ";", "％": "%", "．": ".", "＝": "=",
    }.items()}
)  # fmt: skip
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ"
LOWERED = "₀₁₂₃₄₅₆₇₈₉"
FROM_RAISED, FROM_LOWERED = str.maketrans(RAISED, "0123456789-n"), str.maketrans(LOWERED, "0123456789")

Rewrites = list[tuple[re.Pattern[str], Any]]


def rewrites(*pairs: tuple[str, Any], flags: int = 0) -> Rewrites:
    """Return compiled replacements, which `rewritten` applies in order."""
    return [(re.compile(pattern, flags), to) for pattern, to in pairs]


def rewritten(text: str, by: Rewrites) -> str:
    """Return the text after all replacements."""
    for pattern, to in by:
        text = pattern.sub(to, text)
    return text


MACROS = {"lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")", "lt": "<", "gt": ">", "neq": r"\ne "}
MACROS |= dict.fromkeys(("lvert", "rvert", "vert"), "|") | dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac")
MACROS |= dict.fromkeys(("leqslant", "leqq", "le"), r"\leq ") | dict.fromkeys(("geqslant", "geqq", "ge"), r"\geq ")
MACROS["varnothing"] = r"\emptyset "
REWRITES = rewrites(
    (r"\\\$", r" \\dollars "),
    (r"\$|(?<!\\)\\[()\[\]]|\*\*", ""),  # marks of mathematics and of bold text
    (r"\\\\\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]", r"\\\\"),  # space between two rows of a matrix
    (r"(?<!\\)\\!", ""),
    (r"[\"`]", ""),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad\b|\\(?:thin|med|thick|en)space\b|\\hspace\s*\{[^{}]*\}|[\n\t]", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|strut|mathstrut)\b", ""),
    (rf"\\({'|'.join(MACROS)})\b", lambda found: MACROS[found[1]]),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"<=|=<", r"\\leq "),
    (r">=", r"\\geq "),
    (r"!=", r"\\ne "),
    (r"\{\s*,\s*\}|\\text\s*\{\s*,\s*\}", ","),
    (r"(?<![\\a-zA-Z])\{ +\}", " "),
    (r"\\(?:bf|rm|it|sf|tt|em|large|Large|LARGE|huge|Huge|small|normalsize|boldmath)(?![a-zA-Z])", " "),
    (r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:underline|ensuremath)(?=\s*\{)", ""),
    (r"(?<!\\)%|\\?\s*\b(?:percent|pct)\b|\\text\s*\{\s*\\?(?:percent|%)\s*\}", r"\\%"),
    (r"\\degrees?\b|\\(?:text|mathrm)\s*\{\s*°\s*\}", r"^\\circ "),
    (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
    (r"(?<![\\a-zA-Z])(sqrt|infty|pi)\b", r"\\\1 "),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<=\d)i\b", " i"),
    (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w|\.\d)", r"\1 \\times 10^{\2}"),  # an exponent, not Euler's number
    *(
        (rf"(?<=\d) ?(?:(\\(?:text|mathrm)\s*\{{)\s*|\b){word}\b", rf" \\times 10^{{{power}}}\1")
        for word, power in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
    ),
    (r"(?<![\d.,])(-?\d+) (\d+)\s?/\s?(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # a mixed number
    (r"\\(?:text(?:bf|it|rm|sf|tt|normal)|math(?:rm|bf|it|sf|tt|normal)|mbox|emph|boldsymbol|bm)\s*\{", r"\\text{"),
    (r"\\text\s+\{", r"\\text{"),
    (r"\(?\s*(?:\\[bp]?mod(?![a-zA-Z])|\\text\{\s*mod\s*\}|\(\s*mod\b)"
     r"\s*\{?\s*(\w+)\s*\}?(?:\s*\))?", r"\\pmod{\1}"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\^\s*(?:\d|\{\s*\d\s*\}))?)"
     r"\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\\circ\s*[)}]?", r"\1(\\frac{\2\\pi}{180})"),
    (r"(\\text\{[^{}]*)\^\s*\{\s*(-?\d)\s*\}", r"\1^\2"),  # power of a unit; applied twice for a unit with two powers
    (r"(\\text\{[^{}]*)\^\s*\{\s*(-?\d)\s*\}", r"\1^\2"),
    (r"\\text\{((?:[^a-zA-Z{}\\]|\b(?:and|or)\b)*)\}", r" \1 "),
)  # fmt: skip
# "70 000": three digits after each space, and not a list of such numbers
SPACED = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?![\d,]| ?/)")

# \text{18 cm}^2, \text{A and C}: the content is more than words
WHOLE_TEXT = re.compile(r"\s*\\text\{([^{}]*)\}\s*")
LISTED = re.compile(r",\s|;|\b(?:and|or)\b")
AMOUNT_IN_TEXT = re.compile(r"^\\text\{\s*((?:\\dollars)?\s*-?\d[\d.,/]*)(?=[\sa-zA-Z])\s*([^{}]*)\}")

REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")  # 0.1\overline{6}
ROWS = re.compile(r"\\begin\{(cases|aligned|align\*?|gathered|split)\}(.*?)\\end\{\1\}")
INTERVALS = rewrites(  # (0;1], ]0,1], [0,1[
    (r"([(\[\]])([^()\[\];,]*);([^()\[\];,]*)([)\[\]])", r"\1\2,\3\4"),
    (r"^\]([^()\[\],]*,[^()\[\],]*)(?=[\[\])]$)", r"(\1"),
    (r"^([(\[][^()\[\],]*,[^()\[\],]*)\[$", r"\1)"),
)

LABEL = (
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?(?:answers?|solutions?|ans|result)\b\s*"
)
LABELS = rewrites(
    (rf"^\\text\{{\s*{LABEL}(?:is|are|:|=)*\s*:?\s*\}}\s*:?", ""),
    (r"^(?:\\text\{\s*\((?-i:[A-E])\)\s*\}|\((?-i:[A-E])\)\s)\s*(?=[-\d\\])", ""),  # label of a choice
    (rf"^\\text\{{\s*{LABEL}(?:is|are|:|=)+\s*:?\s*", r"\\text{"),
    (rf"^{LABEL}(?:is|are|:|=)+\s*:?\s*", ""),
    (r"^(?:=|\\approx|\\text\{\s*(?:about|approximately|approx\.?)?\s*\}|(?:about|approximately)\b|[\s,;:])+", ""),
    (r"(?:\\text\{[\s.]*\}|(?<!\.)\\?\.|[\s,;:])+$", ""),
    (r"(?<=[a-zA-Z])\.\}$", "}"),
    flags=re.IGNORECASE,
)


def _fraction(found: re.Match[str]) -> str:
    r"""Return a repeating decimal as a fraction: 0.1\overline{6} is \frac{15}{90}."""
    whole, before, period = found[1] + found[2], found[2], found[3] or found[4]
    below = (10 ** len(period) - 1) * 10 ** len(before)
    return rf"\frac{{{int(whole + period) - int(whole or 0)}}}{{{below}}}"


def _listed(found: re.Match[str]) -> str:
    """Return rows of equations as a list. Other rows, such as the cases of a function, stay unchanged."""
    rows = [row.replace("&", " ").strip(" ,;") for row in re.split(r"\\\\|\\newline", found[2])]
    rows = [row for row in rows if row]
    return ", ".join(rows) if all(len(sides(row)) == 2 and len(split_list(row)) == 1 for row in rows) else found[0]


def normalized(text: str) -> str:
    """Return the text of an answer, of one or several values, in canonical notation."""
    for box in reversed(boxes(text)):
        text = text[: box.start] + box.content + text[box.end :]
    text = text.translate(SIGNS)
    text = re.sub(f"[{RAISED}]+", lambda found: f"^{{{found[0].translate(FROM_RAISED)}}}", text)
    text = re.sub(f"[{LOWERED}]+", lambda found: f"_{{{found[0].translate(FROM_LOWERED)}}}", text)
    text = REPEATING.sub(_fraction, ROWS.sub(_listed, rewritten(text, REWRITES)))
    text = rewritten(text, INTERVALS)
    if (whole := WHOLE_TEXT.fullmatch(text)) and LISTED.search(whole[1]):
        text = whole[1]
    text = AMOUNT_IN_TEXT.sub(r"\1 \\text{\2}", text.strip())
    text = SPACED.sub(lambda found: found[0].replace(" ", ""), text)
    return without_labels(re.sub(" {2,}", " ", text).strip())


def without_labels(text: str) -> str:
    """Return the text without a label such as "Answer:" and without a full stop at the end."""
    return rewritten(text, LABELS)


# -- several values ----------------------------------------------------------------------------------------------------

WORD = r"and|or|for|where|with|when|if"
SEPARATOR = re.compile(
    rf",|;|\\\\(?!\[)|\\lor\b|\\vee\b|(?<![a-zA-Z\\])(?:{WORD})(?![a-zA-Z])|\\text\s*\{{\s*,?\s*(?:{WORD})\s*\}}"
)
MARK = re.compile(rf"\\[{{}}]|\\begin\b|\\end\b|[()\[\]{{}}]|{SEPARATOR.pattern}|\\?[a-zA-Z]+")
OPENS, CLOSES = {"(", "[", "{", r"\{", r"\begin"}, {")", "]", "}", r"\}", r"\end"}
VALUED = re.compile(r"\s*(?:=|\\in)\s*(?=\\\{)")  # x = \{1, 2\}
THOUSANDS = re.compile(r"(?<!\d)\d{1,3},(?=\d{3}(?!\d))")
BRACKET = re.compile(r"[(\[]|\\\{")
CLOSING = {"(": ")", r"\{": r"\}", "[": "]"}


def split_list(text: str) -> list[str]:
    """Return the values of a list, split at separators outside of brackets.

    A comma between thousands does not split.
    """
    cuts, depth = [], 0
    for mark in MARK.finditer(text):
        if mark[0] in OPENS:
            depth += 1
        elif mark[0] in CLOSES:
            depth = max(0, depth - 1)
        elif depth == 0 and SEPARATOR.fullmatch(mark[0]):
            cuts.append(mark)
    thousands = {comma.end() - 1 for comma in THOUSANDS.finditer(text)} & {cut.start() for cut in cuts}
    tight = {cut.start() for cut in cuts if cut[0] == "," and not text[cut.end() : cut.end() + 1].isspace()}
    if tight - thousands:  # 1,-2,300: all its commas separate values
        thousands = set()
    parts, at = [], 0
    for cut in cuts:
        if cut.start() not in thousands:
            parts.append(text[at : cut.start()])
            at = cut.end()
    whole = [part.strip() for part in [*parts, text[at:]]]
    # Numbers lose the commas between thousands; within brackets commas separate values
    return [part if BRACKET.search(part) else re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", part) for part in whole if part]


def inner(text: str, opening: str) -> str | None:
    r"""Return the text between brackets that enclose the whole text; None if they do not.

    Args:
        text: Text to look at.
        opening: Opening bracket: `(`, `[` or `\{`.
    """
    closing = CLOSING[opening]
    if not (text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing)):
        return None
    depth = 0
    for mark in MARK.finditer(text):
        depth += (mark[0] in OPENS) - (mark[0] in CLOSES)
        if depth == 0 and mark.end() < len(text):
            return None
    return text[len(opening) : -len(closing)] if depth == 0 else None


def sides(text: str) -> list[str]:
    """Return the sides of an equation, split at `=` outside of brackets. Another text is one side."""
    parts, at, depth = [], 0, 0
    for mark in re.finditer(rf"=|{MARK.pattern}", text):
        depth += (mark[0] in OPENS) - (mark[0] in CLOSES)
        if mark[0] == "=" and depth == 0:
            parts.append(text[at : mark.start()].strip())
            at = mark.end()
    return [*parts, text[at:].strip()]


def plus_and_minus(text: str) -> list[str]:
    r"""Return the values of a text with \pm.

    One \pm, or \pm with \mp, gives two values. Two \pm give four. A text with more than two \pm stays unchanged.
    """
    if not (times := len(re.findall(r"\\pm(?![a-zA-Z])", text))) or times > 2:
        return [text]
    linked = bool(re.search(r"\\mp(?![a-zA-Z])", text))
    choices = ["+" * times, "-" * times] if linked or times == 1 else ["++", "--", "+-", "-+"]
    values = []
    for signs in choices:
        left = iter(signs)
        value = re.sub(r"\\pm(?![a-zA-Z])", lambda _, left=left: f" {next(left)} ", text)  # type: ignore[misc]
        values.append(re.sub(r"\\mp(?![a-zA-Z])", " - " if signs[0] == "+" else " + ", value).strip().lstrip("+ "))
    return values


def members(text: str) -> list[str]:
    r"""Return the values of a normalized text: those of a list, of a set, and of both signs of \pm."""
    values: list[str] = []
    for part in split_list(text):
        part = VALUED.sub(r" \\in ", part).rpartition(r"\in ")[2].strip() if VALUED.search(part) else part
        within = inner(part, r"\{")
        if within is None or re.search(r"\\mid|\||:", within) or part == text == within:
            values += plus_and_minus(part)
        else:
            values += members(within)
    return values
