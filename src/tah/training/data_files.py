"""Whether a file of data can be read, before a parser gets it, and which line is to blame where it cannot.

The parsers behind `datasets` crash at deeply nested brackets, say nothing of the line where bytes are no UTF-8, and
make two rows of a line that ends in a comma too many.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..files import parse_json
from ..nesting import TOO_DEEP, Nesting

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SPACE = re.compile(r"\s*")
FIRST = 2**26  # bytes of a file that decide about its columns and their types
NULL = b"null"
# A content that is no text, and no number either, whose digits are its text.
NO_TEXT = re.compile(rb'(?<!\\)"(?:content|value)"\s*:\s*[\[{tf]')
CHUNK, SMALL = 2**22, 2**26  # bytes
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TEXTS = (".jsonl", ".json", ".csv")  # in UTF-8; .parquet is not


def check_text(path: Path) -> int:
    """Whether a .jsonl, .json or .csv file is UTF-8 and has nothing that a parser crashes at.

    Returns:
        How many lines of it hold something.

    Raises:
        ValueError: it is not, or has; names the line.
        OSError: it cannot be read.
    """
    kind = _kind(path)
    decoder, nesting, lines = codecs.getincrementaldecoder("utf-8")(), Nesting(), Lines()
    line, is_list = 1, False
    with _opened(path) as file:
        while chunk := file.read(CHUNK):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise ValueError(f"line {line} is not UTF-8") from None
            chunk = chunk.removeprefix(codecs.BOM_UTF8) if not lines.begun else chunk
            is_list = chunk.startswith(b"[") if not lines.begun else is_list
            null = lines.add(chunk)
            if kind != ".csv":
                if (deep := nesting.add(chunk)) is not None:
                    raise ValueError(f"line {deep} {TOO_DEEP}")
                if null is not None and not is_list:
                    raise ValueError(f"line {null} is null, not an object")
            line += chunk.count(b"\n")
    if decoder.getstate()[0]:
        raise ValueError(f"line {line} is not UTF-8")
    if is_list and kind != ".csv":
        _check_list(path)
    return lines.filled


class Lines:
    """Lines of a text that arrives in chunks: how many hold something, and which begins with null.

    pyarrow crashes where what it parses begins with null, and it may begin to parse at any line.
    """

    def __init__(self) -> None:
        self.begun, self._filled, self._breaks, self._head = False, 0, 0, b""

    @property
    def filled(self) -> int:
        return self._filled + bool(self._head)

    def add(self, chunk: bytes) -> int | None:
        """The line, counted from 1, that begins with null, if there is one."""
        self.begun, at = True, 0
        for number, text in enumerate(chunk.replace(b"\r", b"\n").split(b"\n")):
            if number:
                self._filled += bool(self._head)
                self._head = b""
            if len(self._head) < len(NULL):
                self._head = (self._head + (text if self._head else text.lstrip()))[: len(NULL)]
            if self._head == NULL:
                return 1 + self._breaks + chunk[:at].count(b"\n")
            at += len(text) + 1
        self._breaks += chunk.count(b"\n")
        return None


def _check_list(path: Path) -> None:
    """Whether a file with one list has objects in it, or texts; `datasets` gives them to pyarrow a line each."""
    with _opened(path) as file:
        raw = file.read()
    try:
        entries = json.loads(raw.decode("utf-8-sig"))
    except ValueError:
        return  # the parser says what is wrong, or it is a file of several lists
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict | str):
            raise ValueError(f"entry {number} of its list is {json.dumps(entry)[:40]}, not an object")


def bad_line(path: Path) -> str | None:
    """Which line of a .jsonl file cannot be read, and why; None where all can, or it is no such file."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                parse_json(text.strip() or b"0")
            except ValueError as error:
                return f"line {number} {error}"
    return None


def check_values(path: Path) -> None:
    """Whether a .jsonl file holds JSON values and nothing else; they may take several lines, or share one.

    Raises:
        ValueError: it does not; names the first line that is not JSON.
    """
    if path.suffix == ".jsonl" and (why := bad_line(path)) and not _is_sequence(path.read_text("utf-8-sig")):
        raise ValueError(why)


def _is_sequence(text: str) -> bool:
    """Whether a text consists of JSON values with nothing but white space in between."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            _, at = decoder.raw_decode(text, at)
        except ValueError:
            return False
        at += len(SPACE.match(text, at)[0])  # type: ignore[index]  # it matches nothing, too
    return True


def check_late(path: Path, first: int) -> None:
    """Whether contents are texts after the first bytes of a file, where `datasets` has found texts alone in those.

    Of what comes later it makes JSON, which would be learnt as if it were said.

    Raises:
        ValueError: one is not; names the line.
    """
    at = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if at >= first and NO_TEXT.search(line):
                raise ValueError(f"line {number} has a content that is no text, unlike what comes first; move it there")
            at += len(line)


def text_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files that `datasets` reads as text, with their names in the directory."""
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        if _kind(path) in TEXTS and path.is_file() and not any(part.startswith(".") for part in inside.parts):
            yield str(inside), path


def check_directory(directory: Path, late: bool = False) -> None:
    """The same for all files of a directory.

    Args:
        late: whether to do what `check_late` does, and not what comes before reading: `check_text` and, of small files,
            `check_values`.

    Raises:
        ValueError: one of them does not pass; names file and line.
    """
    for name, path in text_files(directory):
        try:
            if late:
                check_late(path, 0)
                continue
            check_text(path)
            if path.stat().st_size < SMALL:
                check_values(path)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None


def _kind(path: Path) -> str:
    """The suffix of a file, packed or not."""
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix


def _opened(path: Path) -> Any:
    return PACKED.get(path.suffix, open)(path, "rb")
