"""Mathematics parsed by math-verify's parser and compared by its grader, with two more checks.

A text must be parsed completely, or it does not count as mathematics. Two expressions that math-verify finds equal only
because of its rounding are not equal.
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

DECIMALS, DIGITS = 6, 15  # math-verify's defaults: decimals for floats, digits for expressions
DECIMAL = 5e-7  # half of the sixth decimal
SMALL, TINY = 5e-3, 1e-5  # smaller numbers have a relative tolerance, because six decimals are too coarse
RELATIVE = 1e-6
LONGEST = 2000  # characters; a longer text does not count as mathematics
DEEPEST = 100  # maximum depth of nested brackets
NESTED = 5  # number of fractions; with more, they may form a continued fraction
NORMAL = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
# Notation that the parser or its normalization drops silently
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
MARK = re.compile(r"[a-zA-Z]+|\d{3}")  # three digits, because sympy prints the decimals of 283.293 as 293000000000
SPARE = "qwkzvujpyrtsghbamnlcfdxo"
TEXT = re.compile(r"\\text\{([^{}]*)\}")
WORD = re.compile(r"[a-zA-Z]{2,}")
SHORT_WORDS = ("no", "on", "if", "or", "so")
Expression = Any  # sympy.Basic, or a matrix of sympy, which is not a Basic


# -- reading ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def read(text: str, cased: bool = False, real: bool = True) -> Expression | None:
    """Return a text as an expression; None if it cannot be parsed.

    Args:
        text: Text of one value, as in `values.Value`.
        cased: Whether R and r are two symbols.
        real: Whether symbols are real numbers.
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
    except Exception:  # the parser raises plain exceptions, and sympy any type
        return None


def _folded(found: Expression) -> Expression:
    """Return nested fractions as one number. Unevaluated, each level would double the time of sympy."""
    if not isinstance(found, (sympy.Add, sympy.Mul, sympy.Pow)):
        return found
    args = [_folded(arg) for arg in found.args]
    small = not isinstance(found, sympy.Pow) or (args[1].is_Integer and abs(args[1]) < 64)
    if small and all(isinstance(arg, sympy.Number) for arg in args):
        return found.func(*args)
    return found if tuple(args) == found.args else found.func(*args, evaluate=False)


@functools.lru_cache(maxsize=4096)
def is_whole(text: str, cased: bool = False, real: bool = True) -> bool:
    """Return whether `read` parses the whole text.

    It does if replacing any number or symbol of the text changes the expression.
    """
    found = read(text, cased, real)
    latex = normalize_latex(text, NORMAL)
    if found is None or re.fullmatch(r"[-+\d./\s]*", latex):
        return found is not None
    tokens = [token for token in TOKEN.finditer(latex) if token.lastgroup]
    spare = (letter for letter in SPARE if letter not in latex.lower())
    names = {name: next(spare, "k") for name in dict.fromkeys(token[0] for token in tokens if not token["number"])}
    primes = map(sympy.prime, itertools.count(60))
    marks = {token: names.get(token[0]) or str(next(primes)) for token in tokens}
    # First replace all tokens at once: a token whose mark is in the expression was parsed. The other tokens, such as
    # numbers that were added up and letters of a longer name, are replaced one by one.
    shown = _names(_parse(_with(latex, marks), cased, real, fold=False))
    hidden = [token for token, mark in marks.items() if mark not in shown]
    return all(_parse(_with(latex, {token: marks[token]}), cased, real) != found for token in hidden)


def _names(found: Expression | None) -> set[str]:
    """Return the numbers and names in an expression."""
    if found is None:
        return set()
    functions = {type(function).__name__ for function in found.atoms(sympy.Function)}
    return set(MARK.findall(" ".join([*map(str, found.atoms()), *functions])))


def _with(latex: str, change: dict[re.Match[str], str]) -> str:
    """Return the text with some tokens replaced."""
    parts, at = [], 0
    for token, instead in change.items():
        instead = rf"\text{{{instead}}}" if token["word"] else instead if instead.isdigit() else f" {instead} "
        parts += [latex[at : token.start()], instead]
        at = token.end()
    return "".join([*parts, latex[at:]])


def is_words(text: str) -> bool:
    """Return whether a text consists of words. For math-verify a word is a product, so `east` would equal `teas`."""
    plain = TEXT.sub(r"\1", text)
    if "\\" in plain or not re.fullmatch(r"[a-zA-Z\s,.'()-]*", plain):
        return False
    return any(
        letters.lower() in SHORT_WORDS if len(letters) < 3 else "".join(sorted(letters)) not in ascii_lowercase
        for letters in WORD.findall(plain)  # cab is the product of a, b and c
    )


def plain_text(text: str) -> str:
    """Return the form by which texts are compared that are not mathematics."""
    text = TEXT.sub(r"\1", text)
    text = re.sub(r"\\(?:cdot|times)(?![a-zA-Z])|[\s$]|\\ ", "", text)
    text = re.sub(r"(?<=[_^])\{(\w)\}", r"\1", text)
    return text if re.search(r"\\|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", text) else text.casefold()


# -- comparing -------------------------------------------------------------------------------------------------------


