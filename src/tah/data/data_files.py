"""Whether a file of data can be read, before a parser gets it, and which line is to blame where it cannot.

The parsers behind `datasets` crash at deeply nested brackets, say nothing of the line where bytes are no UTF-8, and
make two rows of a line that ends in a comma too many.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import TOO_DEEP, Nesting, parse_json
from .chat_rows import LARGEST, REASONING

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SPACE = re.compile(r"\s*")
FIRST = 2**26  # bytes of a file that decide about its columns and their types
NULL = b"null"
TEXT_COLUMNS = ("text", "prompt", "completion", "system")  # may hold a text in each row
TURN_COLUMNS = ("messages", "conversations", "prompt", "completion")  # may hold messages
TURN_KEYS = ("content", "value", *REASONING)  # keys of a message that hold texts
CHUNK, SMALL = 2**22, 2**26  # bytes
MOST_PACKED = 100  # times its size a packed file may unpack to, if that is more than SMALL; packed text has about 10
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
    line, is_list, size = 1, False, 0
    most = max(SMALL, MOST_PACKED * path.stat().st_size) if path.suffix in PACKED else None
    with _opened(path) as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            if most is not None and size > most:
                raise ValueError(f"unpacks to more than {most} bytes, {MOST_PACKED} times its size; unpack it yourself")
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
    for place, entry in _values(path):
        if not isinstance(entry, dict | str):
            raise ValueError(f"{place} is {json.dumps(entry)[:40]}, not an object")


def _whole(digits: str) -> int:
    """An integer in JSON. Python refuses thousands of digits; from these on it only matters that there are many."""
    return int(digits[:40])


DECODER = json.JSONDecoder(parse_int=_whole)


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Where the JSON values of a file stand, and the values: of a list its entries, which are read one by one.

    It ends before what is no JSON, of which the parser says what is wrong.
    """
    text, at, line, counted, entry, inside, size = "", 0, 1, 0, 0, False, CHUNK
    with _opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig") as file:
        while True:
            at = SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if text[at : at + 1] in ("]", ",") if inside else text[at : at + 1] == "[":
                inside, at = text[at] != "]", at + 1
                continue
            try:
                value, stop = DECODER.raw_decode(text, at)
            except ValueError:
                value, stop = None, len(text)
            # It may go on, as "1e+" does. Every time twice as much is read, or a long one would take for ever.
            if stop > len(text) - 4:
                line, text, at, counted = line + text.count("\n", counted, at), text[at:], 0, 0
                if more := file.read(size):
                    text, size = text + more, 2 * size
                    continue
                try:
                    value, stop = DECODER.raw_decode(text, at)
                except ValueError:
                    return
            line, counted, entry, size = line + text.count("\n", counted, at), at, entry + inside, CHUNK
            yield f"entry {entry} of its list" if inside else f"line {line}", value
            at = stop


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


