"""Runs untrusted Python programs in isolation: bubblewrap, an unprivileged user, a system-call filter.

A program in the sandbox has Python's standard library (and numpy, if installed), `/usr` read-only, a private `/tmp` of
64 MiB, an empty home, its own process, IPC and host name spaces, and a loopback network without other hosts.

It does not have the network, files of the machine or of its user (`/etc`, `/home`, `/root`, `/proc` and `/sys` do not
exist), the environment of this process, capabilities, or a way to get them.

Memory, processor time, processes, file size and open files are limited. The limits also hold if this process is root:
each program then runs under a user id of its own, so two sandboxes do not share a count of processes.

Remaining risks: the kernel is shared, so a vulnerability of the kernel is one of the sandbox. A program can slow down
the machine within its limits. Empty files in `/tmp` take kernel memory, up to the kernel's limit of files there.
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

# Wall-clock seconds per second of processor time. It ends a program that sleeps, but not one that waits for a core.
CLOCK = 3.0
TEMPORARY = 64 << 20  # size of /tmp in bytes
FILE = 16 << 20  # maximum size of a file in bytes
OUTPUT = 1 << 20  # maximum bytes on standard output, and on standard error
OPEN_FILES = 64
GRACE = 2.0  # seconds for the answering program of a pair to end after the asking program has ended
LOOK = 0.2  # seconds between two checks of the memory of a sandbox
ASKING_MB = 4096  # memory limit in MiB of the asking program of a pair, which may have many tests
USERS = 61184  # start of systemd's range of dynamic user ids, which own no files or processes
USERS_COUNT = 4000
_users = itertools.count(os.getpid() * 16)  # different starts, so that two processes rarely use the same id
PROGRAM = "/run/program.py"
INSTALL = "install it (apt-get install bubblewrap util-linux) or leave out the code benchmarks"
# Forbidden system calls, as (x86-64, AArch64): they make name spaces and mounts, read other processes, or use memory
# that no limit counts. For clone the filter checks the name space flags, for socket the address family.
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
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6; a network name space does not isolate others, such as AF_VSOCK
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


@dataclass(frozen=True)
class Outcome:
    """The result of a program.

    Args:
        status: `ok` (exit code 0), `timeout`, `memory`, `crashed` (another exit code or a signal), or `killed` (too
            much output, or SIGKILL from inside).
        stdout: Standard output, at most 1 MiB.
        stderr: Standard error, at most 1 MiB.
        seconds: Wall-clock time, with the start of the sandbox.
    """

    status: Status
    stdout: str
    stderr: str
    seconds: float


class Sandbox:
    """Runs Python programs in isolation. Several threads may use one object.

    Args:
        memory_mb: Maximum address space of each process, and maximum memory of all processes of a sandbox, in MiB.
        seconds: Maximum processor time of each process. A run ends after three times this wall-clock time.
        processes: Maximum number of processes and threads at a time.
        packages: Top-level packages of this environment that programs may import, if they are installed.

    Raises:
        ValueError: A limit is not positive.
    """

    def __init__(
        self, memory_mb: int = 1024, seconds: float = 15, processes: int = 16, packages: Sequence[str] = ("numpy",)
    ) -> None:
        for name, value in (("memory_mb", memory_mb), ("seconds", seconds), ("processes", processes)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be a positive number")
        self.memory_mb, self.seconds, self.processes, self.packages = memory_mb, seconds, processes, tuple(packages)
        self._lock = threading.Lock()
        self._checked = False

    def check(self) -> None:
        """Check once that the sandbox works on this machine.

        Raises:
            ValueError: It does not. The message names the missing part and a solution.
        """
        with self._lock:
            if self._checked:
                return
            if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
                where = f"{platform.system()} on {platform.machine()}"
                raise ValueError(f"the sandbox does not support {where}: grade code on Linux, x86_64 or aarch64")
            for program in ("bwrap", "prlimit", "setpriv"):
                if shutil.which(program) is None:
                    raise ValueError(f"programs of a model run only in a sandbox, which needs {program}: {INSTALL}")
            box = self._start("print(6 * 7)", _file(b""), subprocess.PIPE)
            outcome = self._watch([box])[0]
            if (outcome.status, outcome.stdout) != ("ok", "42\n"):
                message = (outcome.stderr.strip().splitlines() or [f"status {outcome.status}"])[-1]
                raise ValueError(
                    f"the sandbox does not start here ({message}): it needs bubblewrap 0.7 or newer and the right to "
                    "make name spaces, which containers (without --privileged) and AppArmor may deny; "
                    "allow it or leave out the code benchmarks"
                )
            self._checked = True

    def run(self, program: str, stdin: str = "") -> Outcome:
        """Run `program` as a script, and return its result.

        Raises:
            ValueError: The sandbox does not work on this machine.
        """
        self.check()
        given = _file(stdin.encode("utf-8", "replace"))
        return self._watch([self._start(program, given, subprocess.PIPE)])[0]

    def pair(self, asking: str, answering: str) -> tuple[Outcome, Outcome]:
        """Run two programs in separate sandboxes, and return their results when `asking` has ended.

        The standard output of each program is the standard input of the other. They share nothing else. Both report to
        this process on standard error.

        Raises:
            ValueError: The sandbox does not work on this machine.
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
        """Start a sandbox with `program`. The two file descriptors are closed in this process."""
        memory_mb = max(ASKING_MB, self.memory_mb) if asks else self.memory_mb
        seconds = max(1, round(self.seconds * (CLOCK if asks else 1)))
        files = [_file(program.encode("utf-8", "replace")), _file(system_call_filter(platform.machine()))]
        try:
            return _Box(self._command(files[0], files[1], memory_mb, seconds), stdin, stdout, files, memory_mb)
        finally:
            for file in [*files, stdin, *([stdout] if stdout >= 0 else [])]:
                os.close(file)

    def _command(self, program: int, calls: int, memory_mb: int, seconds: int) -> list[str]:
        """Return the command line: bubblewrap, then the limits, then (if this is root) another user, then Python."""
        python, mounts = _python()
        for name, source in _packages(self.packages):
            mounts += ["--ro-bind", str(source), f"/packages/{name}"]
        variables = {"PATH": "/usr/bin:/bin", "HOME": "/home", "LANG": "C.UTF-8", "PYTHONPATH": "/packages"}
        variables |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
        variables |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        variables["LD_LIBRARY_PATH"] = str(Path(python).parent.parent / "lib")  # the sandbox has no /etc/ld.so.cache
        command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        command += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"]
        for name, value in variables.items():
            command += ["--setenv", name, value]
        command += ["--dev", "/dev", "--remount-ro", "/dev"]
        for directory in ("/home", "/packages", "/run"):  # by default only bubblewrap's user could read them
            command += ["--perms", "0755", "--dir", directory]
        command += mounts
        command += ["--perms", "1777", "--size", str(TEMPORARY), "--tmpfs", "/tmp", "--chdir", "/tmp"]
        command += ["--perms", "0444", "--ro-bind-data", str(program), PROGRAM, "--remount-ro", "/"]
        command += ["--seccomp", str(calls), "--cap-drop", "ALL"]
        limits = [f"--as={memory_mb << 20}", f"--cpu={seconds}:{seconds + 1}", f"--nproc={self.processes}"]
        limits += [f"--fsize={FILE}", f"--nofile={OPEN_FILES}", "--core=0"]
        inside = ["prlimit", *limits, "--"]
        if os.geteuid() == 0:
            # In a user name space made by root, the user would keep root's id, which has no limit of processes.
            user = str(USERS + next(_users) % USERS_COUNT)
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            inside += ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--inh-caps=-all"]
        else:
            command += ["--unshare-user", "--uid", str(USERS), "--gid", str(USERS)]
        return [*command, "--", *inside, python, "-s", "-S", PROGRAM]

    def _watch(self, boxes: list[_Box]) -> list[Outcome]:
        """Wait for the first box within the limits, then at most `GRACE` seconds for each other one."""
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
    """A running sandbox. The end of the bubblewrap process ends all processes inside."""

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
        """Read available output of a stream, and return False at its end."""
        data = os.read(stream, 1 << 16)
        room = OUTPUT - len(self.output[stream])
        self.output[stream] += data[:room]
        if len(data) > room:
            self.end("killed")
        return bool(data)

    def weigh(self) -> None:
        """End the sandbox if its processes together use more memory than allowed."""
        if self.process.poll() is None and _resident(self.process.pid) > self.memory_mb << 20:
            self.end("memory")

    def wait(self, seconds: float) -> None:
        """Wait for the end of the sandbox, at most this time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def end(self, status: Status) -> None:
        """Kill the sandbox if it still runs, and record `status` as the reason."""
        if self.process.poll() is None:
            self.stopped = status
            self.process.kill()
            self.process.wait()
        self.ended = self.ended or time.monotonic()

    def outcome(self) -> Outcome:
        """Return the result of a sandbox that has ended, after reading the rest of its output."""
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
    """Return the status of an exit code of bubblewrap, which is 128 + the number of a signal if there was one."""
    if code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return "timeout" if code == 128 + signal.SIGXCPU else "killed"
    if code and (stderr.strip().splitlines() or [""])[-1].startswith("MemoryError"):
        return "memory"
    return "crashed" if code else "ok"


def _file(content: bytes) -> int:
    """Return the descriptor of an unnamed file with this content, positioned at its beginning."""
    file = os.memfd_create("tah")
    with os.fdopen(os.dup(file), "wb") as writing:
        writing.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _python() -> tuple[str, list[str]]:
    """Return the path of this Python in the sandbox (without its virtual environment), and the mounts that it needs."""
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
    """Return the directories of installed packages, and of the `.libs` directories of their wheels."""
    found = []
    for name in names:
        spec = importlib.util.find_spec(name)
        for location in (spec.submodule_search_locations or []) if spec else []:
            directories = (Path(location), Path(location).with_name(f"{name}.libs"))
            found += [(path.name, path) for path in directories if path.is_dir()]
    return found


def _resident(pid: int) -> int:
    """Return the resident memory of a process and its descendants in bytes. Shared pages count several times."""
    total, pids = 0, [pid]
    while pids:
        process = Path(f"/proc/{pids.pop()}")
        try:
            total += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            for task in (process / "task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # the process has ended
            continue
    return total


def system_call_filter(machine: str) -> bytes:
    """Return the filter of forbidden system calls as a classic BPF program for `bwrap --seccomp`.

    Args:
        machine: The kernel's name of the architecture, a key of `ARCHITECTURES`.
    """
    column, architecture = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 calls of x86-64
    for numbers in REFUSED.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | errno.EPERM)]
    program += [
        (equal, 0, 1, CLONE3[column]),
        (give, 0, 0, refuse | errno.ENOSYS),
    ]  # with ENOSYS, libraries use clone instead
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, NAMESPACES)]
    program += [(give, 0, 0, refuse | errno.EPERM), (give, 0, 0, allow)]
    program += [(equal, 0, len(FAMILIES) + 2, SOCKET[column]), (load, 0, 0, 16)]
    program += [(equal, len(FAMILIES) - at, 0, family) for at, family in enumerate(FAMILIES)]
    program += [(give, 0, 0, refuse | errno.EAFNOSUPPORT), (give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
