"""The `tah` command in several real processes, and in processes that fail.

    torchrun ... -m helpers.processes HOW PROCESS BATCHES ARGUMENTS

runs `tah ARGUMENTS`; process number PROCESS fails at the batch after its first BATCHES ones: HOW is `raise` (an error),
`kill` (SIGKILL), or `none`, which does not fail. The batches of traces have at most `TOKENS` tokens.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOKENS = 160


def torchrun(*command: Any, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a command in several processes: `-m MODULE ARGUMENTS`, or `--no-python PROGRAM ARGUMENTS`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *map(str, command)]
    return run(launch)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a program with this checkout's packages and without a network."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)


def lines_of_tah(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr that the command has printed, without torchrun's."""
    return [line for line in done.stderr.splitlines() if line.startswith("tah: ")]


def fail_in_batch(owner: Any, name: str, how: str, batches: int) -> None:
    """Replace a method of the batches by one that fails after some calls."""
    method, calls = getattr(owner, name), []

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > batches:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the disk is full")
        return method(self, *arguments, **options)

    setattr(owner, name, failing)


if __name__ == "__main__":
    how, process, batches, *arguments = sys.argv[1:]
    fails = how != "none" and os.environ.get("RANK", "0") == process
    if arguments[0] == "eval":
        from tah.evaluation.harness import TaHLM

        owner, method = TaHLM, "generate_batch"
    else:
        from tah.tracing import trace

        make_batches = trace.batches
        trace.batches = lambda lengths, tokens_per_batch: make_batches(lengths, TOKENS)
        owner, method = trace._Tracer, "trace"
    if fails:
        fail_in_batch(owner, method, how, int(batches))
    from tah_cli.app import main

    sys.argv = ["tah", *arguments]
    main()
