"""Code of both sandboxes of `code_tasks.py`: values as JSON, and comparison with a tolerance.

The programs in the sandboxes begin with the text of this file, so it imports only the standard library.
"""

from __future__ import annotations

import _ast  # built in; importing ast takes longer than the rest of this program
import collections.abc
import itertools

TYPE_CHECKING = False  # importing typing takes longer than the rest together, twice per answer
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ITEMS = 100_000  # maximum number of values of an iterator; a longer one is not a plain value
WORDS = 300  # maximum length of an error message of an answer
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


def alike(got: Any, wanted: Any, atol: float) -> bool:
    """Return whether two values are equal. Floats have a tolerance.

    A list equals a tuple with the same values, because JSON has only one of them.
    """
    if isinstance(wanted, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(got) == len(wanted) and all(alike(one, other, atol) for one, other in zip(got, wanted, strict=True))
    if isinstance(wanted, dict) and isinstance(got, dict):
        return got.keys() == wanted.keys() and all(alike(got[key], wanted[key], atol) for key in wanted)
    if isinstance(wanted, float) and isinstance(got, (int, float)):
        if wanted != wanted or got != got:
            return wanted != wanted and got != got
        return got == wanted or abs(got - wanted) <= (atol or 1e-6) + 1e-7 * abs(wanted)
    return bool(got == wanted)


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """Return a value as JSON. `other` converts values that are not plain. A subclass becomes its plain base type."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python limits the digits of a decimal number
        return {"int": hex(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (collections.abc.Iterator, *VIEWS)):
        source: Any = value
        items = list(itertools.islice(source, ITEMS + 1))
        return other(value) if len(items) > ITEMS else {"iterator": encode(items, other)}
    if isinstance(value, list):
        return [encode(item, other) for item in value]
    for kind in (tuple, frozenset, set, collections.deque):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, other) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, other), encode(item, other)] for key, item in value.items()]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return encode(value.item(), other)
    forms: dict[str, Callable[[Any], Any]] = {
        "builtins.bytes": lambda content: content.hex(),
        "builtins.bytearray": lambda content: content.hex(),
        "builtins.complex": lambda number: [number.real, number.imag],
        "builtins.range": lambda numbers: [numbers.start, numbers.stop, numbers.step],
        "decimal.Decimal": str,
        "fractions.Fraction": str,
    }
    form = forms.get(f"{type(value).__module__}.{type(value).__name__}")
    return {type(value).__name__: form(value)} if form else other(value)


def decode(wire: Any, thing: Callable[[Any], Any]) -> Any:
    """Return the value of JSON from `encode`. `thing` converts values that are not plain. Other JSON is an error."""
    if isinstance(wire, list):
        return [decode(item, thing) for item in wire]
    if not isinstance(wire, dict):
        return wire
    ((kind, content),) = wire.items()
    if kind == "object":
        return thing(content)
    makers: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "bytes": bytes.fromhex,
        "bytearray": bytearray.fromhex,
        "Decimal": lambda text: __import__("decimal").Decimal(text),
        "Fraction": lambda text: __import__("fractions").Fraction(text),
        "complex": lambda parts: complex(*parts),
        "range": lambda parts: range(*parts),
        "dict": lambda pairs: dict(decode(pairs, thing)),
        "iterator": lambda items: iter(decode(items, thing)),
        "tuple": lambda items: tuple(decode(items, thing)),
        "set": lambda items: set(decode(items, thing)),
        "frozenset": lambda items: frozenset(decode(items, thing)),
        "deque": lambda items: collections.deque(decode(items, thing)),
    }
    return makers[kind](content)


def run(statement: _ast.stmt, scope: dict[str, Any], futures: int = 0) -> None:
    """Run one statement of a program.

    Args:
        statement: Statement from the parser.
        scope: Names that the statement may use. Its definitions are added.
        futures: `__future__` flags of its program.

    Raises:
        BaseException: Any exception of the statement.
    """
    # Without `dont_inherit` the statement would have the flags of this file, which does not evaluate annotations.
    exec(compile(_ast.Module([statement], []), "answer.py", "exec", futures, dont_inherit=True), scope)
