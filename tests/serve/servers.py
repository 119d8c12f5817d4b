"""The real server, `tah serve`, as a process of its own."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
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


@contextmanager
def running(model: Path, log: Path, **options: Any) -> Iterator[Server]:
    """A server of `model`, in float32, that answers; ended with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"dtype": "float32", "gpu_memory_utilization": 0.05, "served_model_name": "tiny", **options}
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    command = [sys.executable, "-m", "tah_cli", "serve", str(model), "--enforce-eager", *flags]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        where = ["--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen([*command, *where], env=environment, stdout=out, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        server.wait()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
