"""Grading of code benchmarks: HumanEval, HumanEval+, MBPP and MBPP+ items, with the verdict out of the answer's reach.

Two sandboxes per answer. One holds the answer and does nothing but call its functions and send back what they return,
as JSON. The other holds the item's tests, in which the function under test is a stand-in that asks the first sandbox.
So every assertion is evaluated where the answer is not: it cannot see an expected value, patch a comparison, print a
verdict or end the process that gives one. Only plain values come back (numbers, texts, lists, tuples, sets, dicts ...);
an object of any other kind comes back as a handle that equals nothing and can only be handed to the answer again.
None of this runs in our process, which reads one JSON line from the tests' side.

What an answer can still do: recognise the inputs of a public benchmark and return values learnt by heart (no sandbox
helps against that), pass tests that are themselves too weak, and break out through a hole in the kernel (`sandbox.py`).
Not measured as in-process graders do: changes an answer makes to its arguments (tests that look at their own list after
the call see it unchanged), and numpy arrays (they come back as handles; numpy numbers as numbers). Tests that hand the
answer a function or an object of their own are refused, not run where the answer could forge their verdict.

Statements behind the function under test that fail, exit or do not end do not fail it (`code_answer.py`).
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

REASON = 600  # characters of a verdict's reason
PYTHON = ("", "py", "py3", "python", "python3")  # languages of fenced blocks that may be the answer
FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})([\w+-]*)(?:[ \t:{][^`]*)?$")  # indentation, fence, language
INVISIBLE = re.compile("^[\ufeff\u200b\u2060]+", re.MULTILINE)
# Remarks and texts in quotes, each as a whole; a docstring that its line does not close has no group "closed".
QUOTED = re.compile(
    r"#.*|(?P<quote>\"{3}|'{3})(?:\\.|(?!(?P=quote)).)*(?P<closed>(?P=quote))?|\"(?:\\.|[^\"\\])*\"?|'(?:\\.|[^'\\])*'?"
)
# How a program or the rest of one may begin.
CODE = re.compile(r"[ \t]+\S|(?:async )?def |class |import |from \w+ import |@\w|\w+ *(?::[^=]+)?=[^=]")


@dataclass(frozen=True)
class CodeVerdict:
    """Of one answer: how it went, in one line why, calls of its functions, seconds by the clock.

    `status`: "passed", "wrong" (a test does not hold), "error" (the answer raised), "timeout", "memory", "crashed" (its
    process ended), "killed" (SIGKILL, or too much output), "no code" (nothing in the text to run), "untestable" (the
    item's tests cannot be run, of `grade_all` only). `reason` has at most `REASON` characters.
    """

    passed: bool
    status: CodeStatus
    reason: str
    calls: int
    seconds: float


class Untestable(ValueError):
    """The fault is the item's: its tests cannot be run here."""


def extract_code(text: str, entry_point: str | None = None) -> str:
    """The program in an answer: the last fenced block, of those that define `entry_point` if any does.

    Thoughts up to `</think>` are dropped. A block that is not closed goes to the end. Text that begins with code and
    then closes a block is the continuation of a block opened in the prompt. Text without any fence is returned as it
    is, indentation included, since it may continue the prompt's function; a remark before a definition of `entry_point`
    is left out. What comes after the code is cut where it is run. A fence in a docstring closes nothing, and marks
    without width at the beginning of a line, such as the byte order mark, are left out.
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
    """The fenced blocks of a text by their languages, and the lines behind the last of them."""
    blocks: list[tuple[str, str]] = []
    lines: list[str] = []
    opened: tuple[str, str, str] | None = None  # indentation, fence, language
    continued = _begins_with_code(whole)
    end = -1  # of a docstring: the number of the line that closes it
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
            elif not blocks and not fence[3] and _begins_with_code(lines):  # it was opened in the prompt
                blocks.append(("", "\n".join(lines)))
                opened = ("", "", "")
            opened = None if opened and not fence[3] else (fence[1], fence[2], fence[3].lower())
            lines = []
    return [*blocks, (opened[2], "\n".join(lines))] if opened else blocks, lines


def _last_line(line: str, lines: Sequence[str], fence: str) -> str | None:
    """The code before a fence that closes a block at the end of the block's last line.

    None where the line does not end so, and for a remark or a text in quotes that ends so.
    """
    code = line.rstrip().removesuffix(fence).rstrip()
    if code == line.rstrip() or not code.strip(f" \t{fence[0]}") or code.count(fence) % 2 or "#" in code:
        return None
    block = "\n".join([*lines, code])
    return None if block.count('"""') % 2 or block.count("'''") % 2 else code


def _docstring(lines: Sequence[str], number: int, margin: str) -> int:
    """Number of the line that closes the docstring which this line opens, or this number where it opens none.

    A docstring has no fence that stands further left than itself, and none that begins a block in a language at the
    margin of the code: where there is one before its end, the code is broken.
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
    """Grade the text of an answer.

    Args:
        item: as on the Hub: `prompt`, `entry_point` and `test` (HumanEval, evalplus/humanevalplus), `test` and `code`
            (evalplus/mbppplus), `test_list`, `test_imports` (MBPP); or our own `entry_point`, `inputs` (a list of
            argument lists), `expected` and `atol`, where lists and tuples are equal and floats nearly so.
        answer: a chat answer with fenced code, or the continuation of `prompt`.
        sandbox: where it runs.

    Raises:
        Untestable: The item's tests cannot be graded; the message names the item and the reason.
        ValueError: No isolation here.
        OSError: The sandbox failed to start for this answer.
    """
    entry, tests = entry_point_of(item), _tests(item)
    code = extract_code(answer, entry)
    if not code.strip():
        return CodeVerdict(False, "no code", "the answer has no code", 0, 0.0)
    # The prompt of HumanEval is code: imports, helpers and the head of the function, complete without a body.
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
        # Neither program leaves standard error open, so that only the sandbox can have written this.
        if outcome.stderr.startswith(("bwrap: ", "prlimit: ", "setpriv: ")):
            raise OSError(f"the sandbox failed: {outcome.stderr.strip().splitlines()[-1][:REASON]}")
    if judged.status != "ok" or not judged.stderr:
        status: CodeStatus = "crashed" if judged.status == "ok" else judged.status
        return CodeVerdict(False, status, f"no verdict: {judged.status}", 0, judged.seconds)
    kind, reason, calls = json.loads(judged.stderr)
    reason = " ".join("".join(letter if letter.isprintable() else " " for letter in str(reason)[:REASON]).split())
    if kind == "untestable":
        raise Untestable(f"{item.get('task_id', 'an item')}: its tests cannot be graded: {reason}")
    if kind == "lost":
        kind = "crashed" if answered.status == "ok" else answered.status
    return CodeVerdict(kind == "passed", kind, reason, calls, judged.seconds)


def grade_all(
    items: Sequence[Mapping[str, Any]], answers: Sequence[str], sandbox: Sandbox, workers: int | None = None
) -> Iterator[CodeVerdict]:
    """Grade answer i to item i, several at a time; verdicts come in the order of the items, each when it is known.

    Raises:
        ValueError: Not as many answers as items, or no isolation here.
        OSError: The sandbox failed to start.
    """

    def grade(item: Mapping[str, Any], answer: str) -> CodeVerdict:
        try:
            return grade_code(item, answer, sandbox)
        except Untestable as error:  # the others are graded all the same
            return CodeVerdict(False, "untestable", str(error), 0, 0.0)

    if len(items) != len(answers):
        raise ValueError(f"{len(items)} items and {len(answers)} answers: give one answer for each item")
    sandbox.check()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(grade, items, answers)


def _defines(code: str, name: str) -> bool:
    """Whether a name is defined at the left margin. By its looks: to parse a model's text may crash the interpreter."""
    name = re.escape(name)
    return re.search(rf"^(?:(?:async )?def {name}\b|class {name}\b|{name}\s*[:=](?!=))", code, re.MULTILINE) is not None


def entry_point_of(item: Mapping[str, Any]) -> str | None:
    """The function under test; for MBPP, which does not name it, the one of the reference solution that tests use."""
    if item.get("entry_point"):
        return str(item["entry_point"])
    tests = _tests(item)
    names = re.findall(r"^def (\w+)", str(item.get("code", "")), re.MULTILINE)
    return next((name for name in reversed(names) if re.search(rf"\b{name}\b", tests)), None)


def _tests(item: Mapping[str, Any]) -> str:
    """The item's tests as a program.

    Raises:
        Untestable: It has none of a known kind.
    """
    name = item.get("task_id", "an item")
    if "inputs" in item and "expected" in item:
        inputs, expected, atol = item["inputs"], item["expected"], float(item.get("atol") or 0)
        if len(inputs) != len(expected):
            raise Untestable(f"{name}: {len(inputs)} inputs and {len(expected)} expected: give one for each")
        cases = f"for given, wanted in zip({list(inputs)!r}, {list(expected)!r}):"
        check = f"    assert alike({item['entry_point']}(*given), wanted, {atol!r}), (given, wanted)"
        return "\n".join(["from math import inf, nan", inspect.getsource(code_values.alike), cases, check])
    if item.get("test"):
        return str(item["test"])
    if item.get("test_list"):
        return "\n".join([*item.get("test_imports", []), str(item.get("test_setup_code", "")), *item["test_list"]])
    hint = " (evalplus' own files: take the Hub's evalplus/humanevalplus or mbppplus)" if "base_input" in item else ""
    raise Untestable(f"{name}: no tests: give test, test_list, or inputs and expected{hint}")


@functools.cache
def _program(*modules: ModuleType) -> str:
    """The source of modules as one text; a call at its end makes it a program."""
    lines = "\n".join(map(inspect.getsource, modules)).splitlines()
    # In a sandbox there is no package to import from, and a program has its future imports at its beginning.
    lines = [line for line in lines if not line.startswith(("from __future__ import", "from .code_values import"))]
    return "\n".join(["from __future__ import annotations", *lines])
