"""From rows of text to tokens, depth labels and batches.

Shapes: B rows of a batch, T tokens, K documents of a packed row.

A token is *supervised* if the model must produce it: tokens of the assistant, never the first of a document. Position
t predicts token t + 1, so the depth label of token t + 1 is stored at position t.
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
EXTRAS = ("system", "tools", "chat_template_kwargs")  # columns handed to the chat template
MOST_REASONS = 30  # reasons for dropped rows that are counted with their details: a name, a template's message
RULE = re.compile(r"(top1)|prob<(\d*\.?\d+(?:e-?\d+)?)|rank>(\d+)")
MISSING = "reading data needs one more package: pip install 'tah[train]'"
DEEPEST = 1e-3  # a hard token to which the reference gives this probability or less runs `max_depth` passes


# -- rows ------------------------------------------------------------------------------------------------------------


def quiet() -> None:
    """Switch off the progress bars of `datasets`, and its log lines, which repeat what it raises.

    Raises:
        ImportError: it is not installed.
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
    """Rows in one of the `FORMS`: chat, prompt and completion, text, or a data set made by `label`.

    Args:
        source: a hub id (`owner/name`, or `owner/name:config`), a directory (saved by `datasets`, with data files, or
            labelled), or a file: .jsonl, .json, .parquet or .csv.
        split: of a hub data set or of a directory; a file has none.
        columns: our names -> names in the source, where they differ: {"messages": "my_column"}; None where the caller
            cannot give any, for the message.
        limit: at most this many rows, from the start.

    Raises:
        ValueError: no such source, nothing in it, an unknown form, or a mapped column that is not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    rows = _open(source, split, columns or {})
    if len(rows) == 0:
        raise ValueError(f"{source} is empty: it has no rows")
    try:
        rows[0]
    except Exception as error:  # Arrow's schema ends names at a NUL character, which only a row reveals
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
    """The one of the `FORMS` that rows with these columns have.

    Args:
        mapped: whether a recipe can name the columns; the message then has its key.

    Raises:
        ValueError: none.
    """
    for form in FORMS:
        if set(form) <= set(columns):
            return form
    known = ", ".join(" + ".join(form) for form in FORMS[:-1])
    hint = " (map one with data.columns)" if mapped else ""
    raise ValueError(f"{source} has the columns {_listed(columns)}; needed: {known}{hint}")


def _map_columns(rows: Dataset, source: str, columns: Mapping[str, str]) -> Dataset:
    """The rows with our names for their columns, without columns of other forms."""
    allowed = [name for form in FORMS[:-1] for name in form] + list(EXTRAS)
    for name, given in columns.items():
        if name not in allowed:
            raise ValueError(f"columns: {name!r} is not one of {', '.join(allowed)}")
        if given not in rows.column_names:
            raise ValueError(f"{source} has no column {given!r} for {name}; there are {_listed(rows.column_names)}")
    # The mapped columns decide the form: a column of another form that happens to be there must not win.
    meant = {name for form in FORMS if set(form) & set(columns) for name in form}
    others = {name for form in FORMS for name in form} - meant if meant else set()
    drop = [n for n in rows.column_names if n in others | set(columns) and n not in columns.values()]
    moved = {given: name for name, given in columns.items()}
    if len(moved) < len(columns):
        raise ValueError(f"columns: {columns} name a column twice")
    return rows.remove_columns(drop).rename_columns(moved)


def _listed(names: Sequence[str]) -> str:
    """Names of columns in one line; a file may have any number of them, with any characters."""
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
    """{"input_ids": [T], "supervised": [T] bool} of a row, or None, the reason being counted in `dropped`.

    Chat goes through the tokenizer's own template; messages may use OpenAI's or ShareGPT's names. Prompt and completion
    are both strings, joined as they are, or both lists of messages, of which only the completion's are supervised.
    Texts and string completions end in the tokenizer's end-of-text token. Rows of which something would be lost are
    dropped.

    Args:
        too_long: `drop` rows of more than `max_length` tokens, or `cut` them.

    Raises:
        ValueError: no row could be tokenized: the tokenizer has no chat template, or tells no offsets.
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
        if reason not in dropped and len(dropped) >= MOST_REASONS:  # as many speakers as a play has
            reason = reason.partition(":")[0]
        dropped[reason] += 1
        return None


# -- depth labels ----------------------------------------------------------------------------------------------------


def check_rule(rule: str) -> tuple[float, int]:
    """(probability below which, rank above which) a token is hard; one of them is such that it never decides.

    Raises:
        ValueError: not a rule.
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
    """Passes [T] int64 that each position should take: 1, or more where the token it predicts is hard.

    Args:
        ref_rank: [T] of token t + 1 under the reference, 0 for its first choice.
        ref_prob: [T] of token t + 1 under the reference.
        supervised: [T] whether token t is to be produced.
        rule: `top1` (not the first choice), `prob<0.3` or `rank>5`.
        max_depth: for more than 2, the less probable a hard token, the deeper: 2 + (max_depth - 2) * s passes on
            average, s = log p / log 0.001 at most 1, rounded up or down at random.
        seed: of that rounding; give [seed, row], so that rows are not rounded alike.

    Raises:
        ValueError: not a rule, or lists of different lengths.
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
    """Documents, by index, into rows of at most `max_length` tokens: best fit, longest first.

    Raises:
        ValueError: a document that fits no row.
    """
    packed: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free tokens -> rows that have as many
    free: list[int] = []  # the keys of `room`, rising
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
    """Rows to a batch of int64 tensors [B, T].

    A row has `input_ids` and `supervised`, and may have `depth_labels` and `row` (its number). Padding is on the
    right, told by `attention_mask`. With `packed`, a row is {"documents": [row, ...]}: there is no mask, `position_ids`
    begin at 0 in every document, and the tail of a row shorter than the longest is one more document, of padding.
    Labels are -100 (`IGNORE`) where nothing is to be learnt, and depth labels 1 at padding. `row` is [B] or, packed,
    [B, K], -1 where a row has fewer documents.

    Args:
        pad_token_id: what padding consists of.
        max_length: refuse longer rows.
        packed: rows are lists of documents.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None, packed: bool = False) -> None:
        self.pad_token_id, self.max_length, self.packed = pad_token_id, max_length, packed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Raises `ValueError` for a row whose lists differ in length or that is too long."""
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
        """Write a document into a row, its tensors [T] given, from `at` on; where the next one begins."""
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