def text_columns(features: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[frozenset[str], frozenset[str]]:
    """The columns in which `datasets` has found texts alone, and those in which it has found messages with texts alone.

    Args:
        features: of the rows, as they are in the source.
        columns: names of ours -> names in the source.
    """
    texts, turns = set(), set()
    for name in {*TEXT_COLUMNS, *TURN_COLUMNS}:
        name = columns.get(name, name)
        feature = features.get(name)
        entry = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
        if _of_text(feature):
            texts.add(name)
        elif isinstance(entry, dict) and any(_of_text(entry.get(key)) for key in TURN_KEYS):
            turns.add(name)
    return frozenset(texts), frozenset(turns)


def _of_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def check_late(path: Path, texts: Iterable[str], turns: Iterable[str], first: int = 0) -> None:
    """Whether texts are texts after the first bytes of a file, where `datasets` has found texts alone in those.

    Of what comes later it makes JSON, which would be learnt as if it were said.

    Args:
        path: of the file.
        texts: names of columns that hold texts.
        turns: names of columns that hold messages.
        first: how many bytes need no check.

    Raises:
        ValueError: one is not; names the line.
    """
    texts, turns = list(texts), list(turns)
    if _kind(path) not in (".jsonl", ".json") or not texts + turns:
        return
    for place, row in _late_values(path, [*texts, *(TURN_KEYS if turns else ())], first):
        if not isinstance(row, dict):
            continue
        held = [row.get(name) for name in texts]
        for name in turns:
            messages = row.get(name)
            said = messages if isinstance(messages, list) else []
            held += [each.get(key) for each in said if isinstance(each, dict) for key in TURN_KEYS]
        if not all(each is None or _is_text(each) for each in held):
            raise ValueError(f"{place} has a content that is no text, unlike what comes first; move it there")


def _is_text(value: Any) -> bool:
    """Whether JSON writes a value as we do: it is a text, or an integer, whose digits are its text."""
    return isinstance(value, str) or (type(value) is int and abs(value) < LARGEST)


def _late_values(path: Path, keys: Iterable[str], first: int) -> Iterator[tuple[str, Any]]:
    """Those values of a file that may have something else than a text at one of these keys, and where they stand.

    Most lines are not decoded: a search tells that at these keys they have texts only, at whatever depth. A key may
    also be spelled with escapes.
    """
    names = b"|".join(re.escape(json.dumps(key)[1:-1].encode()) for key in keys)
    maybe = re.compile(rb'"(?:' + names + rb')"\s*(?:\Z|:\s*(?:\Z|[^"n\s]))|\\u00[5-7]')
    at = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.lstrip().startswith(b"["):  # it holds lists
                break
            if at >= first and maybe.search(line):
                try:
                    yield f"line {number}", DECODER.decode(line.decode())
                except ValueError:  # its values take several lines
                    break
            at += len(line)
        else:
            return
    yield from _values(path)


def text_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files that `datasets` reads as text, with their names in the directory."""
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        if _kind(path) in TEXTS and path.is_file() and not any(part.startswith(".") for part in inside.parts):
            yield str(inside), path


def check_directory(directory: Path) -> None:
    """Whether all files of a directory pass `check_text` and, where they are small, `check_values`.

    Raises:
        ValueError: one of them does not pass; names file and line.
    """
    for name, path in text_files(directory):
        try:
            check_text(path)
            if path.stat().st_size < SMALL:
                check_values(path)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None


def check_late_files(directory: Path, used: Iterable[str] | None, texts: Iterable[str], turns: Iterable[str]) -> None:
    """Whether all files of a directory, or those of them that are used, pass `check_late`.

    Args:
        directory: where they are.
        used: their paths; None where it is not known which are.
        texts: as in `check_late`.
        turns: as in `check_late`.

    Raises:
        ValueError: one of them does not pass; names file and line.
    """
    wanted = None if used is None else {Path(path).resolve() for path in used}
    for name, path in text_files(directory):
        try:
            if wanted is None or path.resolve() in wanted:
                check_late(path, texts, turns)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None


def _kind(path: Path) -> str:
    """The suffix of a file, packed or not."""
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix


def _opened(path: Path) -> Any:
    return PACKED.get(path.suffix, open)(path, "rb")


# -- texts that look like dates --------------------------------------------------------------------------------------


def with_dates_as_texts(path: Path, rows: Any) -> Any:
    """Rows of a JSON file whose texts the parser took for points in time, read anew: "2020-01-01" stays what it is.

    Args:
        path: of the file.
        rows: a `datasets.Dataset` of it; returned as it is where no column holds times.
    """
    import datasets
    import pyarrow as pa

    schema = pa.schema([(field.name, _timeless(field.type)) for field in rows.features.arrow_schema])
    if schema.types == rows.features.arrow_schema.types:
        return rows
    content = path.read_text("utf-8-sig")
    listed = content.lstrip().startswith("[")
    found = json.loads(content) if listed else [json.loads(line) for line in content.split("\n") if line.strip()]
    return datasets.Dataset(pa.Table.from_pylist(found, schema=schema))


def _timeless(kind: Any) -> Any:
    """An Arrow type with texts for points in time."""
    import pyarrow as pa

    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _timeless(field.type)) for field in kind])
    return pa.list_(_timeless(kind.value_type)) if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
