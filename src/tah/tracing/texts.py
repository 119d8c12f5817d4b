"""The texts of a trace: rows of data as tokens, cut or split at a maximum length.

Shapes: T tokens of a text.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rows import form_of, load_rows, tokenize_row
from ..names import DATA_FILES, TEXT_FILES


@dataclass
class Text:
    """A text, or one part of a long text."""

    row: int
    part: int
    ids: np.ndarray  # [T]
    supervised: np.ndarray  # [T] bool

    @property
    def key(self) -> tuple[int, int]:
        return self.row, self.part


def read_rows(source: str, split: str = "train", limit: int | None = None) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a data source. A `.txt` or `.md` file is one row with its content as text.

    Args:
        source: Path or Hub id, as in `data.load_rows`.
        split: Dataset split.
        limit: Maximum number of rows.

    Raises:
        ValueError: The source does not exist, cannot be read, or is empty.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in (*DATA_FILES, *TEXT_FILES):
        known = ", ".join((*DATA_FILES, *TEXT_FILES))
        suffix = f"the file suffix {path.suffix}" if path.suffix else "a file without a suffix"
        raise ValueError(f"data {source!r} cannot be read: {suffix} is not supported; use one of {known}")
    if path.suffix not in TEXT_FILES or not path.is_file():
        return load_rows(source, split, limit=limit)
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"data {source!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise ValueError(f"data {source!r} cannot be read: line {line} is not UTF-8") from error
    if not text.strip():
        raise ValueError(f"{source} has no text")
    return [{"text": text}]


def texts_of(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int, source: str = "the data"
) -> tuple[list[Text], Counter[str]]:
    """Return texts of at most `max_length` tokens, and the number of rows that were left out or cut, by reason.

    A longer plain text is split into parts. A longer conversation is cut, because a later part of it would lack the
    turns before that part.

    Args:
        rows: Rows in one of the forms of `data.load_rows`.
        tokenizer: Tokenizer of the model.
        max_length: Maximum number of tokens of a text or part.
        source: Name of the data in messages.

    Raises:
        ValueError: No row has a token to predict.
    """
    form, texts, dropped = form_of(list(rows[0]), source), list[Text](), Counter[str]()
    for number in range(len(rows)):
        row: Any = rows[number]
        if form != ("input_ids", "supervised"):
            encoded = tokenize_row(row, tokenizer, sys.maxsize, "cut", dropped)
        elif not (encoded := row if _is_encoded(row) else None):
            dropped["malformed row"] += 1
        if encoded is None:
            continue
        ids, supervised = np.array(encoded["input_ids"], np.int64), np.array(encoded["supervised"], bool)
        starts = range(0, len(ids), max_length) if form == ("text",) else range(0, min(1, len(ids)))
        if form != ("text",) and len(ids) > max_length:
            dropped["cut at max_length"] += 1
        for part, start in enumerate(starts):
            text = Text(number, part, ids[start : start + max_length], supervised[start : start + max_length])
            if text.supervised[1:].any():
                texts.append(text)
            elif part == 0:
                dropped["no assistant tokens"] += 1
    if not texts:
        why = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
        raise ValueError(
            f"no row to trace among the {len(rows)} rows of {source}: {why}; a text needs at least two tokens, of "
            "which one after the first is supervised"
        )
    return texts, dropped


def _is_encoded(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a list of token ids and a list of booleans of the same length."""
    ids, supervised = row["input_ids"], row["supervised"]
    if not isinstance(ids, list) or not isinstance(supervised, list) or len(ids) != len(supervised):
        return False
    numbers = all(isinstance(token, int) and 0 <= token < 2**63 for token in ids)
    return numbers and all(isinstance(value, bool | int) for value in supervised)
