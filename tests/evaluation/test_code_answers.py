"""Programs as models write them: what stands around the function under test, and what an answer can make of that.

In a real sandbox throughout; nothing is timed, short limits only keep programs short that do not end.
"""

from __future__ import annotations

import shutil
import sys

import pytest

from tah.evaluation.code_tasks import REASON, CodeVerdict, extract_code, grade_all, grade_code
from tah.evaluation.grading.code_judge import Link
from tah.evaluation.sandbox import Sandbox

real = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is missing (apt-get install bubblewrap)")

ADD = {
    "task_id": "Test/0",
    "prompt": 'def add(a, b):\n    """Sum."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 5) == 4\n",
}
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"


def graded(answers: list[str], item: dict | None = None, seconds: float = 15) -> list[CodeVerdict]:
    """Verdicts on answers to one item, two at a time."""
    return list(grade_all([item or ADD] * len(answers), answers, Sandbox(seconds=seconds), workers=2))


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


# --- What follows the function and only uses it

USES = [
    "assert add(1, 2) == 4",
    "assert add(1, 2) == 3, 'fine'",
    "print(add(x, y))",
    "print(add(1, 2), end='')",
    "exit()",
    "quit()",
    "import sys\nsys.exit(add(1, 2))",
    "raise SystemExit(1)",
    "raise ValueError('an example')",
    "import unittest\nunittest.main()",
    "import unittest\nclass TestAdd(unittest.TestCase):\n    def test_it(self):\n"
    "        self.assertEqual(add(1, 2), 4)\n"
    "unittest.main()",
    "import doctest\ndoctest.testmod(verbose=True)",
    "import pytest_that_nobody_has\n\n@pytest_that_nobody_has.mark.parametrize('a', [1])\ndef test_add(a):\n"
    "    assert a",
    "a = int(input('a: '))\nb = int(input('b: '))\nprint(add(a, b))",
    "input()",
    "result = add(x, y)\nprint(result)",
    "for a, b in cases:\n    print(add(a, b))",
    "while True:\n    print(add(int(input()), 1))",
    "if __name__ == '__main__':\n    print(add(x, y))\n    exit()",
    "if True:\n    assert add(1, 2) == 4",
    "with open('numbers.txt') as file:\n    print(add(*map(int, file)))",
    "try:\n    add(None, 1)\nfinally:\n    print('done')",
    "add(None, 1)",
    "add('a')",
    "def main():\n    print(add(1, 2))\n    raise SystemExit\n\nmain()",
    "import matplotlib.pyplot as plt\nplt.plot([add(1, 2)])",
    "print(add(1, 2)  # not closed",
    ">>> add(1, 2)\n3",
    "Output: 3",
    "1 / 0",
    "del nothing",
    "add.__name__.nothing",
]
# What does not end, or takes the process down: left out by starting again without it.
ENDLESS = [
    "while True:\n    pass",
    "while True:\n    try:\n        print(add(int(input()), 1))\n    except:\n        continue",
    "import time\ntime.sleep(1000)",
    "import os\nos._exit(0)",
    "import os\nos.abort()",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "import threading\nthreading.Event().wait()",
    "import os\nos.closerange(3, 100)",
]


@real
def test_what_only_uses_a_right_function_does_not_fail_it():
    """A wrong function followed by the same stays wrong."""
    for function, passes in ((RIGHT, True), (WRONG, False)):
        for use, verdict in zip(USES, graded([fenced(function + use) for use in USES]), strict=True):
            assert verdict.passed == passes and verdict.status == ("passed" if passes else "wrong"), (use, verdict)


@real
def test_what_does_not_end_is_left_out():
    for function, passes in ((RIGHT, True), (WRONG, False)):
        answers = [fenced(f"{function}\n{use}\nprint('an example')") for use in ENDLESS]
        for use, verdict in zip(ENDLESS, graded(answers, seconds=3), strict=True):
            assert verdict.passed == passes, (use, verdict)


@real
def test_several_that_do_not_end():
    """What is tried three times in vain is given up, and only definitions are left."""
    never = "import os\nos._exit(0)\n" * 3
    assert [v.status for v in graded([RIGHT + never, RIGHT + never * 2, WRONG + never], seconds=6)] == [
        "passed",
        "passed",
        "wrong",
    ]
    helper = "def add(a, b):\n    return helper(a, b)\n" + never * 2 + "def helper(a, b):\n    return a + b\n"
    assert graded([helper], seconds=6)[0].passed


