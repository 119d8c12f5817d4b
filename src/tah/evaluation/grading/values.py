r"""One value of a mathematical answer: its unit, and its coordinates.

`5 km`, `\$18`, `90^\circ` and `12 apples` have a unit. Letters after other values can be symbols instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

from .notation import inner, rewrites, rewritten, split_list, without_labels

# A set of numbers by a condition: \{x \in \mathbb{R} \mid x>2\}
SET_OF = re.compile(r"\\\{\s*[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\\mid|\||:)(.*[<>=\\].*)\\\}")
PLAIN = rewrites(  # forms that math-verify parses as intended
    (r"\\dollars", ""),
    (r"\\text\{\s*([a-zA-Z])\s*\}", r"\1"),
    # Symbols that math-verify would parse as functions or constants
    (r"_\{?\s*\\(max|min)(?![a-zA-Z])\s*\}?|_\{\s*\\text\{\s*(\w+)\s*\}\s*\}", r"_{\1\2}"),
    (r"\\gamma(?![a-zA-Z])", r"\\text{gama}"),
    (r"\\Gamma(?![a-zA-Z])(?!\s*\()", r"\\text{Gama}"),
    (r"(?<![a-zA-Z\\])(?<!\\text\{)([eEiI])_(?:\{(\w+)\}|(\w))", r"\\text{\1_\2\3}"),
)


@dataclass(frozen=True)
class Value:
    """One value of an answer.

    Args:
        text: Text of the value without labels and full stops.
        bare: Text without the unit; equal to `text` if there is none.
        unit: Unit in its canonical form; None if there is none.
    """

    text: str
    bare: str
    unit: str | None = None


def read_value(text: str, gold: bool = False) -> Value:
    """Parse one value of a normalized text.

    Args:
        text: Text of the value, from `split_list`.
        gold: Whether it is the right answer. There `5m` is a product; in a reply it is a product or metres.
    """
    text = without_labels(text)
    if set_of := SET_OF.fullmatch(text):
        text = set_of[1].strip()
    if not gold and r"\approx" in text:
        exact, _, rounded = text.partition(r"\approx")
        text = (rounded if re.fullmatch(r"\\?[a-zA-Z]\w*\s*", exact) else exact).strip()
    body, unit = without_unit(text, gold)
    return Value(rewritten(text, PLAIN).strip(), rewritten(body, PLAIN).strip(), unit)


# -- units -------------------------------------------------------------------------------------------------------------

NAMES = """
    mm millimeter millimetre, cm centimeter centimetre, dm decimeter decimetre, m meter metre,
    km kilometer kilometre, in inch inche inches, ft foot feet, yd yard, mi mile, mg milligram, g gram gm,
    kg kilogram, lb pound lbs, oz ounce, ml mL milliliter millilitre, l L liter litre, s sec second, min minute,
    h hr hour, day, week, month, yr year, deg degree °, rad radian, K kelvin, N newton, J joule, kJ kilojoule, eV,
    W watt, kW kilowatt, V volt, A amp ampere, C coulomb, Hz hertz, Pa pascal, T tesla, mol mole, ohm,
    dollar usd $, cent ¢, euro eur €, pence, rupee rs ₹, yen ¥, sq square, cu cubic, mph, kmh kmph kph, unit
