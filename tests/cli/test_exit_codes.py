"""Exit codes: whose fault an error is, a reader that went away, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commands import said, start_command
from tah.session import Session

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("plain")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("no such thing"), 2, ["no such thing"]),
        (OSError(28, "No space left on device", "out"), 2, ["No space left on device", "out"]),
        (ImportError("pip install it"), 2, ["pip install it"]),
        (MemoryError("4 GB"), 2, ["out of memory", "smaller batch"]),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, ["out of memory", "--device"]),
        (ValueError("a\nb\n\n  c"), 2, ["a b c"]),
        (ValueError("x" * 12_000), 2, ["xxx", "(--debug prints the whole message)"]),
        (ValueError("\x1b[2Jgone\u202e"), 2, ["\\x1b[2Jgone\\u202e"]),
        (ValueError("caf\udce9"), 2, ["caf\\udce9"]),
        (ValueError(""), 2, ["ValueError"]),
        (KeyError("x"), 1, ["unexpected KeyError: 'x'", "(--debug prints the traceback)"]),
        (IndexError("index out of range in self"), 1, ["unexpected IndexError", "(--debug prints the traceback)"]),
        (TypeError("y" * 12_000), 1, ["unexpected TypeError: yyy", "(--debug prints the traceback)"]),
        (RuntimeError("shape\nmismatch"), 1, ["unexpected RuntimeError: shape mismatch"]),
        (RecursionError("maximum recursion depth exceeded"), 1, ["unexpected RecursionError"]),
        (AssertionError(), 1, ["unexpected AssertionError", "(--debug prints the traceback)"]),
        (KeyboardInterrupt(), 130, []),
        (BrokenPipeError(32, "Broken pipe"), 141, []),
    ],
)
def test_whose_fault_it_is(capsys, monkeypatch, tmp_path, tiny_checkpoint, error, code, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Session, "answer", fail)
    got, out, err = said(capsys, "generate", tiny_checkpoint, "hi")
    assert got == code and out == "" and err.count("\n") == bool(words) and len(err) <= 608
    assert all(word in err for word in words) and "Traceback" not in err and "\x1b" not in err
    if words:
        assert err.startswith("tah: ")
        for place in (0, 3):
            arguments = ["generate", str(tiny_checkpoint), "hi"]
            arguments.insert(place, "--debug")
            got, _, err = said(capsys, *arguments)
            assert got == code and err.startswith("Traceback") and "in fail" in err


def test_debug_after_two_dashes_is_a_prompt(capsys, tiny_checkpoint):
    code, out, _ = said(capsys, "generate", tiny_checkpoint, "--json", "--max-new-tokens", 2, "--", "--debug")
    assert code == 0 and json.loads(out)["prompt"] == "--debug"


@pytest.mark.parametrize("closed", ["stdout", "both"])
@pytest.mark.parametrize("words", [("inspect", "{}"), ("generate", "{}", "hi", "--policy", "always"), ("--help",)])
def test_a_reader_that_went_away_is_no_error(tiny_checkpoint, words, closed):
    """As in `tah ... | head -0`, and with stderr in the same pipe."""
    read, write = os.pipe()
    os.close(read)
    words = [word.format(tiny_checkpoint) for word in words]
    command = [sys.executable, "-m", "tah_cli", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    stderr = write if closed == "both" else subprocess.PIPE
    done = subprocess.run(command, env=env, stdout=write, stderr=stderr, check=False)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


def test_ctrl_c_ends_a_command_quietly(tiny_checkpoint):
    # Where the tests run in the background of a shell, they and their children ignore Ctrl-C unless told otherwise.
    heed: Any = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = start_command("chat", tiny_checkpoint, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **heed)
    while "/help" not in process.stdout.readline():  # it is there and waits for a line
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