NEEDED = [  # what stands behind or before the function and is needed
    "def add(a, b):\n    return helper(a, b)\n\ndef helper(a, b):\n    return a + b",
    "def add(a, b):\n    return helper(a, b)\n\nprint(add(1, 2))\n\ndef helper(a, b):\n    return a + b",
    "def add(a, b):\n    return a + b + ZERO\n\nassert add(1, 2) == 3\nZERO = 0",
    "def add(a, b):\n    return a + TABLE[b]\n\nTABLE = []\nfor number in range(10):\n    TABLE.append(number)",
    "def add(a, b):\n    return TABLE[a, b]\n\nTABLE = {}\nfor a in range(-9, 9):\n"
    "    TABLE.update({(a, b): a + b for b in range(9)})",
    "def add(a, b):\n    return operator.add(a, b)\n\nimport operator",
    "def add(a, b):\n    return a + b + int(state.zero)\n\nclass State:\n    pass\n\nstate = State()\nstate.zero = 0",
    "from functools import lru_cache\n\n@lru_cache(maxsize=None)\ndef add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "import functools\n\ndef add(a, b):\n    return a + b\n\nadd = functools.lru_cache(None)(add)",
    "memo = {}\n\ndef add(a, b):\n    if (a, b) not in memo:\n        memo[a, b] = a + b\n"
    "    return memo[a, b]\n\nadd(1, 2)",
    "import sys\n\ndef add(a, b):\n    return a if b == 0 else add(a, b - 1) + 1\n\n"
    "sys.setrecursionlimit(5000)\nprint(add(1, 2000))",
    "from dataclasses import dataclass\n\ndef add(a, b):\n    return Pair(a, b).sum()\n\n@dataclass\n"
    "class Pair:\n    a: int\n"
    "    b: int\n\n    def sum(self):\n        return self.a + self.b",
    "class Adder:\n    def __call__(self, a, b):\n        return a + b\n\nadd = Adder()\nprint(add(1, 2))",
    "add = lambda a, b: a + b\nprint(add(1, y))",
    "if True:\n    def add(a, b):\n        return a + b\n\nprint(add(x, 1))",
    "def add(a, b):\n    return -1\n\nprint(add(1, 2))  # better:\n\ndef add(a, b):\n    return a + b",
    "def outer():\n    global add\n    def add(a, b):\n        return a + b\n\nouter()\nassert add(1, 2) == 4",
    "counter = 0\n\ndef add(a, b):\n    global counter\n    counter += 1\n"
    "    return a + b if counter < 3 else 0\n\nprint(add(1, 2))",
]
MISSING = [  # and what makes the function fail although it stands outside it
    "def add(a, b):\n    return helper(a, b)\n\nprint(add(1, 2))",
    "def add(a, b):\n    return a + TABLE[b]\n\nTABLE = [number for number in numbers]",
    "def add(a, b):\n    return operator.add(a, b)",
    "import a_package_of_nobody\n\ndef add(a, b):\n    return a + b",
    "raise SystemExit(0)\n\ndef add(a, b):\n    return a + b",
    "print(undefined)\n\ndef add(a, b):\n    return a + b",
    "@undefined\ndef add(a, b):\n    return a + b",
    "def add(a, b):\n    return a + b\n\ndel add",
    "def add(a, b):\n    return a + b\n\nadd = undefined(add)",
    "def add(a, b):\n    return a + b\n\n@undefined\ndef add(a, b):\n    return a + b",
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return 0",
    "def add(a, b):\n    return a + b\n\nadd = add(1, 2)",
    "def add(a, b):\n    return a + b\n\nclass add:\n    pass",
    # a statement that should redefine it, and fails
    RIGHT + "add: object = undefined",
    RIGHT + "add += 1",
    RIGHT + "add, z = undefined",
    RIGHT + "z, (x, *add) = undefined",
    RIGHT + "z = [add] = undefined",
    RIGHT + "from nowhere import add",
    RIGHT + "from nowhere import plus as add",
    RIGHT + "import nowhere as add",
    RIGHT + "import add",
    RIGHT + "with open('x') as f: add = 3",
    RIGHT + "with open('x') as add: pass",
    RIGHT + "for add in undefined: pass",
    RIGHT + "for x in undefined:\n    add = x",
    RIGHT + "if undefined:\n    def add(a, b): return 0",
    RIGHT + "try:\n    add = undefined\nfinally:\n    pass",
    RIGHT + "print((add := undefined))or 1",
    RIGHT + "[(add := x) for x in undefined].sort()",
    RIGHT + "match undefined:\n    case {'a': 1, **add}: pass",
    RIGHT + "match undefined:\n    case [1, *add]: pass",
    RIGHT + "add = exit()",
]
UNTOUCHED = [  # what fails there and was to define something else
    "plus: object = undefined",
    "add: Undefined",
    "plus += add",
    "plus, z = undefined(add)",
    "plus.add = 3",
    "add.plus = undefined",
    "plus[add] = undefined",
    "from nowhere import add as plus",
    "from add import plus",
    "import nowhere.add",
    "for plus in undefined: print(add)",
    "with open('x') as f: print(add(1, 2))",
    "[add for add in undefined].sort()",
    "undefined(lambda add: add)",
    "undefined(add=3)",
    "@undefined\ndef plus():\n    add = 3",
    "@undefined\nclass Plus:\n    add = 3",
    "match undefined:\n    case {'add': plus}: pass",
]


