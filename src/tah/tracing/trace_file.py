"""A trace on disk: lines that are appended while tracing, and read back.

Shapes: T tokens of a text, n = T - 1 predictions (position t predicts token t + 1), M = max_depth, k = top_k.

The file is JSON lines. The first says what was traced; each other one is a text:

    row, part      its number in the data; where long texts are cut into parts, which of them
    ids, pieces    [T] tokens, and what each adds to the text (empty where a character needs more tokens)
    supervised     [n] 1 where the predicted token is the model's to say; left out where all are
    passes         M times {rank, prob: of the true next token; entropy: nats; max: highest probability;
                   top, top4: n * k ids and their probabilities in 1/10000, most probable first}
    decider        M - 1 times [n], the decider's probability of going on, where the model has one
    depth          [n] passes under the policy of the trace
    final          {rank, prob, top} of those with depth > 1, where that differs from `passes`
    strings        text of token ids that no earlier line has

Lines are appended whole, a batch at a time, so a killed run loses its last batch at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import differences, write_atomically
from .traced import Key, Trace, TracedText

VERSION = 1
ABOUT = (
    "model",
    "data",
    "versions",
)  # entries of the header that may differ between a run and the one that continues it


# -- lines -----------------------------------------------------------------------------------------------------------


def as_line(text: TracedText, strings: Mapping[int, str], exact: bool) -> str:
    """A text as a line of the file, newline included.

    Args:
        strings: of the token ids that no earlier line has.
        exact: what the policy's run ended in is `passes` at `depth`, so `final` is left out.
    """
    passes = []
    for d in range(len(text.rank)):
        columns = {
            "rank": _numbers("%d", text.rank[d]),
            "prob": _numbers("%.5g", text.prob[d]),
            "entropy": _numbers("%.4g", text.entropy[d]),
            "max": _numbers("%.6g", text.max_prob[d]),
            "top": _numbers("%d", text.top_ids[d]),
            "top4": _numbers("%d", np.rint(text.top_probs[d] * 1e4)),
        }
        passes.append(_entries(columns))
    parts = [f'"row":{text.row},"part":{text.part},"ids":{_numbers("%d", text.ids)}']
    parts += [f'"pieces":{_plain(text.pieces)}']
    if not text.supervised.all():
        parts.append(f'"supervised":{_numbers("%d", text.supervised)}')
    parts.append(f'"passes":[{",".join(passes)}]')
    if text.decider is not None:  # all digits of a float32: a threshold must part the tokens as it did in the model
        parts.append(f'"decider":[{",".join(_numbers("%.9g", said) for said in text.decider)}]')
    parts.append(f'"depth":{_numbers("%d", text.depth)}')
    if not exact:
        at = text.depth > 1
        final = {
            "rank": _numbers("%d", text.final_rank[at]),
            "prob": _numbers("%.5g", text.final_prob[at]),
            "top": _numbers("%d", text.final_top[at]),
        }
        parts.append(f'"final":{_entries(final)}')
    parts.append(f'"strings":{_plain({str(token): text for token, text in strings.items()})}')
    return "{" + ",".join(parts) + "}\n"


def parse_line(line: str | bytes, header: Mapping[str, Any]) -> tuple[TracedText, dict[int, str]]:
    """A text from its line, and the strings of token ids.

    Raises:
        ValueError: it is no such line.
    """
    try:
        return _parse(json.loads(line), header["max_depth"], header["top_k"])
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error


def _parse(found: dict[str, Any], M: int, k: int) -> tuple[TracedText, dict[int, str]]:
    ids = np.array(found["ids"], np.int32)
    n = len(ids) - 1

    def passes(name: str, kind: type, *shape: int) -> np.ndarray:
        return np.array([found["passes"][d][name] for d in range(M)], kind).reshape(M, n, *shape)

    rank, prob = passes("rank", np.int32), passes("prob", np.float32)
    top, depth = passes("top", np.int32, k), np.array(found["depth"], np.int64).reshape(n)
    last, here = depth - 1, np.arange(n)
    final = {"rank": rank[last, here], "prob": prob[last, here], "top": top[last, here, 0]}
    for name, values in found.get("final", {}).items():
        final[name][depth > 1] = values
    said = found.get("decider")
    text = TracedText(
        row=int(found["row"]),
        part=int(found["part"]),
        ids=ids,
        pieces=list(found["pieces"]),
        supervised=np.array(found.get("supervised", [1] * n), bool).reshape(n),
        rank=rank,
        prob=prob,
        entropy=passes("entropy", np.float32),
        max_prob=passes("max", np.float32),
        top_ids=top,
        top_probs=passes("top4", np.float32, k) / np.float32(1e4),
        decider=None if said is None else np.array(said, np.float32).reshape(M - 1, n),
        depth=depth,
        final_rank=final["rank"],
        final_prob=final["prob"],
        final_top=final["top"],
    )
    return text, {int(token): string for token, string in found["strings"].items()}


def _numbers(style: str, values: np.ndarray) -> str:
    return f"[{','.join(map(style.__mod__, values.ravel().tolist()))}]"


def _entries(columns: Mapping[str, str]) -> str:
    return "{" + ",".join(f'"{name}":{numbers}' for name, numbers in columns.items()) + "}"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# -- files -----------------------------------------------------------------------------------------------------------


def load_trace(path: str | Path) -> Trace:
    """A trace, finished or not; a last line that was interrupted is left out.

    Raises:
        ValueError: it is no trace, or a line before the last is damaged.
    """
    trace, _ = _read(Path(path))
    return trace


def _read(path: Path) -> tuple[Trace, int]:
    """A trace, and how many bytes of its file are whole lines."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"trace {path} cannot be read: {error.strerror}") from error
    *lines, rest = content.split(b"\n")  # whatever follows the last newline was interrupted
    try:
        header = json.loads(lines[0])
        if header["tah_trace"] != VERSION:
            raise ValueError(f"{path} is a trace of format {header['tah_trace']}; this version reads {VERSION}")
    except (UnicodeDecodeError, json.JSONDecodeError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no trace: its first line is not the header that tah trace writes") from error
    if header.get("policy") == "confidence" and "confidence_measure" not in header:
        raise ValueError(f"{path} does not say how its policy measured confidence; trace again into another file")
    texts: dict[Key, TracedText] = {}
    strings: dict[int, str] = {}
    size = len(content) - len(rest)
    for number, line in enumerate(lines[1:], 2):
        try:
            text, named = parse_line(line, header)
        except ValueError as error:
            if number == len(lines):
                size -= len(line) + 1
                break
            raise ValueError(f"{path}: line {number} is damaged ({error}); trace again into another file") from error
        texts.setdefault(text.key, text)
        strings |= named
    return Trace(header, sorted(texts.values(), key=lambda text: text.key), strings), size


class TraceFile:
    """A trace that grows line by line.

    Args:
        path: a new file, or the unfinished trace of the same request, which is continued; None: nothing is kept.
        header: what is traced.

    Raises:
        ValueError: the file is something else, or a trace of something else.
    """

    def __init__(self, path: str | Path | None, header: dict[str, Any]) -> None:
        self.path, self.header = None if path is None else Path(path), header
        self.trace = Trace(header, [])
        if self.path is not None and self.path.is_dir():
            raise ValueError(f"{self.path} is a directory; give the trace a file name, like {self.path}/trace.jsonl")
        if self.path is not None and self.path.exists() and self.path.stat().st_size:
            self._continue(self.path)
        elif self.path is not None:
            write_atomically(self.path, _plain(header) + "\n")

    def _continue(self, path: Path) -> None:
        self.trace, size = _read(path)
        if differs := differences(self.trace.header, json.loads(_plain(self.header)), without=ABOUT):
            raise ValueError(f"{path} is a trace with other settings: {differs}; choose another file or delete it")
        os.truncate(path, size)

    @property
    def done(self) -> set[Key]:
        return {text.key for text in self.trace.texts}

    def add(self, texts: Sequence[TracedText], strings_of: Callable[[list[int]], dict[int, str]]) -> None:
        """Append texts, and the strings of their token ids."""
        lines = []
        for text in texts:
            used = {*text.ids.tolist(), *text.top_ids.ravel().tolist(), *text.final_top.tolist()}
            new = strings_of(sorted(used - self.trace.strings.keys()))
            lines.append(as_line(text, new, exact=self.header["final"] != "run"))
            kept, _ = parse_line(lines[-1], self.header)  # rounded as in the file
            self.trace.texts.append(kept)
            self.trace.strings |= new
        if self.path is not None:
            with open(self.path, "ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> Trace:
        """The trace, in the order of the data."""
        self.trace.texts.sort(key=lambda text: text.key)
        return self.trace
