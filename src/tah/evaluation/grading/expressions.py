"""Mathematics read by math-verify's parser and compared by its grader, with a guard before and after.

Before: a text is read whole or not at all. After: what math-verify takes for equal only because it rounds is not.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify.grader import should_treat_as_complex, sympy_expr_eq
from sympy.core.relational import Relational

from .notation import inner, sides, split_list
from .values import coordinates, same_coordinates

DECIMALS, DIGITS = 6, 15  # math-verify's own: floats are equal to so many decimals, expressions to so many digits
DECIMAL = 5e-7  # the sixth decimal, rounded
SMALL, TINY = 5e-3, 1e-5  # numbers below are compared by their size, for which math-verify's decimals are too few
RELATIVE = 1e-6
LONGEST = 2000  # characters; nothing longer is mathematics
DEEPEST = 100  # brackets within each other
NESTED = 5  # fractions; with more, they may be a continued fraction
NORMAL = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
# What the parser or its normalization leaves out without a word
LEFT_OUT = re.compile(
    r"['\"`]|\\[lcvd]?dots\b|\.\.|\\prime\b|\\approx|\\sim\b|\\mid\b|\\bmod|\\pmod|\\mod\b|!!|\d\s*_|\)\s*_|:[^:]*:|[{}]\s*:\s*\w+[<>=]"
)
GREEK = (
    "alpha|beta|delta|epsilon|varepsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|varphi|chi|psi|omega|"
    "Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|Gamma|infty|emptyset"
)
TOKEN = re.compile(
    rf"\\text\{{(?P<word>[^{{}}]*[^{{}}\s][^{{}}]*)\}}|\\(?:begin|end)\{{\w+\*?\}}|\\(?P<greek>{GREEK})(?![a-zA-Z])|\\[a-zA-Z]+|(?P<number>\d+)|(?P<letter>[a-zA-Z])"
)
MARK = re.compile(r"[a-zA-Z]+|\d{3}")  # as sympy prints them: the decimals of 283.293 are 293000000000
SPARE = "qwkzvujpyrtsghbamnlcfdxo"
TEXT = re.compile(r"\\text\{([^{}]*)\}")
WORD = re.compile(r"[a-zA-Z]{2,}")
SHORT_WORDS = ("no", "on", "if", "or", "so")
Expression = Any  # sympy's Basic or one of its matrices, which are none


# -- reading ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def read(text: str, cased: bool = False, real: bool = True) -> Expression | None:
    """A text as an expression; None where it cannot be read.

    Args:
        text: one value of `dress`.
        cased: R and r are two symbols.
        real: symbols are real numbers.
    """
    depths = itertools.accumulate((mark in "([{") - (mark in ")]}") for mark in text)
    if len(text) > LONGEST or LEFT_OUT.search(text) or max(depths, default=0) > DEEPEST or is_words(text):
        return None
    return _parse(normalize_latex(text, NORMAL), cased, real)


def _parse(latex: str, cased: bool, real: bool, fold: bool = True) -> Expression | None:
    config = ConversionConfig(lowercase_symbols=not cased)
    try:
        found = latex2sympy(
            latex, is_real=real, convert_degrees=False, normalization_config=None, conversion_config=config
        )
        if not isinstance(found, (sympy.Basic, sympy.MatrixBase)) or found.has(sympy.zoo, sympy.nan):
            return None
        found = found.xreplace({sympy.Symbol("i", real=False): sympy.I})
        return _folded(found) if fold and latex.count(r"\frac") > NESTED else found
    except Exception:  # the parser's own are bare ones, and sympy's of any type
        return None


def _folded(found: Expression) -> Expression:
    """Fractions within fractions as one number: left open by the parser, they take sympy twice the time per level."""
    if not isinstance(found, (sympy.Add, sympy.Mul, sympy.Pow)):
        return found
    args = [_folded(arg) for arg in found.args]
    small = not isinstance(found, sympy.Pow) or (args[1].is_Integer and abs(args[1]) < 64)
    if small and all(isinstance(arg, sympy.Number) for arg in args):
        return found.func(*args)
    return found if tuple(args) == found.args else found.func(*args, evaluate=False)


@functools.lru_cache(maxsize=4096)
def is_whole(text: str, cased: bool = False, real: bool = True) -> bool:
    """Whether `read` reads all of a text: with another number or symbol in one place it reads another expression."""
    found = read(text, cased, real)
    latex = normalize_latex(text, NORMAL)
    if found is None or re.fullmatch(r"[-+\d./\s]*", latex):
        return found is not None
    tokens = [token for token in TOKEN.finditer(latex) if token.lastgroup]
    spare = (letter for letter in SPARE if letter not in latex.lower())
    names = {name: next(spare, "k") for name in dict.fromkeys(token[0] for token in tokens if not token["number"])}
    primes = map(sympy.prime, itertools.count(60))
    marks = {token: names.get(token[0]) or str(next(primes)) for token in tokens}
    # All at once first: an expression that shows each mark has read each token. What it does not show, as numbers that
    # were added up and letters within a longer name, is looked for one by one.
    shown = _names(_parse(_with(latex, marks), cased, real, fold=False))
    hidden = [token for token, mark in marks.items() if mark not in shown]
    return all(_parse(_with(latex, {token: marks[token]}), cased, real) != found for token in hidden)


def _names(found: Expression | None) -> set[str]:
    """The numbers and names in an expression."""
    if found is None:
        return set()
    functions = {type(function).__name__ for function in found.atoms(sympy.Function)}
    return set(MARK.findall(" ".join([*map(str, found.atoms()), *functions])))


def _with(latex: str, change: dict[re.Match[str], str]) -> str:
    """The text with others in the places of some tokens."""
    parts, at = [], 0
    for token, instead in change.items():
        instead = rf"\text{{{instead}}}" if token["word"] else instead if instead.isdigit() else f" {instead} "
        parts += [latex[at : token.start()], instead]
        at = token.end()
    return "".join([*parts, latex[at:]])


def is_words(text: str) -> bool:
    """Whether it consists of words: for math-verify these are products of their letters, and `east` is `teas`."""
    plain = TEXT.sub(r"\1", text)
    if "\\" in plain or not re.fullmatch(r"[a-zA-Z\s,.'()-]*", plain):
        return False
    return any(
        letters.lower() in SHORT_WORDS if len(letters) < 3 else "".join(sorted(letters)) not in ascii_lowercase
        for letters in WORD.findall(plain)  # cab is a product, of a, b and c
    )


def plain_text(text: str) -> str:
    """What a text is compared by where it is no mathematics."""
    text = TEXT.sub(r"\1", text)
    text = re.sub(r"\\(?:cdot|times)(?![a-zA-Z])|[\s$]|\\ ", "", text)
    text = re.sub(r"(?<=[_^])\{(\w)\}", r"\1", text)
    return text if re.search(r"\\|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", text) else text.casefold()


# -- comparing -------------------------------------------------------------------------------------------------------


def equal(gold: str, given: str) -> bool:
    """Whether a value of the right answer and a value given are the same, as text or as mathematics."""
    if plain_text(gold) == plain_text(given):
        return True
    golds, givens = coordinates(gold, True), coordinates(given)
    if golds and givens:
        return same_coordinates(golds, givens, lambda one, other: equal(one.text, other.text))
    if (golds or givens) and any(inner(side, r"\{") is not None or len(split_list(side)) > 1 for side in (gold, given)):
        return False  # a set is no tuple
    if (inner(gold, "[") is None) != (inner(given, "[") is None) or _is_side(gold, given):
        return False
    cased = _two_cases(gold) or _two_cases(given)
    real = not (should_treat_as_complex(gold) or should_treat_as_complex(given))
    first = read(gold, cased, real)
    second = read(given, cased, real)
    if first is None or second is None or not is_whole(gold, cased, real):
        return False
    return same(first, second) and is_whole(given, cased, real)


# Left sides that are no name of the right side: `\nabla \cdot E`, `\dot{x}`, `\text{Yes, } x`
NO_NAME = re.compile(r"\\(?:nabla|partial|d?dot)(?![a-zA-Z])|\\text\{[^{}]*[^\w\s{}]")
BARE = re.compile(
    r"(?!\\(?:pi|infty|emptyset)$|[ei]$)\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?|\\text\{(?:[a-zA-Z]_\w+|gama|Gama)\}"
)


def _is_side(gold: str, given: str) -> bool:
    """Whether the answer is a side of an equation that says more than a name's value, as `m=n` and `a=b=1` do."""
    first, *others = sides(gold)
    if not others or len(sides(given)) > 1:
        return False
    return bool(NO_NAME.search(first)) or (not first.endswith(")") and any(map(BARE.fullmatch, others)))