@real
def test_what_the_function_needs_is_run():
    for code, verdict in zip(NEEDED, graded([fenced(code) for code in NEEDED]), strict=True):
        assert verdict.passed, (code, verdict)


BY_ITSELF = [  # what a program needs of its own, whatever is imported beside it; whether it passes
    ("def add(x: List[int], y) -> Optional[int]:\n    return x + y", False),
    ("def add(x: Sequence, y):\n    return x + y", False),
    ("def add(x, y) -> np.ndarray:\n    return x + y", False),
    ("def add(x, *rest: Any):\n    return x + rest[0]", False),
    ("def helper(x: Any):\n    return x\n\ndef add(x, y):\n    return helper(x) + y", False),
    ("def add(x, y):\n    return helper(x) + y\n\ndef helper(x: Any):\n    return x", False),
    ("total: Any = 0\n\ndef add(x, y):\n    return x + y + total", False),
    ("class A:\n    x: Any = 0\n\ndef add(x, y):\n    return x + y + A.x", False),
    ("from dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: Optional[int]\n\n"
     "def add(x, y):\n    return x + y", False),
    # with the imports, with the future import, or without a need of either
    ("from typing import List, Optional\n\ndef add(x: int, y: int) -> Optional[int]:\n    return x + y", True),
    ("from typing import *\n\ndef add(x: Union[int, List[int]], y) -> Any:\n    return x + y", True),
    ("from __future__ import annotations\n\ndef add(x: List[int], y) -> Optional[int]:\n    return x + y", True),
    ('"""Adds."""\n\nfrom __future__ import annotations\nimport os\n\ndef add(x: Any, y):\n    return h(x, y)\n'
     "\nTABLE: Any = 0\n\ndef h(x: Any, y):\n    return x + y + TABLE\n\nprint(no)", True),
    ("def add(x: 'List[int]', y) -> 'Optional[int]':\n    return x + y", True),
    ("def add(x: list[int], y: dict[str, int]) -> int | None:\n    return x + y", True),
    ("def add(x: int, y):\n    return x + y if add.__annotations__['x'] is int else 0", True),
    ("from __future__ import annotations\n\ndef add(x: int, y):\n"
     "    return x + y if add.__annotations__['x'] == 'int' else 0", True),
    ("def add(x: int, y):\n    return x + y if add.__annotations__['x'] == 'int' else 0", False),
    ("import dataclasses\n\n@dataclasses.dataclass\nclass Pair:\n    x: int\n    y: int\n\n"
     "def add(x, y):\n    return sum(f.type(getattr(Pair(x, y), f.name)) for f in dataclasses.fields(Pair))", True),
    ("def add(x, y):\n    total: Any = x + y\n    return total", True),  # Python evaluates none within a function
]  # fmt: skip


