"""Label the hard tokens of a data set with a reference model, shard by shard (method.md (9)).

    output/settings.json        the settings; a call with other settings raises ValueError
    output/data/NNNNN.parquet   a shard: `rows_per_shard` rows of the source, without the dropped rows
    output/complete.json        counts, written when all shards exist
    output/README.md            the card; `datasets.load_dataset(output)` reads the shards

A shard depends only on its rows and the settings, and a rename puts it in place when it is complete. Processes of any
number and in any order therefore make the same data set, even if some are killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.contents import version_of, weights_fingerprint
from ..data.data_files import COMPLETE
from ..data.rows import EXTRAS, form_of, tokenize_row
from ..data.scoring import Measured, Reference, check_reference
from ..files import write_atomically
from ..names import TOO_LONG, unknown
from ..progress import SILENT, Reporter, Work

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

SETTINGS, CARD = "settings.json", "README.md"
CARD_TEXT = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- think-at-hard
---
# Labelled data set

{kept} of {rows} rows, tokenized{labelled}. Made by tah on {date} ({versions}).

{table}

One row per text.

| column | content |
| --- | --- |
| `input_ids` | the tokens |
| `supervised` | true for tokens that count in the loss: the assistant's tokens, but never the first token of a row |
| `row` | number of the row in the source |
{columns}"""
CARD_COLUMNS = """\
| `ref_rank` | rank of token t + 1 in the reference model's prediction at position t; 0 is the most probable token |
| `ref_prob` | probability of token t + 1 in that prediction |
| `ref_entropy` | entropy of that prediction, in nats |

The last three columns are -1, 0 and 0 at the last position and where token t + 1 is not supervised. The token at
position t is hard by the rule top1 if `ref_rank` > 0 there.
"""


@dataclass(frozen=True)
class Labelling:
    """How rows are tokenized and labelled.

    Args:
        max_length: Largest number of tokens of a row.
        tokens_per_batch: Largest number of tokens of one forward, padding included.
        rows_per_shard: Rows of the source per file. A process that is killed loses the work of at most one shard.
        too_long: What happens to longer rows: `drop` or `cut`.

    Raises:
        ValueError: A number is too small, or `too_long` is unknown.
    """

    max_length: int
    tokens_per_batch: int = 16384
    rows_per_shard: int = 1024
    too_long: str = "drop"

    def __post_init__(self) -> None:
        for name, smallest in (("max_length", 2), ("tokens_per_batch", 1), ("rows_per_shard", 1)):
            if (value := getattr(self, name)) < smallest:
                raise ValueError(f"{name}={value} must be at least {smallest}")
        if self.too_long not in TOO_LONG:
            raise ValueError(unknown("too_long", self.too_long, TOO_LONG))


def label(
    rows: Dataset,
    tokenizer: Any,
    reference: PreTrainedModel | None,
    output: str | Path,
    *,
    reference_tokenizer: Any = None,
    reference_name: str | None = None,
    progress: Reporter = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Tokenize `rows` and store the rank, probability and entropy of every supervised token under `reference`.

    A further call makes only the missing shards. Under torchrun (RANK and WORLD_SIZE) each process makes a share of the
    shards, and the process that finishes last completes the data set. Wait for all processes before reading it.

    Args:
        rows: Rows as `load_rows` returns them.
        tokenizer: Tokenizer of the base.
        reference: Reference model, on the device where it runs. None stores tokens without labels.
        output: Directory of the data set.
        reference_tokenizer: Tokenizer of the reference model, compared with `tokenizer`. By default it is loaded from
            where the reference model was loaded.
        reference_name: Name of the reference model in the card. By default it is the Hub id, or the last component of
            the directory, that the model was loaded from.
        progress: Reporter of the rows of the first process.
        options: Fields of `Labelling`. `max_length` is required.

    Returns:
        Counts of rows and tokens.

    Raises:
        ValueError: The tokenizers differ, the reference model is too short for the rows, `output` contains something
            else, or no row has a supervised token.
    """
    given = Labelling(**options)
    if reference is not None:
        check_reference(reference, tokenizer, reference_tokenizer, given.max_length)
    output, settings = Path(output), _settings(rows, tokenizer, reference, given)
    _check_output(output, settings)
    shards = _shards(output, settings)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    todo = [index for index in range(rank, len(shards), world) if not shards[index].exists()]
    scorer = None if reference is None or not todo else Reference(reference)
    (output / "data").mkdir(parents=True, exist_ok=True)
    write_atomically(output / SETTINGS, json.dumps(settings, indent=1))
    count = sum(len(_rows_of(index, settings)) for index in todo)
    with (progress if todo and rank == 0 else SILENT).work("labelling", count, "rows") as work:
        shard = _Shards(rows.with_format(None), tokenizer, scorer, settings, given.tokens_per_batch, work)
        for index in todo:
            write_atomically(shards[index], shard.make(index))
    found = _counts(output, settings)
    if found["complete"] and not (output / COMPLETE).exists():
        _finish(output, settings, found, name_for_card(reference_name or settings["reference"]))
    return found | {"tokens_per_second": work.tokens_per_second}


# -- settings -------------------------------------------------------------------------------------------------------


def fingerprint(rows: Dataset) -> str:
    """Return a hash of the contents of the columns that are read. It does not depend on where the rows are stored."""
    columns = [*form_of(rows.column_names), *(name for name in EXTRAS if name in rows.column_names)]
    digest = hashlib.blake2b(digest_size=16)
    for batch in rows.select_columns(columns).with_format(None).iter(1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _settings(rows: Dataset, tokenizer: Any, reference: PreTrainedModel | None, given: Labelling) -> dict[str, Any]:
    """Return all settings that the contents of the data set depend on."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    text = json.dumps([state, tokenizer.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return {
        "data": fingerprint(rows),
        "rows": len(rows),
        "tokenizer": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "reference": None if reference is None else reference.name_or_path or type(reference).__name__,
        "reference_dtype": None if reference is None else str(reference.dtype).removeprefix("torch."),
        "reference_weights": None if reference is None else weights_fingerprint(reference),
        "max_length": given.max_length,
        "too_long": given.too_long,
        "rows_per_shard": given.rows_per_shard,
    }


