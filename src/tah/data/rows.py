"""Convert rows of text to tokens, depth labels and batches.

Shapes: B rows of a batch, T tokens, K documents of a packed row.

A token is *supervised* if it counts in the loss: tokens of the assistant, but never the first of a document. Position t
predicts token t + 1, so the depth label of token t + 1 is stored at position t.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.hub import hub_reachable
from ..core.loss import IGNORE
from ..errors import first_line
from ..names import check_data
from .assistant_mask import encode
from .chat_rows import Unusable
from .data_files import bad_line, open_directory, open_file

if TYPE_CHECKING:
    from datasets import Dataset

FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",), ("input_ids", "supervised"))
EXTRAS = ("system", "tools", "chat_template_kwargs")  # columns passed to the chat template
MOST_REASONS = 30  # reasons for dropped rows that are counted separately by their details, such as a name
RULE = re.compile(r"(top1)|prob<(\d*\.?\d+(?:e-?\d+)?)|rank>(\d+)")
MISSING = "reading data needs one more package: pip install 'tah[train]'"
DEEPEST = 1e-3  # a hard token to which the reference gives this probability or less runs `max_depth` passes


# -- rows ------------------------------------------------------------------------------------------------------------


def quiet() -> None:
    """Switch off the progress bars of `datasets`, and its log lines, which only repeat its errors.

    Raises:
        ImportError: `datasets` is not installed.
    """
    datasets = _datasets()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(MISSING) from error
    return datasets


def load_rows(
    source: str, split: str = "train", columns: Mapping[str, str] | None = None, limit: int | None = None
) -> Dataset:
    """Load rows in one of the `FORMS`: chat, prompt and completion, text, or a data set made by `label`.

    Args:
        source: Hub id (`owner/name`, or `owner/name:config`), path of a directory (saved by `datasets`, with data
            files, or labelled), or path of a .jsonl, .json, .parquet or .csv file.
        split: Split of a hub data set or of a directory; a file has none.
        columns: Names in the source by standard name, where they differ, such as {"messages": "my_column"}. With None
            the error for an unknown form does not mention this mapping.
        limit: Maximum number of rows, from the start.

    Raises:
        ValueError: The source does not exist or is empty, its form is unknown, or a mapped column does not exist.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    rows = _open(source, split, columns or {})
    if len(rows) == 0:
        raise ValueError(f"{source} is empty: it has no rows")
    try:
        rows[0]
    except Exception as error:  # Arrow's schema ends names at a NUL character; only reading a row raises the error
        why = f"its rows cannot be decoded ({first_line(error)!a}); a name may be there twice or hold a NUL character"
        raise ValueError(f"data {source!r} cannot be read: {why}") from error
    rows = _map_columns(rows, source, dict(columns or {}))
    form_of(rows.column_names, source, mapped=columns is not None)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _open(source: str, split: str, columns: Mapping[str, str]) -> Dataset:
    datasets = _datasets()
    path, (name, _, config) = Path(check_data(source)), source.partition(":")
    try:
        if path.is_file():
            return open_file(path, columns)
        if path.is_dir():
            return open_directory(path, split, columns)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise ValueError("there is no such file or directory")
        cached = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
        if not cached.exists() and not hub_reachable():
            raise ValueError("there is no such file or directory, and the data hub cannot be reached")
        return datasets.load_dataset(name, config or None, split=split)
    except StopIteration:  # a file without a row
        return datasets.Dataset.from_dict({})
    except Exception as error:
        if "corresponds to no data" in str(error):  # as for `[]`
            return datasets.Dataset.from_dict({})
        if "Couldn't cast" in str(error.__cause__ or error):
            why = "its rows have other columns or types than those that come first; give them all the same"
            raise ValueError(f"data {source!r} cannot be read: {why}") from error
        why = bad_line(path) or first_line(error.__cause__ or error)
        raise ValueError(f"data {source!r} cannot be read: {why}") from error


def form_of(columns: Sequence[str], source: str = "the data", mapped: bool = False) -> tuple[str, ...]:
    """Return the entry of `FORMS` that fits the columns.

    Args:
        columns: Names of the columns.
        source: Name of the data in messages.
        mapped: Whether a recipe can map the columns; the message then names the key `data.columns`.

    Raises:
        ValueError: No form fits.
    """
    for form in FORMS:
        if set(form) <= set(columns):
            return form
    known = ", ".join(" + ".join(form) for form in FORMS[:-1])
    hint = " (map one with data.columns)" if mapped else ""
    raise ValueError(f"{source} has the columns {_listed(columns)}; needed: {known}{hint}")


