"""The texts that are traced: rows of data as tokens, cut or split to a length.

T: tokens of a text.
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
    """A text, or a part of one, to be traced."""

    row: int
    part: int
    ids: np.ndarray  # [T]
    supervised: np.ndarray  # [T] bool

    @property
    def key(self) -> tuple[int, int]:
        return self.row, self.part


def read_rows(source: str, split: str = "train", limit: int | None = None) -> Sequence[Mapping[str, Any]]:
    """Rows as `data.load_rows` reads them, or one row with the contents of a .txt or .md file.

    Raises:
        ValueError: there is no such source, or nothing in it.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in (*DATA_FILES, *TEXT_FILES):
        kind, known = path.suffix or "nameless", ", ".join((*DATA_FILES, *TEXT_FILES))
        raise ValueError(f"data {source!r} cannot be read: a {kind} file is not one of {known}")
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
        raise ValueError(f"{source} is empty: it has no text")
    return [{"text": text}]


def texts_of(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int, source: str = "the data"
) -> tuple[list[Text], Counter[str]]:
    """Texts of at most `max_length` tokens, and how many rows were left out or cut, by reason.

    A plain text that is longer goes on in further parts; other rows end there, since a part of a conversation would
    lack the turns before it.

    Raises:
        ValueError: nothing is left.
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
            f"nothing to trace in the {len(rows)} rows of {source}: {why}; a text needs two tokens, the second of them "
            "the model's to say"
        )
    return texts, dropped


def _is_encoded(row: Mapping[str, Any]) -> bool:
    """Whether the row holds a list of token ids and as long a list of truth values."""
    ids, supervised = row["input_ids"], row["supervised"]
    if not isinstance(ids, list) or not isinstance(supervised, list) or len(ids) != len(supervised):
        return False
    numbers = all(isinstance(token, int) and 0 <= token < 2**63 for token in ids)
    return numbers and all(isinstance(value, bool | int) for value in supervised)