def _two_cases(text: str) -> bool:
    r"""Whether a letter occurs in both cases, as in R-r or \omega-\Omega: then they are two."""
    names = set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", re.sub(r"\\text\{[^{}]{2,}\}", "", text)))
    return any(
        name[-1].islower() and (name.upper() if len(name) == 1 else name[:2].upper() + name[2:]) in names
        for name in names
    )


def same(gold: Expression, given: Expression) -> bool:
    """Whether two expressions are equal, as math-verify says; numbers of any size are compared by their own size."""
    if isinstance(gold, sympy.MatrixBase) and isinstance(given, sympy.MatrixBase):
        return gold.shape == given.shape and all(map(same, gold.flat(), given.flat()))
    if isinstance(gold, sympy.Tuple) and isinstance(given, sympy.Tuple):
        return len(gold) == len(given) and all(map(same, gold, given))
    if isinstance(gold, sympy.FiniteSet) and isinstance(given, sympy.FiniteSet):
        return matched(list(gold), list(given), same)
    if isinstance(gold, sympy.Interval) and isinstance(given, sympy.Interval):
        ends = gold.left_open == given.left_open and gold.right_open == given.right_open
        return bool(ends and same(gold.start, given.start) and same(gold.end, given.end))
    if isinstance(gold, sympy.Eq) and isinstance(given, sympy.Eq) and gold.lhs == given.lhs:
        return same(gold.rhs, given.rhs)
    try:
        found = sympy_expr_eq(gold, given, DECIMALS, DIGITS, allow_set_relation_comp=True)
    except Exception:  # sympy's, of any type, where it cannot compare
        found = False
    if found and isinstance(gold, Relational) and isinstance(given, Relational):
        return _same_ends(gold, given)
    gold, given = (side.rhs if isinstance(side, sympy.Eq) and side.lhs.is_Symbol else side for side in (gold, given))
    if isinstance(gold, sympy.Expr) and isinstance(given, sympy.Expr):
        return not _differ(gold, given) if found else _equal_floats(gold, given)
    return bool(found)