def _check_output(output: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if `output` contains anything but a data set that was begun with these settings."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; choose a directory")
    if not (output / SETTINGS).is_file():
        strange = [path for path in output.glob("*") if not path.name.endswith(".tmp")]
        # A process that was killed at its start, or that starts at the same time, leaves an empty `data`.
        if any(path.name != "data" or any(path.iterdir()) for path in strange):
            raise ValueError(f"output {output} is in use: it contains files that are not a labelled data set")
        return
    try:
        begun = json.loads((output / SETTINGS).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{output / SETTINGS} is damaged; delete {output}") from error
    differing = [name for name in settings if begun.get(name) != settings[name]]
    if "reference_weights" not in differing:  # the same model at another path
        differing = [name for name in differing if name != "reference"]
    if differing:
        what = ", ".join(f"{name} {begun.get(name)} (now {settings[name]})" for name in differing)
        raise ValueError(f"{output} was begun with other settings: {what}; delete it or choose another directory")


# -- shards ----------------------------------------------------------------------------------------------------------


def _shards(output: Path, settings: dict[str, Any]) -> list[Path]:
    """Return the paths of all shards, whether they exist or not."""
    number = -(-settings["rows"] // settings["rows_per_shard"])
    return [output / "data" / f"{index:05d}.parquet" for index in range(number)]


def _rows_of(index: int, settings: dict[str, Any]) -> range:
    """Return the numbers of the source rows in a shard."""
    size = settings["rows_per_shard"]
    return range(index * size, min((index + 1) * size, settings["rows"]))


@dataclass
class _Shards:
    """Shards of one data set: `make` returns one as the bytes of a Parquet file."""

    rows: Dataset
    tokenizer: Any
    reference: Reference | None
    settings: dict[str, Any]
    tokens_per_batch: int
    work: Work

    def make(self, index: int) -> bytes:
        """Return shard `index` as the bytes of a Parquet file."""
        start, places, dropped = time.monotonic(), _rows_of(index, self.settings), Counter[str]()
        kept: list[int] = []
        ids: list[np.ndarray] = []
        supervised: list[np.ndarray] = []
        for place in places:
            row = tokenize_row(
                self.rows[place], self.tokenizer, self.settings["max_length"], self.settings["too_long"], dropped
            )
            if row is not None:
                kept.append(place)
                ids.append(np.array(row["input_ids"], np.int32))
                supervised.append(np.array(row["supervised"]))
        self.work.advance(len(places) - len(kept), 0)
        counts: dict[str, Any] = {"rows": len(places), "kept": len(kept), "dropped": dict(dropped)}
        counts |= {"lengths": [len(row) for row in ids], "supervised": int(sum(row.sum() for row in supervised))}
        columns: dict[str, Any] = {"input_ids": ids, "supervised": supervised}
        if self.reference is None:
            self.work.advance(len(kept), sum(counts["lengths"]))
        else:
            measured = self.reference.measure(ids, supervised, self.tokens_per_batch, self.work)
            columns |= {f"ref_{name}": [getattr(row, name) for row in measured] for name in ("rank", "prob", "entropy")}
            counts |= _sums(measured)
        return _parquet(columns | {"row": kept}, counts | {"seconds": time.monotonic() - start})


def _sums(measured: list[Measured]) -> dict[str, Any]:
    """Return sums over the supervised tokens: hard tokens, loss and entropy in nats."""
    asked = [row.rank >= 0 for row in measured]
    return {
        "hard": int(sum((row.rank > 0).sum() for row in measured)),
        "loss": float(sum(-np.log(row.prob[at].clip(1e-38)).sum() for row, at in zip(measured, asked, strict=True))),
        "entropy": float(sum(row.entropy.sum() for row in measured)),
    }


def _parquet(columns: dict[str, Any], counts: dict[str, Any]) -> bytes:
    """Return a table as the bytes of a Parquet file with the counts in its metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"input_ids": "int32", "supervised": "bool", "ref_rank": "int32"}
    arrays = {}
    for name, values in columns.items():
        if name == "row":
            arrays[name] = pa.array(values, pa.int64())
            continue
        kind = np.dtype(types.get(name, "float32"))
        ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
        arrays[name] = pa.ListArray.from_arrays(ends, pa.array(np.concatenate([np.empty(0, kind), *values])))
    table = pa.table(arrays).replace_schema_metadata({"tah": json.dumps(counts)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


# -- completion -----------------------------------------------------------------------------------------------------


def _counts(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return counts summed over the existing shards."""
    import pyarrow.parquet as pq

    there = [path for path in _shards(output, settings) if path.exists()]
    each = [json.loads(pq.read_schema(path).metadata[b"tah"]) for path in there]
    lengths = np.array([length for counts in each for length in counts["lengths"]] or [0])
    dropped = sum((Counter(counts["dropped"]) for counts in each), Counter[str]())
    found: dict[str, Any] = {name: sum(counts[name] for counts in each) for name in ("rows", "kept", "supervised")}
    found |= {"dropped": dict(dropped.most_common()), "tokens": int(lengths.sum()), "shards": len(each)}
    found["lengths"] = {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())}
    if settings["reference"] is not None:
        total = {name: sum(counts[name] for counts in each) for name in ("hard", "loss", "entropy")}
        per_token = {name: value / max(1, found["supervised"]) for name, value in total.items()}
        found |= {"hard": total["hard"], "hard_share": per_token["hard"]}
        found |= {"reference_loss": per_token["loss"], "reference_entropy": per_token["entropy"]}
    found["seconds"] = sum(counts["seconds"] for counts in each)
    return found | {"complete": len(there) == len(_shards(output, settings))}


def _finish(output: Path, settings: dict[str, Any], found: dict[str, Any], reference: str | None) -> None:
    """Complete the data set: write the card, then the counts. Several processes may do this at the same time.

    Raises:
        ValueError: The data set has no row. Its files are removed.
    """
    for left in (output / "data").glob(".*.tmp"):  # left by processes that were killed
        left.unlink(missing_ok=True)
    if not found["kept"]:
        for path in (*_shards(output, settings), output / SETTINGS):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another process has removed it, or added a file
            (output / "data").rmdir()
            output.rmdir()
        why = ", ".join(f"{reason} ({count})" for reason, count in found["dropped"].items())
        raise ValueError(f"nothing to train on in {found['rows']} rows: {why}")
    write_atomically(output / CARD, _card(settings, found, reference))
    write_atomically(output / COMPLETE, json.dumps(found, indent=1))


def name_for_card(source: str | None) -> str | None:
    """Return the public name of a model: a word or Hub id as it is, a local directory as its last component.

    A directory of the Hub's cache (`models--OWNER--NAME/snapshots/COMMIT`) becomes the Hub id.
    """
    if source is None or not (os.path.isabs(source) or os.path.isdir(source)):
        return source
    parts = Path(os.path.abspath(source)).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")
    return parts[-1]


def _card(settings: dict[str, Any], found: dict[str, Any], reference: str | None) -> str:
    """Return the text of README.md. It contains no path of this machine, so that the data set can be published."""
    lines = {
        "rows": f"{found['kept']:,} of {found['rows']:,}",
        **{f"dropped: {reason}": f"{count:,}" for reason, count in found["dropped"].items()},
        "tokens": f"{found['tokens']:,}",
        "supervised tokens": f"{found['supervised']:,}",
        "tokens per row": "{min:,} to {max:,}, median {median:,.0f}".format(**found["lengths"]),
    }
    if reference is not None:
        lines |= {
            "reference": f"{reference} ({settings['reference_dtype']})",
            "hard tokens (top1)": f"{found['hard']:,} ({found['hard_share']:.2%})",
            "reference's cross-entropy, nats per token": f"{found['reference_loss']:.4f}",
            "reference's entropy, nats per token": f"{found['reference_entropy']:.4f}",
        }
    lines |= {"longest allowed": f"{settings['max_length']:,} tokens", "seconds": f"{found['seconds']:,.0f}"}
    lines |= {"data, tokenizer": f"{settings['data']}, {settings['tokenizer']}"}
    return CARD_TEXT.format(
        kept=f"{found['kept']:,}",
        rows=f"{found['rows']:,}",
        labelled="" if reference is None else f" and labelled by {reference}",
        date=date.today().isoformat(),
        versions=", ".join(f"{each} {version_of(each)}" for each in ("tah", "torch", "transformers", "datasets")),
        table="\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in lines.items())]),
        columns="" if reference is None else CARD_COLUMNS,
    )
