"""Grading of HumanEval, HumanEval+, MBPP and MBPP+ items. An answer cannot reach the verdict.

Each answer uses two sandboxes. The first one runs the answer: it calls the answer's functions and sends their results
back as JSON. The second one runs the item's tests, in which the function under test is a stand-in that calls the first
sandbox. Every assertion therefore runs where the answer is not. The answer cannot read an expected value, patch a
comparison, print a verdict, or end the process that gives the verdict. Only plain values come back (numbers, strings,
lists, tuples, sets, dicts ...). Any other object comes back as a handle, which equals nothing and can only be passed to
the answer again. Neither sandbox runs code in this process, which reads one JSON line from the tests.

An answer can still recognise the inputs of a public benchmark and return memorised values (no sandbox prevents that),
pass tests that are too weak, and escape through a vulnerability of the kernel (`sandbox.py`).

Two results differ from those of in-process graders. Changes that an answer makes to its arguments are not visible to
the tests. numpy arrays come back as handles (numpy numbers as numbers). Tests that pass a function or an object of
their own to the answer are untestable, because the answer could forge their verdict.

Statements after the function under test that fail, exit or do not end do not make an answer wrong (`code_answer.py`).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from .grading import code_answer, code_judge, code_values
from .grading.reply import after_thoughts
from .sandbox import Sandbox

CodeStatus = Literal["passed", "wrong", "error", "timeout", "memory", "crashed", "killed", "no code", "untestable"]

REASON = 600  # maximum length of a reason in characters
PYTHON = ("", "py", "py3", "python", "python3")  # languages of fenced blocks that may be the answer
FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})([\w+-]*)(?:[ \t:{][^`]*)?$")  # indentation, fence, language
INVISIBLE = re.compile("^[\ufeff\u200b\u2060]+", re.MULTILINE)
# A comment or a string literal as a whole. A docstring that does not end on its line has no group "closed".
QUOTED = re.compile(
    r"#.*|(?P<quote>\"{3}|'{3})(?:\\.|(?!(?P=quote)).)*(?P<closed>(?P=quote))?|\"(?:\\.|[^\"\\])*\"?|'(?:\\.|[^'\\])*'?"
)
# Possible beginnings of a program, or of the rest of one.
CODE = re.compile(r"[ \t]+\S|(?:async )?def |class |import |from \w+ import |@\w|\w+ *(?::[^=]+)?=[^=]")


@dataclass(frozen=True)
class CodeVerdict:
    """The verdict on one answer.

    Args:
        passed: Whether all tests passed.
        status: `passed`, `wrong` (a test failed), `error` (the answer raised an exception), `timeout`, `memory`,
            `crashed` (its process ended), `killed` (SIGKILL, or too much output), `no code` (the text has no program),
            or `untestable` (the tests of the item cannot run; only from `grade_all`).
        reason: Reason in one line, at most `REASON` characters.
        calls: Number of calls of the answer's functions.
        seconds: Wall-clock time.
    """

    passed: bool
    status: CodeStatus
    reason: str
    calls: int
    seconds: float


class Untestable(ValueError):
    """The tests of an item cannot run here."""


def extract_code(text: str, entry_point: str | None = None) -> str:
    """Return the program in an answer: the last fenced block that defines `entry_point`, or else the last block.

    The rules:

    - Thoughts up to `</think>` are dropped.
    - A block that is not closed extends to the end.
    - Text that begins with code and then closes a block continues a block that the prompt opened.
    - Text without a fence is returned unchanged, with its indentation, because it may continue the function of the
      prompt. If it defines `entry_point`, lines before the code are left out.
    - Text after the code is not removed here, but when the program runs.
    - A fence in a docstring closes nothing.
    - Zero-width characters at the beginning of a line, such as the byte order mark, are left out.
    """
    text = INVISIBLE.sub("", after_thoughts(text))
    blocks, rest = _blocks(text.splitlines())
    if not blocks and entry_point and _defines(text, entry_point):
        return "\n".join(itertools.dropwhile(lambda line: not CODE.match(line), rest))
    if not blocks:
        return text
    python = [code for language, code in blocks if language in PYTHON] or [code for _, code in blocks]
    defining = [code for code in python if entry_point and _defines(code, entry_point)]
    return (defining or python)[-1]


def _begins_with_code(lines: Iterable[str]) -> bool:
    return CODE.match(next(filter(str.strip, lines), "")) is not None


def _blocks(whole: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the fenced blocks of a text with their languages, and the lines after the last block."""
    blocks: list[tuple[str, str]] = []
    lines: list[str] = []
    opened: tuple[str, str, str] | None = None  # indentation, fence, language
    continued = _begins_with_code(whole)
    end = -1  # number of the line that closes the current docstring
    for number, line in enumerate(whole):
        fence = FENCE.match(line) if number > end else None
        if not fence and number > end and (opened or (continued and not blocks)):
            end = _docstring(whole, number, opened[0] if opened else "")
        last = None if fence or number < end else _last_line(line, lines, opened[1] if opened else "```")
        if last is not None and (opened or (not blocks and _begins_with_code([*lines, last]))):
            indentation, _, language = opened or ("", "", "")
            blocks.append((language, "\n".join([*lines, last.removeprefix(indentation)])))
            opened, lines = None, []
        elif not fence or (opened and not fence[3] and not fence[2].startswith(opened[1])):
            lines.append(line.removeprefix(opened[0]) if opened else line)
        else:
            if opened:
                blocks.append((opened[2], "\n".join(lines)))
            elif not blocks and not fence[3] and _begins_with_code(lines):  # the prompt opened this block
                blocks.append(("", "\n".join(lines)))
                opened = ("", "", "")
            opened = None if opened and not fence[3] else (fence[1], fence[2], fence[3].lower())
            lines = []
    return [*blocks, (opened[2], "\n".join(lines))] if opened else blocks, lines


