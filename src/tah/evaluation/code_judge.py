"""What runs inside the two sandboxes of `code_tasks.py`: `serve` beside the answer, `judge` beside the tests.

The text of this file, with a call at its end, is the program of a sandbox: standard library only, nothing of tah.
"""

from __future__ import annotations

import builtins
import collections.abc
import itertools
import json
import os
import sys
import types

TYPE_CHECKING = False  # typing takes longer to import than the rest together, and each answer pays for it twice
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LINE = 16 << 20  # bytes in one returned value
ITEMS = 100_000  # values taken from an iterator before it counts as endless
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


def parsed(code: str, least: int) -> types.CodeType:
    """Compiled; of a code that is not Python as a whole, the beginning that is, if longer than `least` lines.

    Models run out of tokens in the middle of a line, or add a remark. evalplus cuts answers in the same spirit.
    """
    try:
        return compile(code, "answer.py", "exec")
    except SyntaxError as error:
        lines = code.splitlines()
        for end in range(min(len(lines) - 1, error.lineno or len(lines)), least, -1):
            try:
                return compile("\n".join(lines[:end]), "answer.py", "exec")
            except SyntaxError:
                continue
        raise


def serve(prompt: str, code: str, least: int) -> None:
    """The answer's side: define it, then call what is asked for and send back what that returns or raises.

    The first `least` lines of the code are not the answer's own.
    """
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    failure: BaseException | None = None
    try:
        exec(compile(prompt, "prompt.py", "exec"), module.__dict__)
        exec(parsed(code, least), module.__dict__)
    except BaseException as error:
        failure = error
    things: list[Any] = []

    def keep(value: Any) -> Any:
        things.append(value)
        return {"object": [len(things) - 1, type(value).__name__]}

    def reply(call: bytes) -> bytes:
        try:
            if failure is not None:
                raise failure
            name, given, named = json.loads(call)
            if name not in module.__dict__:
                raise NameError(f"name {name!r} is not defined")
            given, named = (decode(part, lambda handle: things[handle[0]]) for part in (given, named))
            return json.dumps(["value", encode(module.__dict__[name](*given, **named), keep)]).encode()
        except BaseException as error:
            return json.dumps(["error", [type(error).__name__, str(error)[:300]]]).encode()

    for call in calls:
        replies.write(reply(call) + b"\n")
        replies.flush()
    os._exit(0)


class Lost(BaseException):
    """The answer does not answer any more. Not an Exception, so that no test takes it for one of the answer's."""


class Untestable(BaseException):
    """The tests do something that cannot be graded from outside."""


class Thing:
    """Something the answer returned that is not plain: it equals only itself, and goes back as what it was."""

    def __init__(self, handle: list[Any]) -> None:
        self.handle = handle

    def __repr__(self) -> str:
        return f"<a {self.handle[1]} of the answer>"


class Link:
    """To the answer's side; `function(name)` is the stand-in for one of its functions."""

    def __init__(self, replies: Any, calls: Any) -> None:
        self.replies, self.calls = replies, calls
        self.count = 0
        self.failed: BaseException | None = None  # kept, in case the tests catch everything
        self.raised: dict[int, tuple[Exception, str]] = {}

    def function(self, name: str) -> Callable[..., Any]:
        return lambda *given, **named: self.ask(name, list(given), named)

    def ask(self, name: str, given: list[Any], named: dict[str, Any]) -> Any:
        """Call that function there; returns what it returned or raises what it raised."""
        self.count += 1
        try:
            kind, content = self.exchange([name, encode(given, self.send), encode(named, self.send)])
        except (Lost, Untestable) as failure:
            self.failed = self.failed or failure
            raise
        if kind == "value":
            return content
        raise self.error(*content)

    def exchange(self, question: list[Any]) -> tuple[str, Any]:
        try:
            self.calls.write(json.dumps(question).encode() + b"\n")
            self.calls.flush()
        except OSError:
            raise Lost("the answer ended its process") from None
        line = self.replies.readline(LINE)
        if not line.endswith(b"\n"):
            raise Lost("the answer returned too much" if len(line) == LINE else "the answer ended its process")
        try:
            kind, content = json.loads(line)
            if kind == "value":
                return kind, decode(content, Thing)
            name, message = content
            return "error", [str(name), str(message)]
        except Exception as error:
            raise Lost(f"the answer sent something that is not a value ({type(error).__name__})") from None

    def send(self, value: Any) -> Any:
        """What is not plain: only the answer's own things can go back."""
        if isinstance(value, Thing):
            return {"object": value.handle}
        raise Untestable(f"they hand the answer a {type(value).__name__}, which cannot leave them")

    def error(self, name: str, message: str) -> Exception:
        """What the answer raised, as far as it is built in: tests may expect it."""
        kind: Any = getattr(builtins, name, None)
        try:
            error = kind(message) if issubclass(kind, Exception) else RuntimeError(message)
        except TypeError:  # not a class, or one with other arguments
            error = RuntimeError(message)
        self.raised[id(error)] = (error, f"{name}: {message}")
        return error

    def said(self, error: BaseException) -> str | None:
        """The answer's words, if this is an error of its own."""
        return self.raised[id(error)][1] if id(error) in self.raised else None


def judge(prompt: str, tests: str, entry: str | None) -> None:
    """The tests' side: run them and say on standard error how it went: [status, reason, calls]."""
    link = Link(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    said = os.fdopen(os.dup(2), "w")
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    if "random" in tests:
        __import__("random").seed(0)
    status, reason = "passed", ""
    try:
        run_tests(prompt, tests, entry, link)
        if not link.count:
            raise Untestable("they never call the answer")
    except BaseException as error:
        status, reason = verdict(error, tests, link)
    if link.failed is not None:
        status, reason = verdict(link.failed, tests, link)
    said.write(json.dumps([status, reason, link.count]))
    said.flush()
    os._exit(0)


def verdict(error: BaseException, tests: str, link: Link) -> tuple[str, str]:
    """Status and reason of what ended the tests."""
    own = link.said(error)
    if own is not None:
        return "memory" if isinstance(error, MemoryError) else "error", own
    if isinstance(error, Lost):
        return "lost", str(error)
    reason = f"{type(error).__name__}: {error}".removesuffix(": ")[:300]
    if isinstance(error, (Untestable, ImportError, SyntaxError)):
        return "untestable", str(error) if isinstance(error, Untestable) else reason
    line, trace = 0, error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<tests>" else line
        trace = trace.tb_next
    return "wrong", f"{tests.splitlines()[line - 1].strip()[:200]} ({reason})" if line else reason


def run_tests(prompt: str, tests: str, entry: str | None, link: Link) -> None:
    """Run the tests, with stand-ins for all names that they use and nobody but the answer can have defined."""
    scope: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(prompt, "<prompt>", "exec"), scope)  # tests may use its helpers
    except Exception:  # prose
        pass
    program = compile(tests, "<tests>", "exec")
    codes, names = [program], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for name in names - scope.keys() - set(dir(builtins)):  # names of attributes are among them, and do no harm
        scope[name] = link.function(name)
    if entry:
        scope[entry] = link.function(entry)
    exec(program, scope)
    if entry and entry != "check" and isinstance(scope.get("check"), types.FunctionType) and "def check" in tests:
        scope["check"](scope[entry])