@real
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="from 3.14 on no program evaluates its annotations at once")
def test_annotations_mean_what_they_mean_in_a_program_by_itself():
    for item in (ADD, {"task_id": 1, "text": "Add.", "code": RIGHT, "test_list": ["assert add(1, 2) == 3"]}):
        for (code, passes), verdict in zip(BY_ITSELF, graded([fenced(c) for c, _ in BY_ITSELF], item), strict=True):
            assert verdict.passed == passes and verdict.status in ("passed", "error", "wrong"), (code, verdict)
    # The prompt's own imports, of names and of the future, are those of an answer that does not repeat them.
    for line in ("from typing import *\n", "from __future__ import annotations\n"):
        item = {**ADD, "prompt": line + ADD["prompt"]}
        answers = [fenced("def add(x: List[int], y) -> Optional[int]:\n    return x + y"), "    return a + b"]
        assert [verdict.passed for verdict in graded(answers, item)] == [True, True]
    tests = {**ADD, "test": "x: Undefined = 0\n" + ADD["test"]}
    assert [verdict.passed for verdict in graded([RIGHT], tests)] == [False]


@real
def test_where_there_may_be_no_child_it_is_run_all_the_same():
    few = Sandbox(processes=1)
    for code in NEEDED[:6]:
        assert grade_code(ADD, fenced(code), few).passed, code
    fails = [use for use in USES if "main" not in use][:6]
    assert all(grade_code(ADD, fenced(RIGHT + use), few).passed for use in fails)


@real
def test_what_the_function_lacks_fails_it():
    for code, verdict in zip(MISSING, graded([fenced(code) for code in MISSING]), strict=True):
        assert not verdict.passed and verdict.status in ("error", "wrong"), (code, verdict)


@real
def test_what_defines_something_else_may_fail():
    """And a name of the function that a statement gets without failing is the function, or not, as in any program."""
    for function, passes in ((RIGHT, True), (WRONG, False)):
        for code, verdict in zip(UNTOUCHED, graded([function + code for code in UNTOUCHED]), strict=True):
            assert verdict.passed == passes, (code, verdict)
    kept = "try:\n    from nowhere import add\nexcept ImportError:\n    pass"
    answers = [
        RIGHT + kept,
        RIGHT + "for add in [add]: pass",
        RIGHT + "add, z = min, 1",
        RIGHT + "for add in [max]: pass",
    ]
    assert [verdict.passed for verdict in graded(answers)] == [True, True, False, False]


@real
def test_a_redefinition_that_does_not_end_counts():
    """Or where so much does not end that little else is run."""
    never = "import os\nos._exit(0)\n"
    answers = [RIGHT + "while True: add = max", RIGHT + "import os\nadd = os._exit(0)", RIGHT + never * 4 + "add = max"]
    answers += [RIGHT + "while True: plus = max", RIGHT + never * 4 + "plus = max", WRONG + never * 4 + RIGHT]
    passed = [verdict.passed for verdict in graded(answers, seconds=3)]
    assert passed == [False, False, False, True, True, True]


@real
def test_the_continuation_of_a_prompt_may_be_followed_by_uses():
    answers = ["    return a + b\n\nprint(add(x, y))", "    return a + b\n\nassert add(1, 2) == 4\nexit()"]
    answers += ["    return a - b\n\nprint(add(x, y))", "    pass\n"]
    assert [verdict.passed for verdict in graded(answers)] == [True, True, False, False]


@real
def test_an_item_without_the_name_of_its_function():
    item = {"task_id": 1, "text": "Add.", "test_list": ["assert add(1, 2) == 3"]}
    answers = [RIGHT + "print(x)", "def help_it():\n    pass\n" + RIGHT + "exit()", WRONG + "print(x)"]
    assert [verdict.status for verdict in graded(answers, item)] == ["passed", "passed", "wrong"]


# --- Fences