def _last_line(line: str, lines: Sequence[str], fence: str) -> str | None:
    """Return the code of a line that ends with a fence which closes the block.

    None if the line does not end with a fence, or if that fence is in a comment or a string.
    """
    code = line.rstrip().removesuffix(fence).rstrip()
    if code == line.rstrip() or not code.strip(f" \t{fence[0]}") or code.count(fence) % 2 or "#" in code:
        return None
    block = "\n".join([*lines, code])
    return None if block.count('"""') % 2 or block.count("'''") % 2 else code


def _docstring(lines: Sequence[str], number: int, margin: str) -> int:
    """Return the number of the line that closes the docstring of line `number`, or `number` if it opens none.

    A fence further left than the docstring, or one with a language at the margin of the code, ends the code before the
    docstring is closed. The code is then broken, and the docstring counts as not opened.
    """
    opened = [text["quote"] for text in QUOTED.finditer(lines[number]) if text["quote"] and not text["closed"]]
    if not opened:
        return number
    left = len(lines[number]) - len(lines[number].lstrip())
    for later in range(number + 1, len(lines)):
        if opened[0] in lines[later]:
            return later
        fence = FENCE.match(lines[later])
        if fence and (len(fence[1]) < left or (fence[3] and fence[1] == margin)):
            break
    return number


def grade_code(item: Mapping[str, Any], answer: str, sandbox: Sandbox) -> CodeVerdict:
    """Return the verdict on an answer.

    Args:
        item: Item as on the Hub: `prompt`, `entry_point` and `test` (HumanEval, evalplus/humanevalplus), `test` and
            `code` (evalplus/mbppplus), `test_list` and `test_imports` (MBPP). Or an item with `entry_point`, `inputs`
            (a list of argument lists), `expected` and `atol`, where a list equals a tuple of the same values and
            floats are compared with a tolerance.
        answer: Chat answer with fenced code, or continuation of `prompt`.
        sandbox: Sandbox that runs the programs.

    Raises:
        Untestable: The tests of the item cannot run. The message names the item and the reason.
        ValueError: The sandbox does not work on this machine.
        OSError: The sandbox failed to start for this answer.
    """
    entry, tests = entry_point_of(item), _tests(item)
    code = extract_code(answer, entry)
    if not code.strip():
        return CodeVerdict(False, "no code", "the answer has no code", 0, 0.0)
    # The prompt of HumanEval is code: imports, helpers, and the function without its body. It compiles by itself.
    prompt = str(item.get("prompt", "")) if item.get("entry_point") else ""
    least = 0
    if prompt and (code.lstrip("\r\n")[:1].isspace() or not _defines(code, str(entry))):
        prompt, code, least = "", prompt + code, prompt.count("\n")
    asked = f"judge({str(item.get('prompt', ''))!r}, {tests!r}, {entry!r}, {str(item.get('code', ''))!r})"
    serving = f"serve({prompt!r}, {code!r}, {least}, {entry!r}, {sandbox.seconds / 2!r})"
    judged, answered = sandbox.pair(
        f"{_program(code_values, code_judge)}\n{asked}\n", f"{_program(code_values, code_answer)}\n{serving}\n"
    )
    for outcome in (judged, answered):
        # Both programs close standard error, so only the sandbox can have written this.
        if outcome.stderr.startswith(("bwrap: ", "prlimit: ", "setpriv: ")):
            raise OSError(f"the sandbox failed: {outcome.stderr.strip().splitlines()[-1][:REASON]}")
    if judged.status != "ok" or not judged.stderr:
        status: CodeStatus = "crashed" if judged.status == "ok" else judged.status
        return CodeVerdict(False, status, f"no verdict: {judged.status}", 0, judged.seconds)
    kind, reason, calls = json.loads(judged.stderr)
    reason = " ".join("".join(letter if letter.isprintable() else " " for letter in str(reason)[:REASON]).split())
    if kind == "untestable":
        raise Untestable(f"{item.get('task_id', 'an item')}: its tests cannot run: {reason}")
    if kind == "lost":
        kind = "crashed" if answered.status == "ok" else answered.status
    return CodeVerdict(kind == "passed", kind, reason, calls, judged.seconds)


