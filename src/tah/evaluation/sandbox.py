"""Python programs nobody vouches for, run in isolation: bubblewrap, an unprivileged user inside, a system-call filter.

What a program in the sandbox has: Python's standard library (and numpy, where installed), `/usr` read-only, a private
`/tmp` of 64 MB, an empty home, its own process, IPC and host name space, a loopback network with nobody else on it.
What it has not: the network, files of the machine or of its user (`/etc`, `/home`, `/root`, `/proc` and `/sys` are not
there), the environment of this process, capabilities, ways to get some. Limits of memory, processor time, processes,
file size and open files hold for root too, because the program never runs as root: where this process is root, the
program gets a user number of its own, so that not even two sandboxes share a count.

What is left: the kernel is shared, and a hole in it is a hole in the sandbox. A program may slow the machine down by
what the limits allow, and empty files in `/tmp` take kernel memory up to the kernel's own limit of files there.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import itertools
import os
import platform
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "timeout", "memory", "crashed", "killed"]

CLOCK = 3.0  # seconds by the clock for each second of processor time: what sleeps must end, what waits for a core not
TEMPORARY = 64 << 20  # bytes in /tmp
FILE = 16 << 20  # bytes in one file
OUTPUT = 1 << 20  # bytes on standard output, and as many on standard error
OPEN_FILES = 64
GRACE = 2.0  # seconds for the answering program of a pair to notice that nobody asks any more
LOOK = 0.2  # seconds between two looks at the memory of the whole sandbox
ASKING_MB = 4096  # for the asking program of a pair, which may hold many tests
USERS = 61184  # systemd's range for users that are made up on the spot: nobody owns a file or a process with them
USERS_COUNT = 4000
_users = itertools.count(os.getpid() * 16)  # so that two processes at a time hardly ever take the same
PROGRAM = "/run/program.py"
INSTALL = "install it (apt-get install bubblewrap util-linux) or leave the code benchmarks out"
# System calls refused, as (x86-64, AArch64): those that make name spaces and mounts, look into other processes, or take
# memory that no limit counts. The namespace flags of clone and the families of socket are looked at one by one.
REFUSED = {
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "fsopen": (430, 430), "fsmount": (432, 432), "open_tree": (428, 428), "move_mount": (429, 429),
    "mount_setattr": (442, 442), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
}  # fmt: skip
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
NAMESPACES = 0x7E020000  # CLONE_NEWNS | CGROUP | UTS | IPC | USER | PID | NET
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: the others, such as AF_VSOCK, do not end at a network name space
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    `status`: "ok" (exit code 0), "timeout", "memory", "crashed" (another exit code or a signal), "killed" (too much
    output, or SIGKILL from within). Output is cut at 1 MiB. `seconds` are by the clock, start of the sandbox included.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """Runs Python programs in isolation. One object serves any number of threads.

    Args:
        memory_mb: address space of each process, and memory in use by all of a sandbox together, in MiB.
        seconds: processor time of each process; a run ends after three times as many seconds by the clock.
        processes: processes and threads at a time.
        packages: top-level packages of this environment that programs may import, where they are installed.

    Raises:
        ValueError: A limit is not positive.
    """

    def __init__(
        self, memory_mb: int = 1024, seconds: float = 15, processes: int = 16, packages: Sequence[str] = ("numpy",)
    ) -> None:
        for name, value in (("memory_mb", memory_mb), ("seconds", seconds), ("processes", processes)):
            if not value > 0:
                raise ValueError(f"{name}={value} is not a limit: give a positive number")
        self.memory_mb, self.seconds, self.processes, self.packages = memory_mb, seconds, processes, tuple(packages)
        self._lock = threading.Lock()
        self._checked = False

    def check(self) -> None:
        """Try the sandbox once.

        Raises:
            ValueError: No isolation on this machine: what is missing, and what to do.
        """
        with self._lock:
            if self._checked:
                return
            if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
                where = f"{platform.system()} on {platform.machine()}"
                raise ValueError(f"no sandbox for {where}: grade code on Linux, x86_64 or aarch64")
            for program in ("bwrap", "prlimit", "setpriv"):
                if shutil.which(program) is None:
                    raise ValueError(f"model answers are run in a sandbox only, and {program} is missing: {INSTALL}")
            box = self._start("print(6 * 7)", _file(b""), subprocess.PIPE)
            outcome = self._watch([box])[0]
            if (outcome.status, outcome.stdout) != ("ok", "42\n"):
                said = (outcome.stderr.strip().splitlines() or [f"status {outcome.status}"])[-1]
                raise ValueError(
                    f"the sandbox does not start here ({said}): it needs bubblewrap 0.7 or newer and the right to make "
                    "name spaces, which containers (without --privileged) and AppArmor may take away; "
                    "give it back or leave the code benchmarks out"
                )
            self._checked = True

    def run(self, program: str, stdin: str = "") -> Outcome:
        """Run `program` as a script and wait for it.

        Raises:
            ValueError: No isolation on this machine.
        """
        self.check()
        given = _file(stdin.encode("utf-8", "replace"))
        return self._watch([self._start(program, given, subprocess.PIPE)])[0]

    def pair(self, asking: str, answering: str) -> tuple[Outcome, Outcome]:
        """Run two programs in a sandbox each, the output of one joined to the input of the other; ends with `asking`.

        Each sees of the other only the bytes it sends. What they say to us is their standard error.

        Raises:
            ValueError: No isolation on this machine.
        """
        self.check()
        questions, ask = os.pipe()
        answers, answer = os.pipe()
        boxes: list[_Box] = []
        try:
            boxes.append(self._start(asking, answers, ask, asks=True))
            boxes.append(self._start(answering, questions, answer))
        except OSError:
            for box in boxes:
                box.end("killed")
            raise
        first, second = self._watch(boxes)
        return first, second

    def _start(self, program: str, stdin: int, stdout: int, asks: bool = False) -> _Box:
        """A sandbox with `program` in it; the two descriptors are closed on this side."""
        memory_mb = max(ASKING_MB, self.memory_mb) if asks else self.memory_mb
        seconds = max(1, round(self.seconds * (CLOCK if asks else 1)))
        files = [_file(program.encode("utf-8", "replace")), _file(system_call_filter(platform.machine()))]
        try:
            return _Box(self._command(files[0], files[1], memory_mb, seconds), stdin, stdout, files, memory_mb)
        finally:
            for file in [*files, stdin, *([stdout] if stdout >= 0 else [])]:
                os.close(file)

    def _command(self, program: int, calls: int, memory_mb: int, seconds: int) -> list[str]:
        """The command line: bubblewrap, in it the limits, in them (from root) another user, then Python."""
        python, mounts = _python()
        for name, source in _packages(self.packages):
            mounts += ["--ro-bind", str(source), f"/packages/{name}"]
        variables = {"PATH": "/usr/bin:/bin", "HOME": "/home", "LANG": "C.UTF-8", "PYTHONPATH": "/packages"}
        variables |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
        variables |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        variables["LD_LIBRARY_PATH"] = str(Path(python).parent.parent / "lib")  # there is no /etc/ld.so.cache
        command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        command += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"]
        for name, value in variables.items():
            command += ["--setenv", name, value]
        command += ["--dev", "/dev", "--remount-ro", "/dev"]
        for directory in ("/home", "/packages", "/run"):  # bubblewrap would make them for its own user only
            command += ["--perms", "0755", "--dir", directory]
        command += mounts
        command += ["--perms", "1777", "--size", str(TEMPORARY), "--tmpfs", "/tmp", "--chdir", "/tmp"]
        command += ["--perms", "0444", "--ro-bind-data", str(program), PROGRAM, "--remount-ro", "/"]
        command += ["--seccomp", str(calls), "--cap-drop", "ALL"]
        limits = [f"--as={memory_mb << 20}", f"--cpu={seconds}:{seconds + 1}", f"--nproc={self.processes}"]
        limits += [f"--fsize={FILE}", f"--nofile={OPEN_FILES}", "--core=0"]
        inside = ["prlimit", *limits, "--"]
        if os.geteuid() == 0:
            # A user name space made by root would keep root's number, for which the limit of processes does not hold.
            user = str(USERS + next(_users) % USERS_COUNT)
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            inside += ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=-all"]
        else:
            command += ["--unshare-user", "--uid", str(USERS), "--gid", str(USERS)]
        return [*command, "--", *inside, python, "-s", "-S", PROGRAM]

    def _watch(self, boxes: list[_Box]) -> list[Outcome]:
        """Wait for the first of them, within the limits; the others then have a moment to end by themselves."""
        deadline = time.monotonic() + self.seconds * CLOCK
        look = 0.0
        try:
            with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
                over = os.pidfd_open(boxes[0].process.pid)
                stack.callback(os.close, over)
                selector.register(over, selectors.EVENT_READ)
                for box in boxes:
                    for stream in box.output:
                        selector.register(stream, selectors.EVENT_READ, box)
                while boxes[0].process.poll() is None:
                    now = time.monotonic()
                    if now > deadline:
                        for box in boxes:
                            box.end("timeout")
                    elif now > look:
                        look = now + LOOK
                        for box in boxes:
                            box.weigh()
                    for key, _ in selector.select(min(LOOK, max(0.0, deadline - now))):
                        if key.data is not None and not key.data.read(key.fd):
                            selector.unregister(key.fileobj)
            for box in boxes[1:]:
                box.wait(GRACE)
        finally:
            for box in boxes:
                box.end("killed")
        return [box.outcome() for box in boxes]


class _Box:
    """A running sandbox: the process of bubblewrap, with which everything inside dies."""

    def __init__(self, command: list[str], stdin: int, stdout: int, files: list[int], memory_mb: int) -> None:
        self.memory_mb = memory_mb
        self.started = time.monotonic()
        self.ended: float | None = None
        self.stopped: Status | None = None
        self.process = subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, pass_fds=files, bufsize=0
        )
        self.output = {stream.fileno(): bytearray() for stream in (self.process.stdout, self.process.stderr) if stream}

    def read(self, stream: int) -> bool:
        """Take what is there; False at the end."""
        data = os.read(stream, 1 << 16)
        room = OUTPUT - len(self.output[stream])
        self.output[stream] += data[:room]
        if len(data) > room:
            self.end("killed")
        return bool(data)

    def weigh(self) -> None:
        """End it where its processes together take more memory than it may."""
        if self.process.poll() is None and _resident(self.process.pid) > self.memory_mb << 20:
            self.end("memory")

    def wait(self, seconds: float) -> None:
        """For its end, but not longer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def end(self, status: Status) -> None:
        """Kill it where it still runs, because of `status`."""
        if self.process.poll() is None:
            self.stopped = status
            self.process.kill()
            self.process.wait()
        self.ended = self.ended or time.monotonic()

    def outcome(self) -> Outcome:
        """Of a sandbox that has ended. Reads what is left in the pipes: nobody writes there any more."""
        for stream in self.output:
            while len(self.output[stream]) < OUTPUT and self.read(stream):
                pass
        names = [stream.fileno() if stream else -1 for stream in (self.process.stdout, self.process.stderr)]
        stdout, stderr = (self.output.get(name, bytearray()).decode("utf-8", "replace") for name in names)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        status = self.stopped or _status(self.process.returncode, stderr)
        return Outcome(status, stdout, stderr, (self.ended or time.monotonic()) - self.started)


