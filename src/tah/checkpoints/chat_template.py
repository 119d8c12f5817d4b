"""Check a chat template: render it for a short conversation in a process with limited time and memory.

A template is a program. Jinja's sandbox blocks access to the machine, but not endless loops or unlimited memory. A
single step such as `9 ** 9 ** 9` cannot be stopped from inside the process. So the template is first rendered in a
process of its own, whose time and memory the system limits. Later renderings of other conversations have no limits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("chat_template_probe.py")
PATIENCE = 120  # seconds of wall time, for systems without limits; the probe limits itself to 3 seconds of CPU time
UNREADABLE = "cannot be read: "  # prefix of the probe's message about a template that jinja cannot parse
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Untried(Exception):
    """The probe failed for a reason outside the template."""


def check_template(tokenizer: Any, source: str, readable: bool = True) -> None:
    """Check that the sandbox permits the chat templates of a tokenizer and that they render within the limits.

    Args:
        tokenizer: Tokenizer of transformers.
        source: Name of the tokenizer in messages.
        readable: Whether a template that jinja cannot parse is an error. Such a template is harmless until it is
            rendered, which then raises an error.

    Raises:
        ValueError: A template cannot be used, or could not be tried.
    """
    template = getattr(tokenizer, "chat_template", None)
    templates = template if isinstance(template, dict) else {"": template}
    words = {name: str(getattr(tokenizer, name, None) or "") for name in NAMES}
    for name, text in templates.items():
        if not isinstance(text, str):
            continue
        its = f"{source}: the chat template{f' {name!r}' if name else ''}"
        try:
            reason = template_fault(text, tuple(words.items()))
        except Untried as error:
            raise ValueError(f"{its} could not be tried: {error}") from error
        if reason and (readable or not reason.startswith(UNREADABLE)):
            raise ValueError(f"{its} {reason}")


@lru_cache(maxsize=64)
def template_fault(template: str, words: tuple[tuple[str, str], ...]) -> str:
    """Return the reason why a template cannot be used; empty if it can.

    Args:
        template: Text of the template.
        words: Names and texts of the special tokens.

    Raises:
        Untried: The probe failed. The cache of this function does not keep this result.
    """
    places = [place for place in sys.path if place]  # the package paths of this process, without its current directory
    asked = json.dumps({"template": template, "words": dict(words), "places": places})
    command = [sys.executable, "-I", str(PROBE)]
    try:
        done = subprocess.run(command, input=asked.encode(), capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return "does not come to an end; remove it, or use another"
    except OSError as error:
        raise Untried(f"Python cannot be started as {sys.executable!r} ({error.strerror})") from error
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if lines and lines[-1].startswith("fault: "):
        return lines[-1].removeprefix("fault: ")
    if lines and lines[-1] == "fine":
        return ""
    if done.returncode < 0:  # killed by the system
        return "takes more time or memory than a template may; remove it, or use another"
    errors = [line.strip() for line in done.stderr.decode("utf-8", "replace").split("\n") if line.strip()]
    last = errors[-1] if errors else "without a message"
    raise Untried(f"the process that renders it ended with code {done.returncode} ({last[:200]})")