"""
UNITS = {name: names.split()[0] for names in NAMES.split(",") for name in names.split()}
# Words that change or describe a value are not units
NO_UNIT = re.compile(
    r"hundreds?|thousands?|[mbtr]+illions?|dozens?|half|halves|thirds?|quarters?|percent\w*|times|squared|cubed|mod|is|are|not|no|"
    r"st|nd|rd|th|all|any|odd|even|prime|base|plus|minus|over|of|to|in|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|lim|gcd|lcm|infinity|inf|"
    r"factorial|degrees?c|true|false|than|least|most|more|less|about|approximately|solutions?|root|mean|i|e|x|y|z|n|k"
)
# Between two numbers these words describe the value, but not after a single number: `18 \\text{ of them}`
BEHIND = ("of", "in", "times", "all", "over", "to", "and")
POWER = r"\^\s*(?:\{\s*-?\d\s*\}|\d)"
# An amount before a unit in plain letters: `5 m`, `\frac{1}{2} hours`, `2\pi cm`, `3 \times 10^{8} m/s`
AMOUNT = re.compile(
    r"(?:\\dollars|[-+\d.,/\s]|\\frac\{[^{}]*\}\{[^{}]*\}|\\sqrt\{[^{}]*\}|\\pi|\\times|\\cdot|\^\s*\{[^{}]*\}|\^-?\d)+"
)
NUMBER_WITHIN = re.compile(r"(?<![\^\-{a-zA-Z\d.,])\d")  # another amount; `m^2`, `s^-1` and `cm2` have none
SPOKEN = rf"\\text\{{[^{{}}]*\}}(?:{POWER})?"
IN_TEXT = re.compile(
    rf"(?=\s*\\(?:text|frac))(?:{SPOKEN}|\\frac\{{\s*{SPOKEN}\s*\}}\{{\s*{SPOKEN}\s*\}}|{POWER}|\\cdot|\\circ|[/\s^·])+$"
)
IN_LETTERS = re.compile(rf"(?:(?<![a-zA-Z\\])(?=[a-zA-Z])|(?=\s+[a-zA-Z]))(?:[a-zA-Z.]|{POWER}|[/\s]|\\cdot)+$")
CURRENCY = re.compile(
    r"([-+]?)\s*(?:\\dollars|([€£¥₹])|(?:US|USD|Rs\.?)(?=\s*\d)|\\text\{\s*(?:US|USD|Rs\.?)\s*\}(?=\s*\d))\s*"
)
# Units with signs, rewritten as \\text. This applies to replies, after an amount; in a right answer they can be symbols
SIGNED = rewrites(
    (r"(?:\\text\{)?\s*([kMGm]?)\s*\}?\s*\\Omega\s*\}?$", r"\\text{\1ohm}"),
    (r"\\mu\s*(?:\\text\{\s*([a-zA-Z]+)\s*\}|([a-zA-Z]+))$", r"\\text{micro\1\2}"),
    (r"(?:\\text\{\s*)?(?:\\mathring\{\s*A\s*\}|\\AA(?![a-zA-Z])|Å)\s*\}?$", r"\\text{angstrom}"),
    (r"([MLR])_(?:\{\s*\\odot\s*\}|\\odot)$", r"\\text{solar \1}"),
    (r"\\frac\{\s*([a-zA-Z]+)\s*\}\{\s*([a-zA-Z]+(?:\^\{?\d\}?)?)\s*\}$", r"\\text{\1}/\\text{\2}"),
)


def without_unit(text: str, gold: bool) -> tuple[str, str | None]:
    """Return a value without its unit, and the canonical form of the unit or None.

    In a right answer (`gold`) `5m` is a product.
    """
    if not gold:
        text = _spelled(text)
    if (sign := CURRENCY.match(text)) and re.search(r"\d", text):
        body, unit = without_unit(text[sign.end() :], gold)
        return sign[1] + body, unit or _unit(sign[2] or "$")
    if (sign := re.search(r"(?:\\dollars|[€£¥₹¢])$", text)) and sign.start():
        return text[: sign.start()].strip(), _unit(sign[0].replace(r"\dollars", "$"))
    degrees = re.search(r"\^\s*\\circ\s*(?:\\text\{\s*)?([CF]?)\s*\}?$", text)
    if degrees and degrees.start():
        return text[: degrees.start()].strip(), f"deg{degrees[1]}^1"
    for pattern, spoken in ((IN_TEXT, True), (IN_LETTERS, False)):
        found = pattern.search(text)
        if not found or not (body := text[: found.start()].strip()) or "text" in body:
            continue
        names = re.findall("[a-zA-Z]+", re.sub(r"\\(?:text|cdot|circ|frac)", " ", found[0]))
        known = all(_name(name) or name == "per" for name in names)
        changing = [name for name in names if NO_UNIT.fullmatch(name.lower()) and not (spoken and name in BEHIND)]
        if not names or (not known and changing) or (spoken and NUMBER_WITHIN.search(found[0])):
            continue
        if _is_unit(names, known, spoken, gold) and _follows(body, spoken, known, text[len(body) :]):
            return body, _unit(found[0])
    return text, None


def _spelled(text: str) -> str:
    """Return a value with its unit spelled out if the unit has a sign such as \\Omega."""
    for pattern, to in SIGNED:
        found = pattern.search(text)
        if not found or not found.start() or not AMOUNT.fullmatch(text[: found.start()]):
            continue
        if not found[0].startswith(r"\frac") or all(map(_name, re.findall(r"(?<!\\)\b[a-zA-Z]+", found[0]))):
            return text[: found.start()] + found.expand(to)
    return text


def _is_unit(names: list[str], known: bool, spoken: bool, gold: bool) -> bool:
    """Return whether words after an amount are a unit."""
    if spoken:  # in \\text; M is molar there
        return known or len(names[0]) > 1 or names == ["M"]
    if known:
        return not (gold and any(len(name) == 1 or name in ("mg", "ml") for name in names))
    first = len(names[0]) > 3 or _name(names[0]) is not None
    words = all(1 < len(name) < 20 and name not in ascii_lowercase for name in names)  # abcd is a product
    return first and words and len(names) < 5


def _follows(body: str, spoken: bool, known: bool, rest: str) -> bool:
    """Return whether a unit can follow this text: an amount, and a space if the unit is an unknown word."""
    if spoken:
        return bool(re.search(r"[\w)}\]]$|\\(?:pi|%)$", body)) and (known or bool(re.search(r"\d", body)))
    return bool(AMOUNT.fullmatch(body)) and (known or rest[0].isspace())


def _name(name: str) -> str | None:
    """Return the canonical name of a unit; None if it is unknown."""
    for form in (name, name.lower(), name.lower().removesuffix("s")):
        if form in UNITS and (len(name) > 2 or form == name):
            return UNITS[form]
    return None


def _unit(text: str) -> str:
    """Return the canonical form of a unit; `?` and its words for an unknown one, such as apples."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace(r"\cdot", " ").replace(r"^\circ", " deg ")
    text = text.replace("}{", "}/{")  # numerator and denominator of a fraction
    text = re.sub(r"\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", re.sub(r"\bper\b|/", " / ", text))
    tokens = re.findall(r"[a-zA-Z$€£¥₹¢°]+|\^-?\d|/", text)
    if any(token[0] not in "/^" and _name(token) is None for token in tokens):
        return "? " + " ".join(tokens)
    powers: dict[str, int] = {}
    sign = power = 1
    last = ""
    for token in tokens:
        name = _name(token) or token
        if token == "/":
            sign = -1
        elif token[0] == "^":
            powers[last] = powers.get(last, 0) + sign * (int(token[1:]) - 1)
        elif name in ("sq", "cu"):
            power = 2 if name == "sq" else 3
        else:
            last = {"mph": "mi", "kmh": "km"}.get(name, name)
            powers[last] = powers.get(last, 0) + sign * power
            if last != name:
                powers["h"] = powers.get("h", 0) - sign
            power = 1
    return " ".join(f"{name}^{powers[name]}" for name in sorted(powers))