def _status(code: int, stderr: str) -> Status:
    """Of an exit code as bubblewrap passes it on: 128 and the number of the signal, where there was one."""
    if code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return "timeout" if code == 128 + signal.SIGXCPU else "killed"
    if code and (stderr.strip().splitlines() or [""])[-1].startswith("MemoryError"):
        return "memory"
    return "crashed" if code else "ok"


def _file(content: bytes) -> int:
    """Descriptor of an unnamed file with this content, at its beginning."""
    file = os.memfd_create("tah")
    with os.fdopen(os.dup(file), "wb") as writing:
        writing.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _python() -> tuple[str, list[str]]:
    """Path of this Python (not of its virtual environment) in the sandbox, and the mounts it and the system need."""
    mounts = ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64")):
        if path.is_symlink():
            mounts += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            mounts += ["--ro-bind", str(path), str(path)]
    base = Path(sys.base_prefix).resolve()
    python = base / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if base.is_relative_to("/usr"):
        return str(python), mounts
    return f"/python/bin/{python.name}", [*mounts, "--ro-bind", str(base), "/python"]


def _packages(names: Sequence[str]) -> list[tuple[str, Path]]:
    """Directories of installed packages, and of the libraries that wheels put beside them."""
    found = []
    for name in names:
        spec = importlib.util.find_spec(name)
        for location in (spec.submodule_search_locations or []) if spec else []:
            directories = (Path(location), Path(location).with_name(f"{name}.libs"))
            found += [(path.name, path) for path in directories if path.is_dir()]
    return found


def _resident(pid: int) -> int:
    """Bytes of memory in use by a process and its descendants (pages they share count for each)."""
    total, pids = 0, [pid]
    while pids:
        process = Path(f"/proc/{pids.pop()}")
        try:
            total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            for task in (process / "task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # ended in between
            continue
    return total


def system_call_filter(machine: str) -> bytes:
    """The refusals above as a classic BPF program for `bwrap --seccomp`; `machine` as the kernel calls it."""
    column, architecture = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 calls of x86-64
    for numbers in REFUSED.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | errno.EPERM)]
    program += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, refuse | errno.ENOSYS)]  # libraries then use clone
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, NAMESPACES)]
    program += [(give, 0, 0, refuse | errno.EPERM), (give, 0, 0, allow)]
    program += [(equal, 0, len(FAMILIES) + 2, SOCKET[column]), (load, 0, 0, 16)]
    program += [(equal, len(FAMILIES) - at, 0, family) for at, family in enumerate(FAMILIES)]
    program += [(give, 0, 0, refuse | errno.EAFNOSUPPORT), (give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
