"""Label the hard tokens of a data set with a reference model, shard by shard.

    output/settings.json    what was asked for; another request is refused
    output/data/NNNNN.parquet   a shard: `rows_per_shard` rows of the source, without those that were dropped
    output/complete.json    counts, once all shards are there
    output/README.md        the card; `datasets.load_dataset(output)` reads the shards

A shard depends on its rows and the settings only, and appears by a rename when it is whole. So any number of
processes, in any order, killed at any time, make the same data set.
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

One row per text. `input_ids`: tokens. `supervised`: whether the model is to produce the token (assistant tokens; never
the first). `row`: its number in the source.{columns}
"""
CARD_COLUMNS = """ At position t, about token t + 1, the reference's `ref_rank` (0: its first
choice), `ref_prob` (probability) and `ref_entropy` (of its prediction, in nats); where token t + 1 is not supervised,
and at the last position, they are -1, 0 and 0. A token is hard by the rule top1 where `ref_rank` > 0."""


@dataclass(frozen=True)
class Labelling:
    """How rows are tokenized and labelled.

    Args:
        max_length: most tokens of a row.
        tokens_per_batch: most tokens of a forward, padding included.
        rows_per_shard: rows of the source per file; what is lost at most when the process is killed.
        too_long: `drop` rows that are longer, or `cut` them.
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
    progress: Reporter = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Tokenize `rows` and store rank, probability and entropy of every supervised token under `reference`.

    Called again, it continues with the shards that are missing. Under torchrun (RANK and WORLD_SIZE) each process does
    its share of the shards, and the one that finishes last completes the data set: wait for all before reading it.

    Args:
        rows: as `load_rows` returns them.
        tokenizer: the base model's.
        reference: on the device it is to run on; None: no labels, for methods that need none.
        output: directory.
        reference_tokenizer: to compare with ours; by default the one where the reference was loaded from.
        progress: reports the rows of the first process.
        options: the fields of `Labelling`, of which `max_length` is required.

    Returns:
        Counts of rows and tokens.

    Raises:
        ValueError: the reference does not fit, `output` holds something else, or no row has a supervised token.
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
        _finish(output, settings, found)
    return found | {"tokens_per_second": work.tokens_per_second}


# -- what was asked for ----------------------------------------------------------------------------------------------


def fingerprint(rows: Dataset) -> str:
    """A hash of the contents of the columns that are read; does not depend on where the rows are kept."""
    columns = [*form_of(rows.column_names), *(name for name in EXTRAS if name in rows.column_names)]
    digest = hashlib.blake2b(digest_size=16)
    for batch in rows.select_columns(columns).with_format(None).iter(1000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _settings(rows: Dataset, tokenizer: Any, reference: PreTrainedModel | None, given: Labelling) -> dict[str, Any]:
    """Everything that decides about the contents."""
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
    """Raises `ValueError` where `output` holds something else than a data set begun with these settings."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; choose a directory")
    if not (output / SETTINGS).is_file():
        strange = [path for path in output.glob("*") if not path.name.endswith(".tmp")]
        # A process that was killed right at the start, or one that starts along with us, leaves an empty `data`.
        if any(path.name != "data" or any(path.iterdir()) for path in strange):
            raise ValueError(f"output {output} is in use: it holds files that are not a labelled data set")
        return
    try:
        begun = json.loads((output / SETTINGS).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{output / SETTINGS} is damaged; delete {output}") from error
    differing = [name for name in settings if begun.get(name) != settings[name]]
    if "reference_weights" not in differing:  # the same model, elsewhere
        differing = [name for name in differing if name != "reference"]
    if differing:
        what = ", ".join(f"{name} {begun.get(name)} (now {settings[name]})" for name in differing)
        raise ValueError(f"{output} was begun with other settings: {what}; delete it or choose another directory")


# -- shards ----------------------------------------------------------------------------------------------------------


def _shards(output: Path, settings: dict[str, Any]) -> list[Path]:
    number = -(-settings["rows"] // settings["rows_per_shard"])
    return [output / "data" / f"{index:05d}.parquet" for index in range(number)]


def _rows_of(index: int, settings: dict[str, Any]) -> range:
    """Rows of the source in a shard."""
    size = settings["rows_per_shard"]
    return range(index * size, min((index + 1) * size, settings["rows"]))


@dataclass
class _Shards:
    """Makes shards."""

    rows: Dataset
    tokenizer: Any
    reference: Reference | None
    settings: dict[str, Any]
    tokens_per_batch: int
    work: Work

    def make(self, index: int) -> bytes:
        """The file of a shard."""
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
    """Sums over the supervised tokens."""
    asked = [row.rank >= 0 for row in measured]
    return {
        "hard": int(sum((row.rank > 0).sum() for row in measured)),
        "loss": float(sum(-np.log(row.prob[at].clip(1e-38)).sum() for row, at in zip(measured, asked, strict=True))),
        "entropy": float(sum(row.entropy.sum() for row in measured)),
    }


def _parquet(columns: dict[str, Any], counts: dict[str, Any]) -> bytes:
    """A table as a Parquet file that has the counts in its metadata."""
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


# -- the end ---------------------------------------------------------------------------------------------------------


def _counts(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Sums over the shards there are."""
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


def _finish(output: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Complete the data set: the card, then the counts; several processes may do it, to the same end.

    Raises:
        ValueError: it has no row; nothing is left of it.
    """
    for left in (output / "data").glob(".*.tmp"):  # of processes that were killed
        left.unlink(missing_ok=True)
    if not found["kept"]:
        for path in (*_shards(output, settings), output / SETTINGS):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # another process was faster, or somebody put something there
            (output / "data").rmdir()
            output.rmdir()
        why = ", ".join(f"{reason} ({count})" for reason, count in found["dropped"].items())
        raise ValueError(f"nothing to train on in {found['rows']} rows: {why}")
    write_atomically(output / CARD, _card(settings, found))
    write_atomically(output / COMPLETE, json.dumps(found, indent=1))


def _card(settings: dict[str, Any], found: dict[str, Any]) -> str:
    lines = {
        "rows": f"{found['kept']:,} of {found['rows']:,}",
        **{f"dropped: {reason}": f"{count:,}" for reason, count in found["dropped"].items()},
        "tokens": f"{found['tokens']:,}",
        "supervised tokens": f"{found['supervised']:,}",
        "tokens per row": "{min:,} to {max:,}, median {median:,.0f}".format(**found["lengths"]),
    }
    name = settings["reference"]
    if name is not None:
        lines |= {
            "reference": f"{name} ({settings['reference_dtype']})",
            "hard tokens (top1)": f"{found['hard']:,} ({found['hard_share']:.2%})",
            "reference's cross-entropy, entropy": f"{found['reference_loss']:.4f}, {found['reference_entropy']:.4f}",
        }
    lines |= {"longest allowed": f"{settings['max_length']:,} tokens", "seconds": f"{found['seconds']:,.0f}"}
    lines |= {"data, tokenizer": f"{settings['data']}, {settings['tokenizer']}"}
    return CARD_TEXT.format(
        kept=f"{found['kept']:,}",
        rows=f"{found['rows']:,}",
        labelled="" if name is None else f" and labelled by {name}",
        date=date.today().isoformat(),
        versions=", ".join(f"{each} {version_of(each)}" for each in ("tah", "torch", "transformers", "datasets")),
        table="\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in lines.items())]),
        columns="" if name is None else CARD_COLUMNS,
    )
