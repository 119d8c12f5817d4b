"""The program that runs an answer, in a sandbox of `code_tasks.py`: `serve`.

The program of this sandbox is the text of `code_values.py` and this file, with a call at the end. The answer can change
everything here, so nothing here decides the grade.

A program may have statements after the function under test: it prints examples, reads input, exits. Statements there
that fail or exit are left out, as in the sanitizers of the benchmarks. Statements that the function needs (helpers,
imports, loops that fill a table) run. Statements before the function must work.
"""

from __future__ import annotations
import __future__

import _ast
import json
import os
import select
import signal
import sys
import time
import types

from .code_values import WORDS, decode, encode, run

TYPE_CHECKING = False  # importing typing takes longer than the rest together, twice per answer
if TYPE_CHECKING:
    from typing import Any

ATTEMPTS = 3  # attempts to run the statements after the function; each attempt leaves out one that does not end
SCOPES = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef, _ast.Lambda)  # nodes with their own names
DEFINITIONS = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef, _ast.Import, _ast.ImportFrom)
FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
USES = ("print", "input", "exit", "quit", "help")  # calls that are left out after the function under test


def parsed(code: str, least: int) -> tuple[list[_ast.stmt], int]:
    """Return the statements of a program and its `__future__` flags, with which each statement runs.

    If the whole text is not valid Python, the longest valid beginning of more than `least` lines counts: a model can
    reach its token limit within a line, or add a remark. evalplus cuts answers in a similar way.

    Raises:
        SyntaxError: No such beginning is valid Python.
    """
    lines = code.splitlines()

    def statements(source: str) -> tuple[list[_ast.stmt], int]:
        # Compiling finds errors that parsing does not, such as a return outside a function.
        whole: types.CodeType = compile(source, "answer.py", "exec", dont_inherit=True)
        program: Any = compile(source, "answer.py", "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
        return list(program.body), whole.co_flags & FUTURES

    try:
        return statements(code)
    except SyntaxError as error:
        for end in range(min(len(lines) - 1, error.lineno or len(lines)), least, -1):
            try:
                return statements("\n".join(lines[:end]))
            except SyntaxError:
                continue
        raise


def define(statements: list[_ast.stmt], futures: int, scope: dict[str, Any], entry: str | None) -> list[_ast.stmt]:
    """Run the statements up to the one that defines the function under test, and return the others.

    Without the name of that function, the first function counts.
    """
    stub = scope.get(entry) if entry else None  # the prompt of HumanEval defines the function without a body
    for number, statement in enumerate(statements):
        run(statement, scope, futures)
        if isinstance(statement, DEFINITIONS[:2]) if entry is None else scope.get(entry, stub) is not stub:
            return statements[number + 1 :]
    return []


def only_uses(statement: _ast.stmt, entry: str | None) -> bool:
    """Return whether a statement after the function under test only uses it, so that it can be left out."""
    if isinstance(statement, _ast.If) and isinstance(statement.test, _ast.Compare):
        return getattr(statement.test.left, "id", None) == "__name__" and not statement.orelse
    if isinstance(statement, _ast.Expr):
        call = statement.value
        name = getattr(call.func, "id", None) if isinstance(call, _ast.Call) else None
        return isinstance(call, _ast.Constant) or (name is not None and name in (*USES, entry))
    return isinstance(statement, _ast.Assert)


def binds(statement: _ast.stmt, name: str) -> bool:
    """Return whether a statement assigns to a name, at any level of it except in functions inside it."""
    nodes: list[Any] = [statement]
    while nodes:
        node = nodes.pop()
        bound: list[str | None]
        if isinstance(node, _ast.alias):
            bound = [node.asname or node.name.split(".")[0]]
        elif isinstance(node, _ast.Name):
            bound = [node.id] if isinstance(node.ctx, _ast.Store) else []
        else:  # functions, classes, exceptions and patterns; a mapping pattern has a `rest`
            bound = [getattr(node, "name", None), getattr(node, "rest", None)]
        if name in bound:
            return True
        if isinstance(node, SCOPES) or (isinstance(node, _ast.AnnAssign) and node.value is None):
            continue
        for field in node._fields:
            if field == "target" and isinstance(node, _ast.comprehension):
                continue
            value = getattr(node, field, None)
            nodes += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, _ast.AST)]
    return False


