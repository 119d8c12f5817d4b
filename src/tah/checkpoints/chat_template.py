"""Whether a chat template can be used: it is tried on a short conversation, in a process of limited time and memory.

A template is a program. Jinja's sandbox keeps it from the machine, but not from running for ever or filling the memory,
and a single step such as `9 ** 9 ** 9` cannot be stopped from inside. So the template is first rendered in a process of
its own, whose seconds and bytes the system counts. Later renderings, of other conversations, are not bounded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("chat_template_probe.py")
PATIENCE = 120  # seconds of the clock, where the system counts none; the probe itself has 3 of the processor
UNREADABLE = "cannot be read: "  # begins the probe's message about a template that is no program
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Untried(Exception):
    """A template could not be tried, for a reason that is not the template's."""


def check_template(tokenizer: Any, source: str, readable: bool = True) -> None:
    """Refuse a tokenizer whose chat template is blocked by the sandbox, or does not come to an end.

    Args:
        tokenizer: one of transformers.
        source: where it is from, for the message.
        readable: also refuse a template that jinja cannot read. Such a template does no harm until it is rendered,
            which raises an error then.

    Raises:
        ValueError: the template cannot be used, or could not be tried.
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
    """Why the template cannot be used; empty where it can. Raises `Untried`, which is not kept for the next time."""
    places = [place for place in sys.path if place]  # where this process finds its packages, but for its directory
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
