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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import parse_json
from ..nesting import TOO_DEEP, Nesting

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SPACE = re.compile(r"\s*")
CHUNK, SMALL = 2**22, 2**26  # bytes
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TEXTS = (".jsonl", ".json", ".csv")  # in UTF-8; .parquet is not


def check_text(path: Path) -> int:
    """Whether a .jsonl, .json or .csv file is UTF-8 and nests no deeper than a parser can go.

    Returns:
        How many lines of it hold something.

    Raises:
        ValueError: it is not, or does; names the line.
        OSError: it cannot be read.
    """
    decoder, nesting = codecs.getincrementaldecoder("utf-8")(), Nesting()
    line, filled, begun = 1, 0, False
    with PACKED.get(path.suffix, open)(path, "rb") as file:
        while chunk := file.read(CHUNK):
            if ".csv" not in path.suffixes and (deep := nesting.add(chunk)) is not None:
                raise ValueError(f"line {deep} {TOO_DEEP}")
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise ValueError(f"line {line} is not UTF-8") from None
            line += chunk.count(b"\n")
            for at, text in enumerate(chunk.split(b"\n")):
                filled, begun = (filled + begun, False) if at else (filled, begun)
                begun = begun or bool(text.strip())
    if decoder.getstate()[0]:
        raise ValueError(f"line {line} is not UTF-8: it ends within a character")
    return filled + begun


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


def check_directory(directory: Path) -> None:
    """`check_text` and, where they are small, `check_values` of the files that `datasets` reads as text.

    Raises:
        ValueError: one of them does not pass; names file and line.
    """
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        name = path.with_suffix("") if path.suffix in PACKED else path
        if name.suffix not in TEXTS or not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        try:
            check_text(path)
            if path.stat().st_size < SMALL:
                check_values(path)
        except ValueError as error:
            raise ValueError(f"{inside} {error}") from None
