"""Files that runs leave: written whole or not at all, and compared with what another run would leave.

Imports nothing of torch, so that `tah report` stays quick.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file, and its directory if need be. A reader, a crash or a power cut sees all of it or what was before.

    Args:
        path: of the file; an older one is replaced and keeps its permissions.
        content: text is written as UTF-8.

    Raises:
        OSError: it cannot be written; names it, and why.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(new, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                os.chmod(new, path.stat().st_mode & 0o7777)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def parse_json(line: str | bytes) -> Any:
    """A line of a JSONL file, or another value in JSON.

    Args:
        line: text, or bytes in UTF-8.

    Raises:
        ValueError: it is none, holds what is no text, or nests too deep; why, to be put after `line 3`.
    """
    from .safe.nesting import TOO_DEEP, too_deep  # needs numpy, which takes longer to import than this whole module

    if too_deep(line):
        raise ValueError(TOO_DEEP)
    try:
        found = json.loads(line if isinstance(line, str) else line.decode())
        json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"has half of a surrogate pair, {half!a}, which is no text; remove it") from error
    except ValueError as error:  # of thousands of digits
        raise ValueError("has a number that is too long to be read") from error
    return found


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], without: Sequence[str] = (), now: str = "now"
) -> str:
    """The first three entries of nested mappings that differ, with both values; empty where none does.

    Args:
        without: entries at the top that do not matter.
        now: what the second value is called.
    """
    found: list[str] = []

    def walk(a: Any, b: Any, at: str) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in [*a, *(key for key in b if key not in a)]:
                if at or key not in without:
                    walk(a.get(key), b.get(key), f"{at}.{key}" if at else key)
        elif a != b:
            found.append(f"{at}={_short(a)} ({now} {_short(b)})")

    walk(before, after, "")
    return ", ".join(found[:3])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
