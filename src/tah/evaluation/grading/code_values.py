"""What both sandboxes of `code_tasks.py` have: values as JSON, and values that are nearly equal.

The text of this file is the beginning of the programs in the sandboxes: standard library only, nothing of tah.
"""

from __future__ import annotations

import _ast  # ast without its helpers: it is there already, and importing ast takes longer than all below
import collections.abc
import itertools

TYPE_CHECKING = False  # typing takes longer to import than the rest together, and each answer pays for it twice
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ITEMS = 100_000  # values taken from an iterator before it counts as endless
WORDS = 300  # characters of what an answer says about its errors
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


def alike(got: Any, wanted: Any, atol: float) -> bool:
    """Equal, or for floats nearly so; a list and a tuple of the same things are alike, since JSON has one of them."""
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
    """A value as JSON; what is not plain goes through `other`. Subclasses of plain types become the plain type."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python limits the length of decimal numbers
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
    """The value that `encode` made JSON of; `thing` for what was not plain. Fails on anything else."""
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
    """Run one statement of a program that has these `__future__` flags.

    Args:
        statement: the statement, as the parser gave it.
        scope: the names that it may use, where those that it defines are put.
        futures: the flags of its program, of which it has none by itself.

    Raises:
        BaseException: What the statement raises.
    """
    # Without `dont_inherit` it would have the flags of this file, which leave annotations alone.
    exec(compile(_ast.Module([statement], []), "answer.py", "exec", futures, dont_inherit=True), scope)
