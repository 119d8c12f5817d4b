"""Write files atomically, compare mappings, and parse JSON after a check of its nesting depth.

pyarrow's parser ends in a segmentation fault at 20,000 brackets, and Python's raises RecursionError at some thousand.
The check takes linear time and reads a file in chunks. Brackets inside strings do not count.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .errors import short

DEEPEST = 60  # brackets; Arrow stores 64 levels at most, and the tool schemas of public data sets have about 20
TOO_DEEP = f"has brackets more than {DEEPEST} deep inside each other"
OTHERS = bytes(byte for byte in range(256) if byte not in b'"[]{}\n')


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically, and create its directory if it is missing.

    After a crash or a power failure the file has either its old or its new content.

    Args:
        path: Path of the file. An existing file is replaced, and its permissions are kept.
        content: Bytes, or text that is written as UTF-8.

    Raises:
        OSError: The file cannot be written; the message names the file and the reason.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would replace a device
        raise OSError(f"{path} cannot be written: it is not a file")
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


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `target` at the end of the block, or removed after an error.

    Args:
        target: Path of the final directory, which must be empty or missing at the end of the block.

    Raises:
        OSError: `target` is not empty.
    """
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    work.mkdir(parents=True)
    try:
        yield work
        if target.exists():
            target.rmdir()
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def parse_json(line: str | bytes) -> Any:
    """Return the value of a line of a JSONL file, or of another JSON text.

    Args:
        line: Text, or bytes in UTF-8.

    Raises:
        ValueError: The line is not JSON, contains half of a surrogate pair, or is nested too deep. The message is meant
            to follow a subject such as `line 3`.
    """
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
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError("has a number that is too long to be read") from error
    return found


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], without: Sequence[str] = (), now: str = "now"
) -> str:
    """Return the first three differing entries of nested mappings with both values; empty if there are none.

    Args:
        before: First mapping.
        after: Second mapping.
        without: Top-level entries to ignore.
        now: Word before the second value.
    """
    found: list[str] = []

    def walk(a: Any, b: Any, at: str) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in [*a, *(key for key in b if key not in a)]:
                if at or key not in without:
                    walk(a.get(key), b.get(key), f"{at}.{key}" if at else key)
        elif a != b:
            found.append(f"{at}={short(a)} ({now} {short(b)})")

    walk(before, after, "")
    return ", ".join(found[:3])


class Nesting:
    """Measure the nesting depth of a text that arrives in chunks.

    A string ends no later than its line, since JSON strings contain no line breaks. Parsers may start again at any
    line, so a quotation mark that is never closed must not hide the brackets after it. For the same reason a closing
    bracket without an opening one leaves the depth at 0.
    """

    def __init__(self) -> None:
        self._depth, self._in_string, self._line, self._kept = 0, 0, 1, b""

    def add(self, chunk: bytes) -> int | None:
        """Add a chunk and return the line, counted from 1, where the depth first exceeds `DEEPEST`; None if nowhere."""
        chunk = self._kept + chunk
        backslashes = len(chunk) - len(chunk.rstrip(b"\\"))
        self._kept = b"\\" if backslashes % 2 else b""  # it may escape the first character of the next chunk
        chunk = chunk[: len(chunk) - len(self._kept)]
        unescaped = chunk.replace(rb"\\", b"").replace(rb"\"", b"")  # a run of backslashes, in pairs from its start
        kept = np.frombuffer(unescaped.translate(None, OTHERS), np.uint8)
        if not len(kept):
            return None
        quotes, breaks = self._in_string + np.cumsum(kept == ord('"')), kept == ord("\n")
        inside = (quotes - np.maximum.accumulate(np.where(breaks, quotes, 0))) % 2
        opens = ((kept == ord("[")) | (kept == ord("{"))) & (inside == 0)
        closes = ((kept == ord("]")) | (kept == ord("}"))) & (inside == 0)
        sums = self._depth + np.cumsum(opens.astype(np.int64) - closes)
        depths = sums - np.minimum(np.minimum.accumulate(sums), 0)
        self._depth, self._in_string = int(depths[-1]), int(inside[-1])
        if depths.max() > DEEPEST:
            return self._line + int(breaks[: int((depths > DEEPEST).argmax())].sum())
        self._line += int(breaks.sum())
        return None


def too_deep(text: str | bytes) -> bool:
    """Return whether a whole text nests its brackets deeper than `DEEPEST`."""
    text = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    return text.count(b"[") + text.count(b"{") > DEEPEST and Nesting().add(text) is not None
