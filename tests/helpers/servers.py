"""The real server, `tah serve`, as a process of its own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

START = 600  # seconds that a start may take on a busy machine; half a minute on an idle one


@dataclass
class Server:
    url: str
    process: subprocess.Popen
    log: Path

    def health(self) -> int | None:
        """Status of `GET /health`; None where nobody listens."""
        try:
            return urlopen(f"{self.url}/health", timeout=5).status
        except HTTPError as error:
            return error.code
        except (URLError, OSError):
            return None

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START
        while self.health() != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(1)

    def metrics(self) -> dict[str, float]:
        """Numbers of `GET /metrics` by name, labels other than `depth` left out."""
        found = {}
        for line in urlopen(f"{self.url}/metrics", timeout=5).read().decode().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                depth = re.search(r'depth="\d+"', name)
                found[name.partition("{")[0] + (f"{{{depth[0]}}}" if depth else "")] = float(value)
        return found

    def engine(self) -> int:
        """Process id of the engine, a child of the server named by vLLM."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        named = (child for child in children if "EngineCore" in Path(f"/proc/{child}/cmdline").read_text())
        return int(next(named))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def started(
    command: Sequence[str], log: Path, environment: dict[str, str], **options: Any
) -> Iterator[subprocess.Popen]:
    """`command` with flags for a small server in float32, but those that are None; ended with the context."""
    usual = {"dtype": "float32", "gpu_memory_utilization": 0.05, "served_model_name": "tiny", "enforce_eager": True}
    flags: list[str] = []
    for name, value in (usual | options).items():
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | environment
    with log.open("w") as out:
        process = subprocess.Popen([*command, *flags], env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


TAH = [sys.executable, "-m", "tah_cli"]


@contextmanager
def running(
    model: Path,
    log: Path,
    command: Sequence[str] = (*TAH, "serve"),
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """A server of `model` that answers."""
    options |= {"host": "127.0.0.1", "port": free_port()}
    with started([*command, str(model)], log, environment or {}, **options) as process:
        server = Server(f"http://127.0.0.1:{options['port']}", process, log)
        server.wait()
        yield server
