"""Check data files and open them with `datasets`; errors name the line.

The checks are necessary because of the parsers behind `datasets`. They crash at deeply nested brackets, do not name the
line where bytes are not UTF-8, and make two rows of a line with a superfluous comma at its end.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import TOO_DEEP, Nesting, parse_json
from ..names import DATA_FILES
from .chat_rows import LARGEST, REASONING

if TYPE_CHECKING:
    from datasets import Dataset

COMPLETE = "complete.json"  # exists in a labelled data set (label.py) when all its shards are complete
SPACE = re.compile(r"\s*")
FIRST = 2**26  # bytes of a file that determine its columns and their types
NULL = b"null"
HEAD = re.compile(rb"\n[^\S\n]*(\S[^\n]{0,3})")  # the beginning of a line that is not blank
TEXT_COLUMNS = ("text", "prompt", "completion", "system")  # may hold a text in each row
TURN_COLUMNS = ("messages", "conversations", "prompt", "completion")  # may hold messages
TURN_KEYS = ("content", "value", *REASONING)  # keys of a message that hold texts
CHUNK, SMALL = 2**22, 2**26  # bytes
MOST_PACKED = 100  # most unpacked bytes per packed byte, for results above SMALL; text has about 10
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TEXTS = (".jsonl", ".json", ".csv")  # in UTF-8; .parquet is not


# -- opening ---------------------------------------------------------------------------------------------------------


def open_file(path: Path, columns: Mapping[str, str]) -> Dataset:
    """Return the rows of a file.

    Args:
        path: Path of the file.
        columns: Names in the source by standard name.

    Raises:
        ValueError: The file has an unknown type or cannot be read. The message names the line if it is known.
    """
    import datasets

    if path.suffix not in DATA_FILES:
        raise ValueError(f"a {path.suffix or 'nameless'} file is not one of {', '.join(DATA_FILES)}")
    if path.stat().st_size < 2**16 and not path.read_bytes().strip():
        return datasets.Dataset.from_dict({})
    lines = _check_text(path) if path.suffix in TEXTS else 0
    kind = "json" if path.suffix == ".jsonl" else path.suffix[1:]  # name of a reader of `datasets`
    size = {"chunksize": FIRST} if kind == "json" else {}
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", **size)
    if size and path.stat().st_size > FIRST:
        _check_late(path, *_text_columns(rows.features, columns), FIRST)
    if len(rows) != lines:  # {"a": 1},} makes two rows, and no error
        _check_values(path)
    return _with_dates_as_texts(path, rows) if size else rows


def open_directory(path: Path, split: str, columns: Mapping[str, str]) -> Dataset:
    """Return the rows of a directory that `label` or `datasets` has saved, or that contains data files.

    Args:
        path: Path of the directory.
        split: Name of the split.
        columns: Names in the source by standard name.

    Raises:
        ValueError: There is no such split, the labelling is not finished, or a file cannot be read. The message names
            the file and the line.
    """
    import datasets

    if (path / "settings.json").is_file() and (path / "data").is_dir():
        if not (path / COMPLETE).is_file():
            raise ValueError("its labelling is not finished; run tah label again")
        rows = datasets.load_dataset("parquet", data_files=str(path / "data" / "*.parquet"), split="train")
        return _check_lengths(rows)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict) and split not in saved:
            raise ValueError(f"no split {split!r}; there are {', '.join(saved)}")
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved

    def check(file: Path) -> None:
        _check_text(file)
        if file.stat().st_size < SMALL:
            _check_values(file)

    _check_each(path, check)
    rows = datasets.load_dataset(str(path), split=split)
    used = (datasets.load_dataset_builder(str(path)).config.data_files or {}).get(split)
    wanted = None if used is None else {Path(name).resolve() for name in used}
    names = _text_columns(rows.features, columns)
    _check_each(path, lambda file: _check_late(file, *names) if wanted is None or file.resolve() in wanted else None)
    return rows


def _check_each(directory: Path, check: Callable[[Path], None]) -> None:
    """Check the files of a directory that `datasets` reads as text; an error names the file."""
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        if _kind(path) in TEXTS and path.is_file() and not any(part.startswith(".") for part in inside.parts):
            try:
                check(path)
            except ValueError as error:
                raise ValueError(f"{inside} {error}") from None


def _check_lengths(rows: Dataset) -> Dataset:
    """Return the rows of a labelled data set, after a check that their lists have one entry per token."""
    import pyarrow.compute as pc

    def lengths(name: str) -> np.ndarray:
        return np.concatenate([pc.list_value_length(chunk).to_numpy(False) for chunk in rows.data.column(name).chunks])

    tokens = lengths("input_ids")
    for name in set(rows.column_names) - {"row", "input_ids"}:
        if (found := lengths(name)).shape != tokens.shape or (found != tokens).any():
            at = int((found != tokens).argmax())
            raise ValueError(f"{name} of row {at} has {found[at]} entries for {tokens[at]} tokens; label again")
    return rows


# -- input that crashes or misleads a parser -------------------------------------------------------------------------


def _check_text(path: Path) -> int:
    """Check that a .jsonl, .json or .csv file is UTF-8 and has nothing at which a parser crashes.

    Returns:
        The number of lines that are not blank.

    Raises:
        ValueError: The file fails the check; the message names the line.
        OSError: The file cannot be read.
    """
    kind = _kind(path)
    decoder, nesting, lines = codecs.getincrementaldecoder("utf-8")(), Nesting(), _Lines()
    line, is_list, size = 1, False, 0
    most = max(SMALL, MOST_PACKED * path.stat().st_size) if path.suffix in PACKED else None
    with _opened(path) as file:
        while chunk := file.read(CHUNK):
            begins, size = size == 0, size + len(chunk)
            if most is not None and size > most:
                raise ValueError(f"unpacks to more than {most} bytes, {MOST_PACKED} times its size; unpack it yourself")
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise ValueError(f"line {line} is not UTF-8") from None
            if begins:
                chunk = chunk.removeprefix(codecs.BOM_UTF8)
                is_list = chunk.startswith(b"[")
            null = lines.add(chunk)
            if kind != ".csv":
                if (deep := nesting.add(chunk)) is not None:
                    raise ValueError(f"line {deep} {TOO_DEEP}")
                if null is not None and not is_list:
                    raise ValueError(f"line {null} is null, not an object")
            line += chunk.count(b"\n")
    if decoder.getstate()[0]:
        raise ValueError(f"line {line} is not UTF-8")
    if is_list and kind != ".csv":  # `datasets` passes each entry of a list to pyarrow as a line
        for place, entry in json_values(path):
            if not isinstance(entry, dict | str):
                raise ValueError(f"{place} is {json.dumps(entry)[:40]}, not an object")
    return lines.filled


class _Lines:
    """Count the lines of a text in chunks that are not blank, and find one that begins with null.

    pyarrow crashes if its input begins with null, and it may begin to parse at any line.
    """

    def __init__(self) -> None:
        self._filled, self._breaks, self._rest = 0, -1, b"\n"  # as if a line break came before the text

    @property
    def filled(self) -> int:
        return self._filled + bool(self._rest.strip())

    def add(self, chunk: bytes) -> int | None:
        """Add a chunk, and return the line, counted from 1, that begins with null; None if there is none."""
        text, self._rest = self._rest + chunk, b""
        lines = text.replace(b"\r", b"\n")
        last = lines.rfind(b"\n")
        if last >= 0 and len(head := lines[last:].lstrip()) < len(NULL):  # the next chunk completes this line
            text, self._rest = text[:last], text[last : last + 1] + head
        for line in HEAD.finditer(lines, 0, len(text)):
            if line[1] == NULL:
                return 1 + self._breaks + text[: line.start() + 1].count(b"\n")
            self._filled += 1
        self._breaks += text.count(b"\n")
        return None


def _whole(digits: str) -> int:
    """Return an integer of its first 40 digits. Python rejects thousands of digits, and no check needs the value."""
    return int(digits[:40])


DECODER = json.JSONDecoder(parse_int=_whole)


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the JSON values of a file, or the entries of its list, each with its place for a message.

    The iteration ends at the first invalid JSON, where the parser raises its own error.
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
            # The value may be incomplete, such as "1e+". Reads double in size, so that a long value takes linear time.
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
    """Return the first invalid line of a .jsonl file and the reason; None for a valid file or another type."""
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


def _check_values(path: Path) -> None:
    """Check that a .jsonl file contains only JSON values. A value may span lines, and a line may have several."""
    if path.suffix == ".jsonl" and (why := bad_line(path)) and not _is_sequence(path.read_text("utf-8-sig")):
        raise ValueError(why)


def _is_sequence(text: str) -> bool:
    """Return whether a text consists of JSON values with only white space in between."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        try:
            _, at = decoder.raw_decode(text, at)
        except ValueError:
            return False
        at += len(SPACE.match(text, at)[0])  # type: ignore[index]  # it matches nothing, too
    return True