FENCES = [  # an answer, and the code in it
    ("```python\ndef add(a, b):\n    return a + b```\nIt adds.", RIGHT),
    ("```python\ndef add(a, b):\n    return a + b```", RIGHT),
    ("```python\ndef add(a, b):\n    return a + b ```  \n\nIt adds.", RIGHT),
    ("```\ndef add(a, b):\n    return a + b```\nIt adds.", RIGHT),
    ("~~~python\ndef add(a, b):\n    return a + b~~~\nIt adds.", RIGHT),
    ("````python\ndef add(a, b):\n    return a + b````\nIt adds.", RIGHT),
    ("So:\n  ```py\n  def add(a, b):\n      return a + b```\nIt adds.", RIGHT),
    ("```python\ndef add(a, b):\n    return a + b```\nUse it:\n```python\nprint(add(1, 2))\n```", RIGHT),
    ("```python\ndef add(a, b):\n    return a + b```\nUse it:\n```\n3\n```\n", RIGHT),
    ("```python\ndef add(a, b): return a + b```\nIt adds.", "def add(a, b): return a + b"),
    ("def add(a, b):\n    return a + b```\nIt adds.", RIGHT),
    ("    return a + b```\nIt adds.", "    return a + b"),
    ("<think>no</think>```python\ndef add(a, b):\n    return a + b```", RIGHT),
    # a fence at the end of a line that closes nothing
    ('```python\ndef add(a, b):\n    """Use ```add```"""\n    return a + b\n```', None),
    ('```python\ndef add(a, b):\n    """Like this: ```\n    add(1, 2)"""\n    return a + b\n```', None),
    ("```python\ndef add(a, b):\n    # the mark is ```\n    return a + b\n```", None),
    ("```python\nfence = '```'\n\ndef add(a, b):\n    return a + b\n```", None),
    ("```python\ndef add(a, b):\n    x = '~~~'  # ~~~\n    return a + b\n```", None),
]


DOC = 'def add(a, b):\n    """Sum.\n\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b'
IN_TEXTS = [  # an answer, and the code in it: fences in docstrings, and marks that nobody sees
    (f"```python\n{DOC}\n```\nIt adds.", DOC),
    (f"```python\n{DOC}\n```\n\nUse it:\n\n```python\nadd(1, 2)\n```", DOC),
    (f"```python\n{DOC}```\nIt adds.", DOC),
    (f"```python\n{DOC}", DOC),
    (f"```\n{DOC}\n```", DOC),
    (f"~~~python\n{DOC}\n~~~".replace("```", "~~~"), DOC.replace("```", "~~~")),
    (f"{DOC}\n```\nIt adds.", DOC),
    ("So:\n  ```python\n" + "\n".join("  " + line for line in DOC.splitlines()) + "\n  ```", DOC),
    ("```python\n" + DOC.replace("    ```\n    add", "    ```python\n    add") + "\n```\nIt adds.",
     DOC.replace("    ```\n    add", "    ```python\n    add")),
    ("```python\n" + DOC.replace('"""', "'''") + "\n```", DOC.replace('"""', "'''")),
    ("```python\n" + DOC.replace('"""Sum', 'r"""Sum') + "\n```", DOC.replace('"""Sum', 'r"""Sum')),
    ('```python\n"""Adds.\n\n```\nadd(1, 2)\n```\n"""\n' + RIGHT + "```\nIt adds.",
     '"""Adds.\n\n```\nadd(1, 2)\n```\n"""\n' + RIGHT),
    ("```python\nTEXT = '''\n```\n'''\n" + RIGHT + "```", "TEXT = '''\n```\n'''\n" + RIGHT),
    # quotes that open no docstring, and docstrings that nothing closes
    ("```python\n# it's \"\"\" here\n" + RIGHT + "```\nIt adds \"\"\".", "# it's \"\"\" here\n" + RIGHT),
    ("```python\nq = '\"\"\"'\n" + RIGHT + "```\nIt adds \"\"\".", "q = '\"\"\"'\n" + RIGHT),
    ('```python\ndef add(a, b):\n    """Sum."""\n    return a + b\n```\nIt has """.',
     'def add(a, b):\n    """Sum."""\n    return a + b'),
    ("```python\ndef add(a, b):\n    '''Sum\n    return a\n```\nBetter:\n```python\n" + RIGHT + "```", RIGHT),
    ("```\ndef add(a, b):\n    '''Sum\n    return a\n```\nBetter:\n```\n" + RIGHT + "'''x'''\n```",
     RIGHT + "'''x'''"),
    ("Texts have '''.\n```\n" + RIGHT + "'''x'''\n```", RIGHT + "'''x'''"),
    ("```python\n" + RIGHT + "\n'''An example:\n```\nIt adds.", RIGHT + "\n'''An example:"),
    # marks without width
    ("\ufeff" + RIGHT, RIGHT),
    ("\ufeff```python\n" + RIGHT + "```\nIt adds.", RIGHT),
    ("```python\n\ufeff" + RIGHT + "```\nIt adds.", RIGHT),
    ("```python\n\u200b" + RIGHT + "\u2060```\nIt adds.", RIGHT),
    ("\ufeff    return a + b", "    return a + b"),
    ("<think>no</think>\ufeff" + RIGHT, RIGHT),
]  # fmt: skip