def _map_columns(rows: Dataset, source: str, columns: Mapping[str, str]) -> Dataset:
    """Return the rows with standard column names, without the columns of other forms."""
    allowed = [name for form in FORMS[:-1] for name in form] + list(EXTRAS)
    for name, given in columns.items():
        if name not in allowed:
            raise ValueError(f"columns: {name!r} is not one of {', '.join(allowed)}")
        if given not in rows.column_names:
            raise ValueError(f"{source} has no column {given!r} for {name}; there are {_listed(rows.column_names)}")
    # The mapped columns determine the form, even if the source also has columns of another form.
    meant = {name for form in FORMS if set(form) & set(columns) for name in form}
    others = {name for form in FORMS for name in form} - meant if meant else set()
    drop = [n for n in rows.column_names if n in others | set(columns) and n not in columns.values()]
    moved = {given: name for name, given in columns.items()}
    if len(moved) < len(columns):
        raise ValueError(f"columns: {columns} name a column twice")
    return rows.remove_columns(drop).rename_columns(moved)


def _listed(names: Sequence[str]) -> str:
    """Return the first 20 column names in one line, with long names and unprintable characters shortened or escaped."""
    shown = [name if name.isprintable() and len(name) <= 60 else f"{name[:60]!r}" for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# -- tokens ----------------------------------------------------------------------------------------------------------


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    max_length: int,
    too_long: str = "drop",
    dropped: Counter[str] | None = None,
) -> dict[str, list[Any]] | None:
    """Return the tokens of a row and the mask of the supervised ones, or None if the row is dropped.

    The tokenizer's chat template renders conversations; messages may use OpenAI's or ShareGPT's names. Prompt and
    completion are both strings, which are joined unchanged, or both lists of messages, of which only the completion is
    supervised. Texts and string completions end with the tokenizer's end-of-text token. A row is dropped if part of it
    would be lost.

    Args:
        row: Row in one of the `FORMS`.
        tokenizer: Fast tokenizer of transformers.
        max_length: Maximum number of tokens.
        too_long: Treatment of longer rows: `drop` or `cut`.
        dropped: Counter of the reasons for dropped rows.

    Returns:
        `{"input_ids": [T], "supervised": [T] bool}`, or None.

    Raises:
        ValueError: No row can be tokenized: the tokenizer has no chat template, or does not report offsets.
    """
    dropped = Counter() if dropped is None else dropped
    try:
        ids, supervised = encode(row, tokenizer)
        if len(ids) > max_length and too_long == "drop":
            raise Unusable("longer than max_length")
        ids, supervised = ids[:max_length], supervised[:max_length]
        if not any(supervised):
            raise Unusable("no assistant tokens")
        return {"input_ids": ids, "supervised": supervised}
    except Unusable as error:
        reason = str(error)
        if reason not in dropped and len(dropped) >= MOST_REASONS:  # unknown speakers can give any number of reasons
            reason = reason.partition(":")[0]
        dropped[reason] += 1
        return None


# -- depth labels ----------------------------------------------------------------------------------------------------


def check_rule(rule: str) -> tuple[float, int]:
    """Parse a rule for hard tokens.

    Returns:
        The probability below which and the rank above which a token is hard. One of them has a value that no token
        reaches.

    Raises:
        ValueError: The rule has none of the forms `top1`, `prob<P` and `rank>K`.
    """
    found = RULE.fullmatch(rule.replace(" ", ""))
    if not found or (found[2] and not 0 < float(found[2]) <= 1):
        raise ValueError(f"{rule!r} is not one of top1, prob<P (0 < P <= 1), rank>K (K >= 0)")
    never = np.iinfo(np.int64).max
    return (float(found[2]), never) if found[2] else (0.0, int(found[3] or 0))


def depth_labels(
    ref_rank: Sequence[int],
    ref_prob: Sequence[float],
    supervised: Sequence[bool],
    rule: str,
    max_depth: int,
    seed: int | Sequence[int],
) -> np.ndarray:
    """Return the depth label of each position, `[T]` int64: 1, or more if the predicted token is hard; method.md (9).

    Args:
        ref_rank: Rank of token t + 1 under the reference model, `[T]`, 0 for its most probable token.
        ref_prob: Probability of token t + 1 under the reference model, `[T]`.
        supervised: Whether token t is supervised, `[T]`.
        rule: Rule for hard tokens: `top1` (not the most probable token), `prob<0.3` or `rank>5`.
        max_depth: Maximum depth. Above 2 the depth grows as the probability p of a hard token falls: it is
            2 + (max_depth - 2) * s on average, with s = min(log p / log 0.001, 1), rounded up or down at random.
        seed: Random seed of the rounding; `[seed, row]` gives each row its own rounding.

    Raises:
        ValueError: The rule is unknown, or the lists differ in length.
    """
    below, above = check_rule(rule)
    rank, prob = np.asarray(ref_rank, np.int64), np.asarray(ref_prob, np.float64)
    predicts = np.append(np.asarray(supervised, bool)[1:], False)
    if not len(rank) == len(prob) == len(supervised):
        raise ValueError(f"{len(rank)} ranks and {len(prob)} probabilities for {len(supervised)} tokens; label again")
    hard = predicts & ((prob < below) | (rank > above))
    if max_depth <= 2:
        return np.where(hard, max_depth, 1)
    severity = np.minimum(np.log(np.maximum(prob, DEEPEST)) / np.log(DEEPEST), 1)
    dither = np.random.default_rng(seed).random(len(rank))
    deeper = np.minimum(2 + np.floor(severity * (max_depth - 2) + dither), max_depth)
    return np.where(hard, deeper, 1).astype(np.int64)