def same_unit(one: str | None, other: str | None) -> bool:
    """Return whether two units can belong to equal values.

    A missing unit fits every unit. An unknown unit fits every unknown unit.
    """
    if one is None or other is None or one == other or "unit" in one or "unit" in other:
        return True
    return one.startswith("?") and other.startswith("?")


# -- coordinates -------------------------------------------------------------------------------------------------------

NAME = re.compile(r"^((?:\\[a-zA-Z]+|[a-zA-Z])[a-zA-Z_{}0-9\s]*)=(?!=)\s*")  # x, x_{1}, \angle A B C
TUPLE = re.compile(r"^(\([^()]*,[^()]*\))\s*=\s*(\(.*\))$")
COLUMN = re.compile(
    r"^\\begin\{[pb]matrix\}((?:(?!\\\\|\\begin)[^&])*(?:\\\\(?:(?!\\\\|\\begin|\\end)[^&])+)+)\\end\{[pb]matrix\}$"
)
AXES = ("x", "y", "z")
Coordinate = tuple[str | None, Value]


def coordinates(text: str, gold: bool = False) -> list[Coordinate] | None:
    r"""Return the coordinates of `(1,2)`, of `(a,b)=(1,2)` with their names, or of a column; None for other texts."""
    if column := COLUMN.match(text):
        return [(None, read_value(part, gold)) for part in column[1].split(r"\\")]
    names: list[str | None] = []
    if named := TUPLE.match(text):
        names = [re.sub(r"\s", "", name) for name in split_list(named[1][1:-1])]
        text = named[2]
    within = inner(text.rpartition("=")[2].strip(), "(") if NAME.match(text) else inner(text, "(")
    parts = split_list(within) if within else []
    if len(parts) < 2 or (names and len(names) != len(parts)):
        return None
    return list(zip(names or [None] * len(parts), (read_value(part, gold) for part in parts), strict=True))


def named_values(values: Sequence[Value]) -> list[Coordinate]:
    """Return the values of a list as coordinates, with their names if they have any."""
    named = ((NAME.match(value.text), value) for value in values)
    return [
        (re.sub(r"\s", "", name[1]), read_value(value.text[name.end() :])) if name else (None, value)
        for name, value in named
    ]


def same_coordinates(
    gold: Sequence[Coordinate], given: Sequence[Coordinate], alike: Callable[[Value, Value], bool]
) -> bool:
    """Return whether two lists of coordinates are equal: by name if both have the same names, else in order."""
    if len(gold) != len(given):
        return False
    names, others = ([name for name, _ in side] for side in (gold, given))
    if None not in names and sorted(map(str, names)) == sorted(map(str, others)):
        given = [given[others.index(name)] for name in names]
    elif {None} in (set(names), set(others)):  # x, y and z have a natural order
        gold, given = (
            sorted(side, key=lambda one: str(one[0])) if all(name in AXES for name, _ in side) else side
            for side in (gold, given)
        )
    return all(alike(one, other) for (_, one), (_, other) in zip(gold, given, strict=True))
