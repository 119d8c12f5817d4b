"""What runs beside the answer, in a sandbox of `code_tasks.py`: `serve`.

The text of `code_values.py` and this file, with a call at its end, is the program of that sandbox. Everything here is
within the answer's reach and nothing here decides on its grade.

A program may go on behind the function under test: it tries it out, asks for input, exits. What fails or exits there is
left out, as the benchmarks' own sanitizers do it, but what the function needs from there (helpers, imports, tables that
a loop fills) is run. What stands before the function has to work, as in any program.
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

TYPE_CHECKING = False  # typing takes longer to import than the rest together, and each answer pays for it twice
if TYPE_CHECKING:
    from typing import Any

ATTEMPTS = 3  # at what follows the function under test, one statement that does not end being left out each time
SCOPES = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef, _ast.Lambda)  # names in these are their own
DEFINITIONS = (_ast.FunctionDef, _ast.AsyncFunctionDef, _ast.ClassDef, _ast.Import, _ast.ImportFrom)
FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
USES = ("print", "input", "exit", "quit", "help")  # calls that are left out behind the function under test


def parsed(code: str, least: int) -> tuple[list[_ast.stmt], int]:
    """The statements of a code and its `__future__` flags, which each of them is run with.

    Of a code that is not Python as a whole it is the beginning that is, if that is longer than `least` lines: models
    run out of tokens in the middle of a line, or add a remark. evalplus cuts answers in the same spirit.

    Raises:
        SyntaxError: No such beginning is Python.
    """
    lines = code.splitlines()

    def statements(source: str) -> tuple[list[_ast.stmt], int]:
        # This finds what parsing alone does not, such as a return outside a function.
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
    """Run the statements up to the one that defines the function under test; gives back those behind it.

    Without the name of that function, up to the first function.
    """
    stub = scope.get(entry) if entry else None  # HumanEval's prompt defines it without a body
    for number, statement in enumerate(statements):
        run(statement, scope, futures)
        if isinstance(statement, DEFINITIONS[:2]) if entry is None else scope.get(entry, stub) is not stub:
            return statements[number + 1 :]
    return []


def only_uses(statement: _ast.stmt, entry: str | None) -> bool:
    """Whether a statement behind the function under test only tries it, so that leaving it out changes nothing."""
    if isinstance(statement, _ast.If) and isinstance(statement.test, _ast.Compare):
        return getattr(statement.test.left, "id", None) == "__name__" and not statement.orelse
    if isinstance(statement, _ast.Expr):
        call = statement.value
        name = getattr(call.func, "id", None) if isinstance(call, _ast.Call) else None
        return isinstance(call, _ast.Constant) or (name is not None and name in (*USES, entry))
    return isinstance(statement, _ast.Assert)


def binds(statement: _ast.stmt, name: str) -> bool:
    """Whether a statement gives this name a value where it stands, wherever in it: not in the functions in it."""
    nodes: list[Any] = [statement]
    while nodes:
        node = nodes.pop()
        bound: list[str | None]
        if isinstance(node, _ast.alias):
            bound = [node.asname or node.name.split(".")[0]]
        elif isinstance(node, _ast.Name):
            bound = [node.id] if isinstance(node.ctx, _ast.Store) else []
        else:  # functions, classes, exceptions and patterns; a pattern for a dict has a `rest`
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
    statements: list[_ast.stmt], futures: int, scope: dict[str, Any], entry: str | None, tell: int | None = None
) -> None:
    """Run what stands behind the function under test. What fails or exits there is left out, not the answer's failure.

    Args:
        statements: of the answer.
        futures: its `__future__` flags.
        scope: where its names are.
        entry: name of the function under test.
        tell: a pipe for the number of each statement that is begun.

    Raises:
        BaseException: of a statement that was to define the function under test anew.
    """
    for number, statement in enumerate(statements):
        if tell is not None:
            os.write(tell, b"%d\n" % number)
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
    """`finish` in a child process, which returns and goes on as the answer; this process waits for it to end.

    A statement that ends the child or takes longer than `patience` seconds is left out, and another child starts from
    here. After so many attempts only definitions and imports are run, in this process.

    Raises:
        BaseException: as `finish`; a RuntimeError where that statement was to define the function under test anew.
    """
    for _ in range(ATTEMPTS):
        news, tell = os.pipe()
        try:
            child = os.fork()
        except OSError:  # no more processes
            return finish(statements, futures, scope, entry)
        if not child:
            os.close(news)
            try:
                finish(statements, futures, scope, entry, tell)
            finally:
                os.write(tell, b"done\n")
                os.close(tell)
            return
        os.close(tell)
        at = watch(news, time.monotonic() + patience)
        os.close(news)
        if at is None:
            for pipe in pipes:
                pipe.close()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(code if code >= 0 else 128 - code)  # as a shell says it, and bubblewrap
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if entry and any(binds(one, entry) for one in statements[at : at + 1]):
            raise RuntimeError(f"the statement that defines {entry} anew does not end")
        statements = statements[:at] + statements[at + 1 :]
    kept = [one for one in statements if isinstance(one, DEFINITIONS) or (entry and binds(one, entry))]
    finish(kept, futures, scope, entry)


def watch(news: int, deadline: float) -> int | None:
    """Number of the statement at which a child ended or stayed; None where it came to the end."""
    said = b""
    while select.select([news], [], [], max(0.0, deadline - time.monotonic()))[0]:
        heard = os.read(news, 4096)
        said = (said + heard)[-100:]
        if said.endswith(b"done\n"):
            return None
        if not heard:
            break
    numbers = [line for line in said.split(b"\n") if line.isdigit()]
    return int(numbers[-1][-9:]) if numbers else 0


def serve(prompt: str, code: str, least: int, entry: str | None, patience: float) -> None:
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