def equal(gold: str, given: str) -> bool:
    """Return whether a value of the right answer and a value of the reply are equal, as text or as mathematics."""
    if plain_text(gold) == plain_text(given):
        return True
    golds, givens = coordinates(gold, True), coordinates(given)
    if golds and givens:
        return same_coordinates(golds, givens, lambda one, other: equal(one.text, other.text))
    if (golds or givens) and any(inner(side, r"\{") is not None or len(split_list(side)) > 1 for side in (gold, given)):
        return False  # a set is not a tuple
    if (inner(gold, "[") is None) != (inner(given, "[") is None) or _is_side(gold, given):
        return False
    cased = _two_cases(gold) or _two_cases(given)
    real = not (should_treat_as_complex(gold) or should_treat_as_complex(given))
    first = read(gold, cased, real)
    second = read(given, cased, real)
    if first is None or second is None or not is_whole(gold, cased, real):
        return False
    return same(first, second) and is_whole(given, cased, real)


# Left sides that are not a name of the right side: `\nabla \cdot E`, `\dot{x}`, `\text{Yes, } x`
NO_NAME = re.compile(r"\\(?:nabla|partial|d?dot)(?![a-zA-Z])|\\text\{[^{}]*[^\w\s{}]")
BARE = re.compile(
    r"(?!\\(?:pi|infty|emptyset)$|[ei]$)\\?[a-zA-Z]+(?:_(?:\w|\{[^{}]*\}))?|\\text\{(?:[a-zA-Z]_\w+|gama|Gama)\}"
)


def _is_side(gold: str, given: str) -> bool:
    """Return whether the reply has only a side of an equation that is more than a named value, as `m=n` or `a=b=1`."""
    first, *others = sides(gold)
    if not others or len(sides(given)) > 1:
        return False
    return bool(NO_NAME.search(first)) or (not first.endswith(")") and any(map(BARE.fullmatch, others)))


def _two_cases(text: str) -> bool:
    r"""Return whether a letter occurs in both cases, as in R-r or \omega-\Omega. They are then two symbols."""
    names = set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", re.sub(r"\\text\{[^{}]{2,}\}", "", text)))
    return any(
        name[-1].islower() and (name.upper() if len(name) == 1 else name[:2].upper() + name[2:]) in names
        for name in names
    )


def same(gold: Expression, given: Expression) -> bool:
    """Return whether math-verify finds two expressions equal, with a tolerance that suits the size of numbers."""
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
    except Exception:  # sympy raises any type if it cannot compare
        found = False
    if found and isinstance(gold, Relational) and isinstance(given, Relational):
        return _same_ends(gold, given)
    gold, given = (side.rhs if isinstance(side, sympy.Eq) and side.lhs.is_Symbol else side for side in (gold, given))
    if isinstance(gold, sympy.Expr) and isinstance(given, sympy.Expr):
        return not _differ(gold, given) if found else _equal_floats(gold, given)
    return bool(found)


def _same_ends(gold: Relational, given: Relational) -> bool:
    """Return whether two inequalities that math-verify finds equal have the same ends, also if these are small."""
    try:
        one, other = gold.as_set(), given.as_set()
    except Exception:  # sympy raises any type, for several unknowns or unsolved inequalities
        return True
    return not (isinstance(one, sympy.Interval) and isinstance(other, sympy.Interval)) or same(one, other)


def matched(gold: Sequence[Any], given: Sequence[Any], alike: Any) -> bool:
    """Return whether the two sequences have equal members, in any order.

    Args:
        gold: Members of the right answer.
        given: Members of the reply.
        alike: Function that compares two members.
    """
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
    """Return the sides as numbers, with fixed values for symbols; None if a side has no number."""
    symbols = sorted(set().union(*(side.free_symbols for side in sides)), key=str)
    values = {symbol: sympy.Rational(17 + 6 * at, 11 + 2 * at) for at, symbol in enumerate(symbols)}
    try:
        return [complex(side.doit().subs(values).evalf(30)) for side in sides]
    except Exception:  # not a number: an unknown function, infinity
        return None


def _differ(gold: sympy.Expr, given: sympy.Expr) -> bool:
    """Return whether two sides that math-verify finds equal differ by more than the rounding of the written numbers."""
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
    """Return whether two numbers, of which one has a decimal point, are equal within `_tolerance`."""
    if gold.free_symbols | given.free_symbols or not (gold.has(sympy.Float) or given.has(sympy.Float)):
        return False
    values = _numbers(gold, given)
    return values is not None and abs(values[0] - values[1]) <= _tolerance(max(map(abs, values)))


def _tolerance(size: float) -> float:
    """Return the maximum difference of equal numbers of this size. It is smaller for small numbers."""
    return max(DECIMAL, 1e-14 * size) if size >= SMALL else (1e-4 if size >= TINY else RELATIVE) * size


# -- regions ---------------------------------------------------------------------------------------------------------


def region(text: str) -> sympy.Set | None:
    """Return the set of numbers of inequalities or intervals, joined by "and" and "or"; None for other texts."""
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
        except Exception:  # sympy raises any type if it cannot make the set
            return None
    return sympy.Union(*pieces)


def _joint(word: str) -> str:
    return rf"\\text\{{\s*,?\s*{word}\s*\}}|(?<![a-zA-Z]){word}(?![a-zA-Z])"


def _read_whole(text: str) -> Expression | None:
    return read(text) if is_whole(text) else None


def _is_region(part: Expression | None) -> bool:
    """Return whether an expression is one or several intervals. In a list, (1,2) is a pair, not an interval."""
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
    raise ValueError("not a set")


def unknowns(text: str) -> set[str]:
    """Return the letters of inequalities."""
    return set(re.findall(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+|\b(?:or|and)\b", " ", text)))