def grade_all(
    items: Sequence[Mapping[str, Any]], answers: Sequence[str], sandbox: Sandbox, workers: int | None = None
) -> Iterator[CodeVerdict]:
    """Yield the verdict on answer i to item i, in order. Several answers are graded in parallel.

    Args:
        items: Items, as in `grade_code`.
        answers: Answers, one per item.
        sandbox: Sandbox that runs the programs.
        workers: Number of answers graded in parallel; by default the number of cores, at most 8.

    Raises:
        ValueError: The numbers of answers and items differ, or the sandbox does not work on this machine.
        OSError: The sandbox failed to start.
    """

    def grade(item: Mapping[str, Any], answer: str) -> CodeVerdict:
        try:
            return grade_code(item, answer, sandbox)
        except Untestable as error:  # the other items are still graded
            return CodeVerdict(False, "untestable", str(error), 0, 0.0)

    if len(items) != len(answers):
        raise ValueError(f"{len(items)} items and {len(answers)} answers: give one answer per item")
    sandbox.check()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(grade, items, answers)


def _defines(code: str, name: str) -> bool:
    """Return whether a text defines a name at the left margin.

    This uses a regular expression, because parsing the text of a model can crash the interpreter.
    """
    name = re.escape(name)
    return re.search(rf"^(?:(?:async )?def {name}\b|class {name}\b|{name}\s*[:=](?!=))", code, re.MULTILINE) is not None


def entry_point_of(item: Mapping[str, Any]) -> str | None:
    """Return the name of the function under test.

    MBPP does not have it. There it is the last function of the reference solution that the tests use.
    """
    if item.get("entry_point"):
        return str(item["entry_point"])
    tests = _tests(item)
    names = re.findall(r"^def (\w+)", str(item.get("code", "")), re.MULTILINE)
    return next((name for name in reversed(names) if re.search(rf"\b{name}\b", tests)), None)


def _tests(item: Mapping[str, Any]) -> str:
    """Return the tests of an item as a program.

    Raises:
        Untestable: The item has no tests in a supported form.
    """
    name = item.get("task_id", "an item")
    if "inputs" in item and "expected" in item:
        inputs, expected, atol = item["inputs"], item["expected"], float(item.get("atol") or 0)
        if len(inputs) != len(expected):
            raise Untestable(f"{name}: {len(inputs)} inputs and {len(expected)} expected values: give one per input")
        cases = f"for given, wanted in zip({list(inputs)!r}, {list(expected)!r}):"
        check = f"    assert alike({item['entry_point']}(*given), wanted, {atol!r}), (given, wanted)"
        return "\n".join(["from math import inf, nan", inspect.getsource(code_values.alike), cases, check])
    if item.get("test"):
        return str(item["test"])
    if item.get("test_list"):
        return "\n".join([*item.get("test_imports", []), str(item.get("test_setup_code", "")), *item["test_list"]])
    hint = " (this is a file of EvalPlus: use the Hub's evalplus/humanevalplus or mbppplus)"
    hint = hint if "base_input" in item else ""
    raise Untestable(f"{name} has no tests: give test, test_list, or inputs and expected{hint}")


@functools.cache
def _program(*modules: ModuleType) -> str:
    """Return the source of modules as one text. The caller appends a function call to make it a program."""
    lines = "\n".join(map(inspect.getsource, modules)).splitlines()
    # The sandbox does not have this package, and future imports must be at the beginning of a program.
    lines = [line for line in lines if not line.startswith(("from __future__ import", "from .code_values import"))]
    return "\n".join(["from __future__ import annotations", *lines])