# -- batches ---------------------------------------------------------------------------------------------------------


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack documents into rows of at most `max_length` tokens: best fit, longest first.

    Args:
        lengths: Number of tokens of each document.
        max_length: Maximum number of tokens of a row.

    Returns:
        The indices of the documents of each row.

    Raises:
        ValueError: A document is empty or longer than a row.
    """
    packed: list[list[int]] = []
    room: dict[int, list[int]] = {}  # rows by number of free tokens
    free: list[int] = []  # the keys of `room`, in rising order
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = int(lengths[index])
        if not 0 < length <= max_length:
            raise ValueError(f"document {index} has {length} tokens; 1 to {max_length} fit a row")
        at = bisect_left(free, length)
        if at == len(free):
            row, size = len(packed), max_length
            packed.append([])
        else:
            size = free[at]
            row = room[size].pop(0)
            if not room[size]:
                del room[size], free[at]
        packed[row].append(index)
        if left := size - length:
            if left not in room:
                insort(free, left)
            room.setdefault(left, []).append(row)
    return packed


class Collator:
    """Collate rows into a batch of int64 tensors `[B, T]`.

    A row has `input_ids` and `supervised`, and may have `depth_labels` and `row` (its number). Padding is on the right,
    with 0 in `attention_mask`. With `packed`, a row is `{"documents": [row, ...]}` and the batch has no mask. There
    `position_ids` begin at 0 in every document, and padding at the end of a row is one more document. Labels are -100
    (`IGNORE`) for tokens that do not count in the loss. Depth labels are 1 at padding. `row` is `[B]`, or `[B, K]` with
    `packed`, where -1 fills rows with fewer documents.

    Args:
        pad_token_id: Id of the padding token.
        max_length: Maximum length; a longer row is an error. None sets no limit.
        packed: Whether rows are lists of documents.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None, packed: bool = False) -> None:
        self.pad_token_id, self.max_length, self.packed = pad_token_id, max_length, packed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch.

        Raises:
            ValueError: The lists of a row differ in length, or a row is too long.
        """
        documents = [row["documents"] if self.packed else [row] for row in rows]
        sizes = [sum(len(document["input_ids"]) for document in row) for row in documents]
        if self.max_length is not None and max(sizes) > self.max_length:
            raise ValueError(f"row {int(np.argmax(sizes))} of the batch has {max(sizes)} tokens; {self.max_length} fit")
        shape = len(rows), max(sizes)
        batch = {
            "input_ids": np.full(shape, self.pad_token_id),
            "labels": np.full(shape, IGNORE),
            "position_ids": np.zeros(shape, np.int64),
        }
        if "depth_labels" in documents[0][0]:
            batch["depth_labels"] = np.ones(shape, np.int64)
        for index, row in enumerate(documents):
            at = 0
            for document in row:
                at = self._fill({name: values[index] for name, values in batch.items()}, document, at)
            batch["position_ids"][index, at:] = np.arange(shape[1] - at)
        if not self.packed:
            del batch["position_ids"]
            batch["attention_mask"] = np.arange(shape[1]) < np.array(sizes)[:, None]
        if "row" in documents[0][0]:
            most = max(map(len, documents))
            numbers = [[document["row"] for document in row] + [-1] * (most - len(row)) for row in documents]
            batch["row"] = np.array(numbers) if self.packed else np.array(numbers)[:, 0]
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in batch.items()}

    def _fill(self, batch: dict[str, np.ndarray], document: Mapping[str, Any], at: int) -> int:
        """Write a document into the arrays `[T]` of a row from `at` on, and return the start of the next document."""
        length = len(document["input_ids"])
        for name in ("supervised", "depth_labels"):
            if (name == "supervised" or name in batch) and len(document[name]) != length:
                where = f" of row {document['row']}" if "row" in document else ""
                raise ValueError(f"{name}{where} has {len(document[name])} entries for {length} tokens; label again")
        place, ids = slice(at, at + length), np.asarray(document["input_ids"], np.int64)
        batch["input_ids"][place] = ids
        batch["labels"][place] = np.where(np.asarray(document["supervised"], bool), ids, IGNORE)
        batch["labels"][at : at + 1] = IGNORE  # the first token of a document has no predecessor
        batch["position_ids"][place] = np.arange(length)
        if "depth_labels" in batch:
            batch["depth_labels"][place] = document["depth_labels"]
        return at + length
