"""The command line as a user sees it: exit codes, output, and the one line of an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tah_cli.app import run

ROOT = Path(__file__).parents[2]


def said(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def one_line(capsys, *arguments) -> str:
    """The one line of a command that the user can put right."""
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("tah: ") and err.count("\n") == 1 and len(err) <= 608 and "tah: unexpected" not in err
    return err


def start_command(*arguments, **options) -> subprocess.Popen:
    """The installed command."""
    command = [sys.executable, "-m", "tah_cli", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE, **options)


def questions(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"question": text, "answer": "4"}) + "\n" for text in texts))
    return f"gsm8k={path}"