@pytest.mark.parametrize("answer, code", IN_TEXTS)
def test_fences_in_docstrings_and_marks_without_width(answer, code):
    assert extract_code(answer, "add").strip("\n") == code.strip("\n")


@real
def test_answers_with_these_pass():
    answers = [answer for answer, _ in IN_TEXTS]
    for answer, verdict in zip(answers, graded(answers), strict=True):
        assert verdict.passed, (answer, verdict)
    wrong = [answer.replace("a + b", "a - b") for answer in answers]
    for answer, verdict in zip(wrong, graded(wrong), strict=True):
        assert not verdict.passed, (answer, verdict)


def test_long_answers_are_read():
    """pytest's time limit would end a search whose time grows with the square of the length."""
    for part in ("'''\n```\n", "'''\n```py\n", "```\n", "```py\n", "'''x", "    '''\n", "'\\", "\ufeff\n", "'"):
        for text in (part * (100_000 // len(part)), "```python\n'''\n" + part * (100_000 // len(part))):
            assert isinstance(extract_code(text, "add"), str)


@pytest.mark.parametrize("answer, code", FENCES)
def test_a_fence_that_closes_on_the_last_line_of_code(answer, code):
    whole = answer.removeprefix("```python\n").removesuffix("\n```")
    assert extract_code(answer, "add").strip("\n") == (whole if code is None else code).strip("\n")


@real
def test_answers_in_such_fences_pass():
    answers = [answer for answer, _ in FENCES]
    for answer, verdict in zip(answers, graded(answers), strict=True):
        assert verdict.passed, (answer, verdict)
    wrong = [answer.replace("a + b", "a - b") for answer in answers]
    for answer, verdict in zip(wrong, graded(wrong), strict=True):
        assert not verdict.passed, (answer, verdict)


# --- What tests use without importing it

ROOT = "import math\n\ndef root(x):\n    return math.sqrt(x)\n"
IMPORTS = [  # reference, tests, a right answer, a wrong one
    (ROOT, ["assert math.isclose(root(4), 2, rel_tol=0.1)"], "def root(x): return x ** 0.5", "def root(x): return x"),
    ("", ["assert math.isclose(root(4), 2.0)"], "def root(x): return x ** 0.5", "def root(x): return x"),
    (ROOT, ["assert root(4) == math.sqrt(4)"], ROOT, "def root(x): return 1"),
    ("import sys\ndef f(x):\n"
     "    return sys.maxsize", ["assert f(0) == sys.maxsize"], "def f(x): return 2**63-1", "def f(x): return 2"),
    ("from math import isclose\ndef f(x):\n"
     "    return x", ["assert isclose(f(1), 1.0)"], "def f(x): return x", "def f(x): return 2"),
    ("import math as m\ndef f(x):\n"
     "    return x", ["assert m.floor(f(1.5)) == 1"], "def f(x): return x", "def f(x): return 2"),
    ("from collections import Counter\ndef f(x):\n    return Counter(x)", ["assert f('aab') == Counter('aab')"],
     "def f(x): return {'a': 2, 'b': 1}", "def f(x): return {'a': 1}"),
    ("", ["assert f('aab') == Counter({'a': 2, 'b': 1})"],
     "import collections\ndef f(x): return collections.Counter(x)", "def f(x): return {'a': 1}"),
    ("", ["assert f([1]) == deque([1])"], "from collections import deque\nf = deque", "def f(x): return x"),
    ("", ["assert f(0) == inf"], "def f(x): return float('inf')", "def f(x): return 1"),
    ("import datetime\ndef f(x):\n"
     "    return datetime.date(2020, 1, x)", ["assert f(2) == datetime.date(2020, 1, 2).day"],
     "def f(x): return x", "def f(x): return 0"),
    ("", ["assert re.sub('a', 'b', f('aa')) == 'bb'"], "def f(x): return x", "def f(x): return 'c'"),
    # names that the answer defines stay its own
    ("class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(p):\n"
     "    return p.a", ["assert f(Pair(1, 2)) == 1"],
     "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(p): return p.a",
     "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef f(p): return p.b"),
    ("class Counter:\n    pass\ndef f(x):\n"
     "    return 1 if isinstance(x, Counter) else 2", ["assert f(Counter()) == 1"],
     "class Counter:\n    pass\ndef f(x): return 1 if isinstance(x, Counter) else 2", "class Counter: pass\n"
     "def f(x): return 2"),
    ("def statistics(x):\n"
     "    return sum(x)", ["assert statistics([1, 2]) == 3"], "statistics = sum", "statistics = max"),
]  # fmt: skip


@real
def test_mbpp_items_that_do_not_name_their_imports():
    for reference, tests, right, wrong in IMPORTS:
        item = {"task_id": 1, "text": "Write a function.", "code": reference, "test_list": tests}
        if not reference:
            item["entry_point"] = "root" if "root" in tests[0] else "f"
        statuses = [verdict.status for verdict in graded([right, wrong], item)]
        assert statuses[0] == "passed" and statuses[1] == "wrong", (reference, tests, statuses)


# --- Errors that tests might not see

SWALLOWS = [
    "assert all(map(candidate, [1, 2, 3]))",
    "assert list(map(candidate, [1])) == []",
    "assert all(candidate(x) for x in [1, 2, 3])",
    "assert sum(map(candidate, [1, 2])) == 0",
    "assert sorted(map(candidate, [2, 1])) == []",
    "assert next(map(candidate, [1]), True)",
    "for value in map(candidate, [1, 2]):\n        assert value == 2",
    "assert not any(map(candidate, [1]))",
    "assert [*filter(candidate, [1])] == []",
    "assert not dict(zip(map(candidate, [1]), [1]))",
    "assert max(map(candidate, [1]), default=1) == 1",
]
RAISES = [
    "raise StopIteration",
    "raise StopIteration(1)",
    "return next(iter([]))",
    "raise StopAsyncIteration",
    "raise GeneratorExit",
    "class Stop(StopIteration): pass\n    raise Stop",
]


@real
def test_the_end_of_an_iteration_does_not_pass():
    for test in SWALLOWS:
        item = {"task_id": 1, "entry_point": "f", "test": f"def check(candidate):\n    {test}\n"}
        answers = [f"def f(x):\n    {line}" for line in RAISES[:3]]
        assert [verdict.status for verdict in graded(answers, item)] == ["error"] * 3, test
    item = {"task_id": 1, "entry_point": "f", "test": f"def check(candidate):\n    {SWALLOWS[0]}\n"}
    for line, verdict in zip(RAISES, graded([f"def f(x):\n    {line}" for line in RAISES], item), strict=True):
        assert verdict.status == "error" and verdict.calls == 1, (line, verdict)
    assert [verdict.passed for verdict in graded(["def f(x): return x", "def f(x): return x > 1"], item)] == [
        True,
        False,
    ]


@real
def test_tests_may_expect_other_errors():
    test = "def check(f):\n    try:\n        f(1)\n    except ValueError:\n        return\n    assert False\n"
    item = {"task_id": 1, "entry_point": "f", "test": test}
    answers = ["def f(x): raise ValueError", "def f(x): raise KeyError", "def f(x): return 1"]
    assert [verdict.status for verdict in graded(answers, item)] == ["passed", "error", "wrong"]


# --- What an answer can say

SAYS = """
import os
line = b'["error", [%s, %s]]\\n'
def add(a, b):
    for number in range(64):
        try: os.write(number, line)
        except OSError: pass
    return 0
"""


@real
def test_reasons_are_short():
    """Where the reply was written straight to the pipe too."""
    answers = [SAYS % ('"E"', '"' + "x" * 900_000 + '"'), SAYS % ('"' + "E" * 900_000 + '"', '"x"')]
    answers += [SAYS % (str(["E"] * 99_000).replace("'", '"'), '"x"')]
    answers += ["def add(a, b): raise ValueError('x' * 900_000)", "def add(a, b): return 'x' * 900_000"]
    answers += ["class A: pass\nA.__name__ = 'A' * 900_000\ndef add(a, b): return A()"]
    answers += [SAYS.replace("error", "value").replace("[%s, %s]", '{"object": [0, "%s"]}') % ("x" * 900_000)]
    for answer, verdict in zip(answers, graded(answers), strict=True):
        assert not verdict.passed and 0 < len(verdict.reason) <= REASON, (answer[:200], verdict)


def test_replies_are_cut_where_they_are_read():
    class Pipe:
        def __init__(self, line: bytes = b"") -> None:
            self.line = line

        def readline(self, limit: int) -> bytes:
            return self.line[:limit]

        def write(self, data: bytes) -> None: ...

        def flush(self) -> None: ...

    link = Link(Pipe(b'["error", ["ValueError", "' + b"x" * 900_000 + b'"]]\n'), Pipe())
    with pytest.raises(ValueError) as raised:
        link.ask("f", [1], {})
    assert len(str(link.message_of(raised.value))) < 400


# --- No verdict is forged by what stands behind the function, or around it

WRITES = """
for number in range(64):
    try: os.write(number, {})
    except OSError: pass
"""
FORGED = {
    "writes a verdict behind": WRONG + "import os" + WRITES.format("""b'["passed", "", 2]\\n'"""),
    "writes values behind": WRONG
    + "import os"
    + WRITES.format("""b'["value", 0]\\n["value", 0]\\n"
    "["value", 0]\\n'"""),
    "says that it is done": WRONG + "import os" + WRITES.format("b'done\\n'") + "os._exit(0)\n",
    "says numbers": WRONG + "import os" + WRITES.format("b'7\\n99999999999999999999\\n-1\\n'") + "os._exit(0)\n",
    "exits behind": WRONG + "raise SystemExit(0)\n",
    "exits with hooks": WRONG
    + 'import atexit, os\natexit.register(print, \'["passed", "", 2]\')\nraise SystemExit(0)\n',
    "ends behind, always": WRONG + "import os\nos._exit(0)\n" * 9,
    "kills the one who waits": RIGHT + "import os\nos.kill(os.getppid(), 9)\n" + WRONG,
    "forks behind": WRONG + "import os\nos.fork()\n",
    "forks without end": WRONG + "import os\nwhile True: os.fork()\n",
    "deletes the function": RIGHT + "del add\n",
    "redefines it": RIGHT + "add = lambda a, b: 0\n",
    "redefines it and fails": RIGHT + "add = (lambda a, b: 0) if unknown else add\n",
    "redefines it through globals": RIGHT + "globals()['add'] = lambda a, b: 0\n",
    "patches the builtins behind": WRONG
    + "import builtins\nbuiltins.exec = builtins.compile = print\nbuiltins.isinstance = lambda *given: True\n"
    "builtins.BaseException = builtins.AssertionError = Warning\n",
    "patches its server": WRONG
    + "import __main__, json\n__main__.decode = lambda *given: 3\n__main__.encode = lambda *given: {'int': '3'}\n",
    "patches json": WRONG + "import json\njson.dumps = lambda *given: '[\"value\", true]'\n",
    "equals everything": "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def add(a, b): return Same(0)\nprint(add(1, 2))\n",
    "raises to stop": "def add(a, b): raise StopIteration\nprint(add(1, 2))\n",
    "waits behind": WRONG + "import time\ntime.sleep(1000)\n",
    "ignores all signals": WRONG + "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n"
    "while True: pass\n",
    "traces": WRONG + "import sys\nsys.settrace(lambda *given: None)\nsys.setprofile(lambda *given: exit())\n",
    "walks the frames behind": WRONG + "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    frame.f_globals.update(add=lambda a, b: 0, failure=None)\n"
    "    frame = frame.f_back\n",
    "names itself as the judge": WRONG
    + "def judge(*given): return ['passed', '', 2]\ndef check(candidate): return True\n",
    "sends a strange thing": "import os\ndef add(a, b):"
    + WRITES.replace("\n", "\n    ").format("""b'["value", {"object": {"__eq__": 1}}]\\n'""")
    + "\n    return 0\n",
}


@real
def test_nothing_behind_the_function_forges_a_verdict():
    """And the answers after each are graded as ever."""
    answers = [fenced(code) for forged in FORGED.values() for code in (forged, RIGHT)]
    verdicts = graded(answers, seconds=3)
    for name, verdict in zip(FORGED, verdicts[::2], strict=True):
        assert not verdict.passed and verdict.reason and len(verdict.reason) <= REASON, (name, verdict)
    assert all(verdict.passed and verdict.calls == 2 for verdict in verdicts[1::2])


@real
def test_the_tests_side_knows_nothing_of_names_in_the_answer():
    """A `check` of the answer, or a module of the tests' name, is not what judges."""
    answer = fenced("import sys\nsys.modules['math'] = None\ndef check(candidate): return True\n" + WRONG)
    item = {**ADD, "test": "import math\n" + ADD["test"]}
    assert grade_code(item, answer, Sandbox()).status == "wrong"