def _same_ends(gold: Relational, given: Relational) -> bool:
    """Whether two inequalities that math-verify takes for equal have the same ends, however small."""
    try:
        one, other = gold.as_set(), given.as_set()
    except Exception:  # sympy's, of any type: of several unknowns, or not solved
        return True
    return not (isinstance(one, sympy.Interval) and isinstance(other, sympy.Interval)) or same(one, other)


def matched(gold: Sequence[Any], given: Sequence[Any], alike: Any) -> bool:
    """Whether each of the one has its like among the others, in any order, and none is left over."""
    left = list(given)
    if len(gold) != len(left):
        return False
    for one in gold:
        at = next((at for at, other in enumerate(left) if alike(one, other)), None)
        if at is None:
            return False
        del left[at]
    return True


def _numbers(*sides: sympy.Expr) -> list[complex] | None:
    """The sides as numbers, symbols at some fixed values; None where they have none."""
    symbols = sorted(set().union(*(side.free_symbols for side in sides)), key=str)
    values = {symbol: sympy.Rational(17 + 6 * at, 11 + 2 * at) for at, symbol in enumerate(symbols)}
    try:
        return [complex(side.doit().subs(values).evalf(30)) for side in sides]
    except Exception:  # no number: an unknown function, infinity
        return None


def _differ(gold: sympy.Expr, given: sympy.Expr) -> bool:
    """Whether two sides that math-verify takes for equal differ by more than the rounding of what was written."""
    if (values := _numbers(gold, given)) is None:
        return False
    size = max(map(abs, values))
    symbols = bool(gold.free_symbols | given.free_symbols)
    tolerance = RELATIVE * size if symbols else _tolerance(size)
    if not (symbols or size < SMALL) or not abs(values[0] - values[1]) > tolerance:
        return False
    try:
        return sympy.simplify(gold - given) != 0
    except Exception:
        return True