# -- columns whose type changes later in the file --------------------------------------------------------------------


def _text_columns(features: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the columns of the source that contain only texts, and those whose messages contain only texts."""
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


def _check_late(path: Path, texts: Iterable[str], turns: Iterable[str], first: int = 0) -> None:
    """Check that columns of texts (`texts`) or messages (`turns`) have the same type after the `first` bytes of a file.

    `datasets` converts later values of another type to JSON, and training would use this JSON as text.
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
            entries = messages if isinstance(messages, list) else []
            held += [each.get(key) for each in entries if isinstance(each, dict) for key in TURN_KEYS]
        if not all(each is None or _is_text(each) for each in held):
            raise ValueError(f"{place} has a content that is no text, unlike what comes first; move it there")


def _is_text(value: Any) -> bool:
    """Return whether a value is a text, or an integer, whose text is the same in JSON."""
    return isinstance(value, str) or (type(value) is int and abs(value) < LARGEST)


def _late_values(path: Path, keys: Iterable[str], first: int) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file that may have another type than text at one of the keys, each with its place.

    Most lines are not decoded, since a search shows that these keys have only texts, at any depth. A key may also
    contain escapes.
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
    yield from json_values(path)


def _kind(path: Path) -> str:
    """Return the suffix of a file, without the suffix of its compression."""
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix


def _opened(path: Path) -> Any:
    return PACKED.get(path.suffix, open)(path, "rb")


# -- texts that look like dates --------------------------------------------------------------------------------------


def _with_dates_as_texts(path: Path, rows: Any) -> Any:
    """Return the rows of a JSON file, with texts such as "2020-01-01" kept as texts, not dates."""
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
    """Return an Arrow type with text in place of date and time types."""
    import pyarrow as pa

    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _timeless(field.type)) for field in kind])
    return pa.list_(_timeless(kind.value_type)) if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