def finish(
    statements: list[_ast.stmt], futures: int, scope: dict[str, Any], entry: str | None, progress: int | None = None
) -> None:
    """Run the statements after the function under test. Statements that fail or exit are left out.

    Args:
        statements: Statements to run.
        futures: `__future__` flags of the answer.
        scope: Names of the answer.
        entry: Name of the function under test.
        progress: Pipe to which the number of each statement is written before it runs.

    Raises:
        BaseException: Exception of a statement that should redefine the function under test.
    """
    for number, statement in enumerate(statements):
        if progress is not None:
            os.write(progress, b"%d\n" % number)
        try:
            run(statement, scope, futures)
        except BaseException:
            if entry and binds(statement, entry):
                raise


def go_on(
    statements: list[_ast.stmt],
    futures: int,
    scope: dict[str, Any],
    entry: str | None,
    patience: float,
    pipes: list[Any],
) -> None:
    """Run `finish` in a child process, which returns and becomes the answer. This process waits for its end.

    If a statement ends the child or takes longer than `patience` seconds, it is left out and a new child starts. After
    `ATTEMPTS` attempts, only definitions and imports run, in this process.

    Raises:
        BaseException: As in `finish`; RuntimeError if the statement that is left out should redefine the function.
    """
    for _ in range(ATTEMPTS):
        updates, progress = os.pipe()
        try:
            child = os.fork()
        except OSError:  # the limit of processes is reached
            return finish(statements, futures, scope, entry)
        if not child:
            os.close(updates)
            try:
                finish(statements, futures, scope, entry, progress)
            finally:
                os.write(progress, b"done\n")
                os.close(progress)
            return
        os.close(progress)
        at = watch(updates, time.monotonic() + patience)
        os.close(updates)
        if at is None:
            for pipe in pipes:
                pipe.close()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(code if code >= 0 else 128 - code)  # the convention of shells and bubblewrap
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if entry and any(binds(one, entry) for one in statements[at : at + 1]):
            raise RuntimeError(f"the statement that redefines {entry} does not end")
        statements = statements[:at] + statements[at + 1 :]
    kept = [one for one in statements if isinstance(one, DEFINITIONS) or (entry and binds(one, entry))]
    finish(kept, futures, scope, entry)


def watch(updates: int, deadline: float) -> int | None:
    """Return the number of the statement at which a child ended or hangs; None if it ran all statements."""
    received = b""
    while select.select([updates], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(updates, 4096)
        received = (received + chunk)[-100:]
        if received.endswith(b"done\n"):
            return None
        if not chunk:
            break
    numbers = [line for line in received.split(b"\n") if line.isdigit()]
    return int(numbers[-1][-9:]) if numbers else 0


def serve(prompt: str, code: str, least: int, entry: str | None, patience: float) -> None:
    """Run an answer, then call its functions on request and send back their results or exceptions.

    Args:
        prompt: Code of the prompt, which runs first.
        code: Program of the answer.
        least: Number of lines at the beginning of the program that belong to the prompt.
        entry: Name of the function under test.
        patience: Maximum time in seconds of the statements after the function.
    """
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    failure: BaseException | None = None
    try:
        head: types.CodeType = compile(prompt, "prompt.py", "exec", dont_inherit=True)
        exec(head, module.__dict__)
        statements, futures = parsed(code, least)
        futures |= head.co_flags & FUTURES
        rest = define(statements, futures, module.__dict__, entry)
        rest = [statement for statement in rest if not only_uses(statement, entry)]
        if all(isinstance(statement, DEFINITIONS) for statement in rest):
            finish(rest, futures, module.__dict__, entry)
        else:
            go_on(rest, futures, module.__dict__, entry, patience, [calls, replies])
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
            return json.dumps(["error", [type(error).__name__, str(error)[:WORDS]]]).encode()

    for call in calls:
        replies.write(reply(call) + b"\n")
        replies.flush()
    os._exit(0)