def _equal_floats(gold: sympy.Expr, given: sympy.Expr) -> bool:
    """Whether they are one number, of which a side was written with a point, to six decimals or fifteen digits."""
    if gold.free_symbols | given.free_symbols or not (gold.has(sympy.Float) or given.has(sympy.Float)):
        return False
    values = _numbers(gold, given)
    return values is not None and abs(values[0] - values[1]) <= _tolerance(max(map(abs, values)))


def _tolerance(size: float) -> float:
    """How far two numbers of this size may be apart: less for small ones, of which six decimals say little."""
    return max(DECIMAL, 1e-14 * size) if size >= SMALL else (1e-4 if size >= TINY else RELATIVE) * size


# -- regions ---------------------------------------------------------------------------------------------------------


def region(text: str) -> sympy.Set | None:
    """The numbers that inequalities or intervals describe, joined by "and" and "or"; None where there is none."""
    pieces = []
    for either in re.split(rf"{_joint('or')}|\\lor\b|\\vee\b", text):
        both = [_read_whole(part.strip(" ,")) for part in re.split(rf"{_joint('and')}|\\land\b|\\wedge\b", either)]
        if len(both) == 1 and (both[0] is None or isinstance(both[0], sympy.FiniteSet)):  # intervals in a list
            parts = [_read_whole(part) for part in split_list(either)]
            if not all(map(_is_region, parts)):
                return None
            pieces += parts
            continue
        try:
            pieces.append(sympy.Intersection(*map(_as_set, both)))
        except Exception:  # of any type, where there is no such set
            return None
    return sympy.Union(*pieces)


def _joint(word: str) -> str:
    return rf"\\text\{{\s*,?\s*{word}\s*\}}|(?<![a-zA-Z]){word}(?![a-zA-Z])"


def _read_whole(text: str) -> Expression | None:
    return read(text) if is_whole(text) else None


def _is_region(part: Expression | None) -> bool:
    """Whether it is an interval, or several; not (1,2), which in a list is a pair."""
    if isinstance(part, sympy.Interval) and part.is_open:
        return bool(part.start.is_infinite or part.end.is_infinite)
    return isinstance(part, (sympy.Interval, sympy.Union))


def _as_set(found: Expression | None) -> sympy.Set:
    if isinstance(found, sympy.Eq) and isinstance(found.rhs, sympy.Set):
        found = found.rhs
    if isinstance(found, sympy.Set) and not isinstance(found, sympy.FiniteSet):
        return found.doit()
    if isinstance(found, (Relational, sympy.And)) and len(found.free_symbols) == 1:
        return found.as_set()
    raise ValueError("no set")


def unknowns(text: str) -> set[str]:
    """The letters of inequalities."""
    return set(re.findall(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+|\b(?:or|and)\b", " ", text)))
