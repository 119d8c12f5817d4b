"""The program that runs the tests of an item, in a sandbox of `code_tasks.py`: `judge`.

The program of this sandbox is the text of `code_values.py` and this file, with a call at the end. An answer can only
send values to it.
"""

from __future__ import annotations

import _ast
import builtins
import collections
import json
import os
import sys
import types

from .code_values import WORDS, decode, encode, run

TYPE_CHECKING = False  # importing typing takes longer than the rest together, twice per answer
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LINE = 16 << 20  # maximum size of one returned value in bytes


class Lost(BaseException):
    """The process of the answer does not reply. Not an `Exception`, so that tests do not catch it as the answer's."""


class Untestable(BaseException):
    """The tests do something that the stand-in does not support."""


class Thing:
    """A handle of an object that is not plain. It equals only itself, and the answer gets the object back."""

    def __init__(self, handle: list[Any]) -> None:
        self.handle = handle

    def __repr__(self) -> str:
        return f"<a {str(self.handle[1])[:WORDS]} of the answer>"


class Link:
    """Connection to the answer. `function(name)` returns the stand-in of one of its functions."""

    def __init__(self, replies: Any, calls: Any) -> None:
        self.replies, self.calls = replies, calls
        self.count = 0
        self.failed: BaseException | None = None  # kept, because tests may catch every exception
        self.raised: dict[int, tuple[Exception, str]] = {}

    def function(self, name: str) -> Callable[..., Any]:
        return lambda *given, **named: self.ask(name, list(given), named)

    def ask(self, name: str, given: list[Any], named: dict[str, Any]) -> Any:
        """Call a function of the answer, and return its result or raise its exception."""
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
            return "error", [str(name)[:WORDS], str(message)[:WORDS]]  # the answer can write its own lines
        except Exception as error:
            raise Lost(f"the answer sent a line that is not a value ({type(error).__name__})") from None

    def send(self, value: Any) -> Any:
        """Return the handle of a value that is not plain. Only objects of the answer can be sent to it."""
        if isinstance(value, Thing):
            return {"object": value.handle}
        raise Untestable(f"they pass a {type(value).__name__} to the answer, which the sandbox does not support")

    def error(self, name: str, message: str) -> Exception:
        """Return an exception of the answer as the same built-in exception, which tests may expect.

        An exception that ends an iteration becomes a RuntimeError. Otherwise `all(map(f, ...))` in tests would take it
        for the end of their values.
        """
        kind: Any = getattr(builtins, name, None)
        if name in ("StopIteration", "StopAsyncIteration"):
            kind = RuntimeError
        try:
            error = kind(message) if issubclass(kind, Exception) else RuntimeError(message)
        except TypeError:  # not a class, or one with other arguments
            error = RuntimeError(message)
        self.raised[id(error)] = (error, f"{name}: {message}")
        return error

    def message_of(self, error: BaseException) -> str | None:
        """Return the message of an exception of the answer; None for another exception."""
        return self.raised[id(error)][1] if id(error) in self.raised else None


def judge(prompt: str, tests: str, entry: str | None, reference: str) -> None:
    """Run the tests, and write the result to standard error as JSON: [status, reason, calls]."""
    link = Link(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    report = os.fdopen(os.dup(2), "w")
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    if "random" in tests:
        __import__("random").seed(0)
    status, reason = "passed", ""
    try:
        run_tests(prompt, tests, entry, reference, link)
        if not link.count:
            raise Untestable("they never call the answer")
    except BaseException as error:
        status, reason = verdict(error, tests, link)
    if link.failed is not None:
        status, reason = verdict(link.failed, tests, link)
    report.write(json.dumps([status, reason, link.count]))
    report.flush()
    os._exit(0)


def verdict(error: BaseException, tests: str, link: Link) -> tuple[str, str]:
    """Return status and reason for the exception that ended the tests."""
    own = link.message_of(error)
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


def imported(tests: str, reference: str, names: set[str]) -> dict[str, Any]:
    """Return names that tests use without importing them.

    They are the imports of the reference solution, for which the tests were written. For names that it does not
    import: modules of the standard library whose attributes the tests use, `inf`, `nan`, and names of `collections`.
    """
    scope: dict[str, Any] = {}
    try:
        program: Any = compile(reference, "<reference>", "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
        statements = program.body
    except (SyntaxError, ValueError):
        statements = []
    for statement in statements:
        if isinstance(statement, (_ast.Import, _ast.ImportFrom)):
            try:
                run(statement, scope)
            except ImportError:  # the tests then raise a NameError with the missing name
                pass
    scope.pop("__builtins__", None)
    for name in names - scope.keys():
        if f"def {name}" in reference or f"class {name}" in reference:
            continue
        if name in sys.stdlib_module_names and f"{name}." in tests and f"{name}(" not in tests:
            scope[name] = __import__(name)
        elif name in ("inf", "nan"):
            scope[name] = float(name)
        elif name in collections.__all__:
            scope[name] = getattr(collections, name)
    return scope


def run_tests(prompt: str, tests: str, entry: str | None, reference: str, link: Link) -> None:
    """Run the tests, with a stand-in for each name that only the answer can define."""
    scope: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(prompt, "<prompt>", "exec", dont_inherit=True), scope)  # tests may use its helpers
    except Exception:  # the prompt is not code
        pass
    program = compile(tests, "<tests>", "exec", dont_inherit=True)
    codes, names = [program], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    scope = imported(tests, reference, names - scope.keys()) | scope
    for name in names - scope.keys() - set(dir(builtins)):  # includes names of attributes, which is harmless
        scope[name] = link.function(name)
    if entry:
        scope[entry] = link.function(entry)
    exec(program, scope)
    if entry and entry != "check" and isinstance(scope.get("check"), types.FunctionType) and "def check" in tests:
        scope["check"](scope[entry])
