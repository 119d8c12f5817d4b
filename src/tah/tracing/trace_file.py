"""A trace: what each pass predicts for every token of some texts, in memory and on disk.

Shapes: T tokens of a text, n = T - 1 predictions (position t predicts token t + 1), M = max_depth, k = top_k,
N predictions of all texts together.

The file is JSON lines. The first line is the header: model, data, settings. Every other line is one text:

    row, part      index of the row in the data; index of the part of a long text
    ids, pieces    [T] tokens, and what each adds to the text (empty until all tokens of a character are there)
    supervised     [n] 1 where the predicted token is supervised; missing if all are
    passes         M times {rank, prob: of the true next token; entropy: nats; max: highest probability;
                   top, top4: n * k ids and their probabilities in 1/10000, most probable first}
    decider        M - 1 times [n], the decider's continue probability; missing without a decider
    depth          [n] passes under the policy of the trace
    final          {rank, prob, top} of the predictions with depth > 1; missing if `passes` has the same values
    strings        text of the token ids that no earlier line has

Each batch is appended as whole lines, so a killed run loses at most its last batch. Of several processes, the first one
writes the file. Process N of the others writes its texts to a part, a file with the suffix `.partN`, from which the
first one appends them in the order of the batches. The file is therefore the same for any number of processes.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import differences, write_atomically

VERSION = 1
ABOUT = ("model", "data", "versions")  # header entries that may differ when a trace is continued
DIGITS = {"rank": "%d", "prob": "%.5g", "entropy": "%.4g", "max": "%.6g", "top": "%d", "top4": "%d"}
TINY = 1e-38  # lower bound of a probability in a loss, which is therefore at most 87.5 nats
Key = tuple[int, int]  # (row, part)
CERTAIN = ("always", "never", "oracle", "random")  # policies that continue with probability 1 or not at all


@dataclass
class TracedText:
    """A text, and what each pass predicts if every token runs all passes."""

    row: int
    part: int
    ids: np.ndarray  # [T]
    pieces: list[str]  # [T]
    supervised: np.ndarray  # [n] bool
    rank: np.ndarray  # [M, n] of the true next token, 0 = first choice
    prob: np.ndarray  # [M, n] of the true next token
    entropy: np.ndarray  # [M, n] nats
    max_prob: np.ndarray  # [M, n] of the first choice
    top_ids: np.ndarray  # [M, n, k]
    top_probs: np.ndarray  # [M, n, k], rounded to 1/10000
    depth: np.ndarray  # [n] passes under the trace's policy
    final_rank: np.ndarray  # [n] as `rank`, after the passes that the token took under the policy
    final_prob: np.ndarray  # [n] as `prob`, likewise
    final_top: np.ndarray  # [n] first choice, likewise
    decider: np.ndarray | None = None  # [M - 1, n] continue probability

    @property
    def key(self) -> Key:
        return self.row, self.part


@dataclass
class Tokens:
    """The predictions of all texts of a trace, concatenated, as columns. The fields are those of `TracedText`."""

    text: np.ndarray  # [N] index into `Trace.texts`
    target: np.ndarray  # [N] true next token
    rank: np.ndarray  # [M, N]
    prob: np.ndarray  # [M, N]
    entropy: np.ndarray  # [M, N]
    max_prob: np.ndarray  # [M, N]
    decider: np.ndarray | None  # [M - 1, N]
    depth: np.ndarray  # [N]
    final_rank: np.ndarray  # [N]
    final_prob: np.ndarray  # [N]


@dataclass
class Trace:
    """Traced texts in the order of the data.

    Args:
        header: First line of the file: model, tokenizer, data, max_depth, attention, policy, threshold, ...
        texts: Finished texts.
        strings: Text of every token id that occurs in a text or among the most probable tokens.
    """

    header: dict[str, Any]
    texts: list[TracedText]
    strings: dict[int, str] = field(default_factory=dict)

    @property
    def max_depth(self) -> int:
        return int(self.header["max_depth"])

    @property
    def missing(self) -> int:
        """Number of texts that an unfinished trace lacks."""
        return int(self.header["texts"]) - len(self.texts)

    def string(self, token: int) -> str:
        return self.strings.get(int(token), f"<{int(token)}>")

    def tokens(self, every: bool = False) -> Tokens:
        """Return the predictions of supervised tokens, or of `every` token.

        Raises:
            ValueError: There are none.
        """
        kept = [(number, text, text.supervised | every) for number, text in enumerate(self.texts)]
        if not any(chosen.any() for _, _, chosen in kept):
            raise ValueError(f"the trace of {self.header['data']} has no tokens yet: run tah trace again to continue")

        def column(name: str) -> np.ndarray:
            return np.concatenate([getattr(text, name)[..., chosen] for _, text, chosen in kept], axis=-1)

        names = ("rank", "prob", "entropy", "max_prob", "depth", "final_rank", "final_prob")
        return Tokens(
            text=np.concatenate([np.full(int(chosen.sum()), number) for number, _, chosen in kept]),
            target=np.concatenate([text.ids[1:][chosen] for _, text, chosen in kept]),
            decider=column("decider") if self.header["decider"] else None,
            **{name: column(name) for name in names},
        )


def weights_of(header: Mapping[str, Any]) -> str | None:
    """Return by which continue probabilities a trace weighs the passes of a mixture, method.md (15).

    All outputs after depth 2 and deeper have these weights. Only a policy with the same continue probabilities has the
    same outputs in the model.

    Returns:
        None: the output has no such weights. `certain`: the probability is 1, as in `always`. `decider`, `confidence`
        or `entropy`: the score of that name. Otherwise the name of a policy of the caller.
    """
    if header.get("output") != "mixture" or header["max_depth"] < 2:
        return None
    policy = str(header["policy"])
    if policy == "confidence":
        return "entropy" if header["confidence_measure"] == "entropy" else "confidence"
    return "certain" if policy in CERTAIN else policy


def drawn(header: Mapping[str, Any]) -> bool:
    """Return whether the decisions of a trace's policy were drawn, so that it has no threshold."""
    return header["threshold"] is None


def check_comparable(one: Trace, other: Trace) -> None:
    """Check that two traces have the same tokens for the texts that both have.

    Raises:
        ValueError: The tokenizers or a text differ, or no text is in both.
    """
    names = [f"{which} trace ({trace.header['model']})" for which, trace in (("the first", one), ("the second", other))]
    if one.header["tokenizer"] != other.header["tokenizer"]:
        raise ValueError(f"{names[0]} and {names[1]} have different tokenizers, so they cannot be compared")
    texts = {text.key: text for text in one.texts}
    shared = [(text, texts[text.key]) for text in other.texts if text.key in texts]
    if not shared:
        raise ValueError(f"{names[0]} and {names[1]} have no text in common")
    for text, its in shared:
        if not (np.array_equal(text.ids, its.ids) and np.array_equal(text.supervised, its.supervised)):
            raise ValueError(f"row {text.row} is not the same text in {names[0]} and in {names[1]}")


def loss_of(prob: np.ndarray) -> np.ndarray:
    """Return the cross-entropy in nats of the probability of the true token."""
    return -np.log(np.maximum(prob.astype(np.float64), TINY))


# -- lines -----------------------------------------------------------------------------------------------------------


def as_line(text: TracedText, strings: Mapping[int, str], exact: bool) -> str:
    """Return a text as a line of the file, with the newline.

    Args:
        text: Text to write.
        strings: Text of each token id that no earlier line has.
        exact: Whether the outcome under the policy is that of `passes` at `depth`. `final` is then left out.
    """
    passes = [
        _columns(
            rank=text.rank[d],
            prob=text.prob[d],
            entropy=text.entropy[d],
            max=text.max_prob[d],
            top=text.top_ids[d],
            top4=np.rint(text.top_probs[d] * 1e4),
        )
        for d in range(len(text.rank))
    ]
    parts = [f'"row":{text.row},"part":{text.part},"ids":{_numbers("%d", text.ids)},"pieces":{_plain(text.pieces)}']
    if not text.supervised.all():
        parts.append(f'"supervised":{_numbers("%d", text.supervised)}')
    parts.append(f'"passes":[{",".join(passes)}]')
    if text.decider is not None:  # all digits of a float32, so that a threshold selects the same tokens as in the model
        parts.append(f'"decider":[{",".join(_numbers("%.9g", go_prob) for go_prob in text.decider)}]')
    parts.append(f'"depth":{_numbers("%d", text.depth)}')
    if not exact:
        at = text.depth > 1
        final = _columns(rank=text.final_rank[at], prob=text.final_prob[at], top=text.final_top[at])
        parts.append(f'"final":{final}')
    parts.append(f'"strings":{_plain({str(token): string for token, string in strings.items()})}')
    return "{" + ",".join(parts) + "}\n"


def parse_line(line: str | bytes, header: Mapping[str, Any]) -> tuple[TracedText, dict[int, str]]:
    """Return the text of a line, and the strings of token ids.

    Raises:
        ValueError: The line is not a text of a trace with this header.
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
    go_prob = found.get("decider")
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
        decider=None if go_prob is None else np.array(go_prob, np.float32).reshape(M - 1, n),
        depth=depth,
        final_rank=final["rank"],
        final_prob=final["prob"],
        final_top=final["top"],
    )
    return text, {int(token): string for token, string in found["strings"].items()}


def _numbers(style: str, values: np.ndarray) -> str:
    return f"[{','.join(map(style.__mod__, values.ravel().tolist()))}]"


def _columns(**values: np.ndarray) -> str:
    return "{" + ",".join(f'"{name}":{_numbers(DIGITS[name], its)}' for name, its in values.items()) + "}"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# -- files -----------------------------------------------------------------------------------------------------------


def load_trace(path: str | Path) -> Trace:
    """Return the trace of a file, finished or not. An incomplete last line is ignored.

    Raises:
        ValueError: The file is not a trace, or a line before the last is damaged.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[Trace, int]:
    """Return the trace of a file, and the size of its complete lines in bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"trace {path} cannot be read: {error.strerror}") from error
    *lines, rest = content.split(b"\n")  # `rest` is an incomplete line, or empty
    try:
        header = json.loads(lines[0])
        if header["tah_trace"] != VERSION:
            raise ValueError(f"{path} is a trace of format {header['tah_trace']}; this version reads {VERSION}")
    except (UnicodeDecodeError, json.JSONDecodeError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a trace: its first line is not a header of tah trace") from error
    if header.get("policy") == "confidence" and "confidence_measure" not in header:
        raise ValueError(f"{path} has no confidence_measure of its policy: trace again into another file")
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
            raise ValueError(f"{path}: line {number} is damaged ({error}): trace again into another file") from error
        texts.setdefault(text.key, text)
        strings |= named
    return Trace(header, sorted(texts.values(), key=lambda text: text.key), strings), size


def _check_same(path: Path, before: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Raise ValueError unless the trace in a file has the settings of `header`."""
    if differs := differences(before, json.loads(_plain(header)), without=ABOUT):
        raise ValueError(f"{path} is a trace with other settings: {differs}; choose another file, or delete it")


def part_of(path: str | Path, process: int) -> Path:
    """Return the path of the texts of a process other than the first."""
    return Path(f"{path}.part{process}")


class Parts:
    """The texts that other processes, or processes of an earlier call, have written to parts of a trace.

    Args:
        path: Path of the trace. None: it has no parts.
        header: Header of the trace.

    Attributes:
        texts: Texts of the parts, by key.

    Raises:
        ValueError: A part is not of this trace, or is damaged.
    """

    def __init__(self, path: str | Path | None, header: dict[str, Any]) -> None:
        self.path, self.header = None if path is None else Path(path), header
        self.texts: dict[Key, TracedText] = {}
        self._taken: dict[Path, int] = {}  # bytes that have been read
        self.read()

    def files(self) -> list[Path]:
        """Return the paths of the parts."""
        if self.path is None:
            return []
        return sorted(part for part in self.path.parent.glob(f"{glob.escape(self.path.name)}.part*") if _is_part(part))

    def read(self) -> None:
        """Read the lines that have been appended since the last call."""
        for part in self.files():
            if part not in self._taken:
                trace, self._taken[part] = _read(part)
                _check_same(part, trace.header, self.header)
                self.texts |= {text.key: text for text in trace.texts}
                continue
            with open(part, "rb") as file:
                file.seek(self._taken[part])
                lines = file.read().split(b"\n")[:-1]
            self._taken[part] += sum(len(line) + 1 for line in lines)
            found = (parse_line(line, self.header)[0] for line in lines)
            self.texts |= {text.key: text for text in found}

    def have(self, keys: Collection[Key]) -> bool:
        """Return whether the parts contain these texts."""
        if not self.texts.keys() >= set(keys):
            self.read()
        return self.texts.keys() >= set(keys)

    def remove(self) -> None:
        """Remove the parts, after their texts are in the trace."""
        for part in self.files():
            part.unlink()


def _is_part(path: Path) -> bool:
    return re.fullmatch(r"\.part[0-9]+", path.suffix) is not None


class TraceFile:
    """A trace that is written line by line.

    Args:
        path: Path of a new file, or of an unfinished trace of the same request, which is continued. None: no file.
        header: Header of the trace.

    Raises:
        ValueError: `path` is a directory, not a trace, or a trace with other settings.
    """

    def __init__(self, path: str | Path | None, header: dict[str, Any]) -> None:
        self.path, self.header = None if path is None else Path(path), header
        self.trace = Trace(header, [])
        if self.path is not None and self.path.is_dir():
            raise ValueError(f"{self.path} is a directory: give a file name, for example {self.path}/trace.jsonl")
        if self.path is not None and self.path.exists() and self.path.stat().st_size:
            self._continue(self.path)
        elif self.path is not None:
            write_atomically(self.path, _plain(header) + "\n")

    def _continue(self, path: Path) -> None:
        self.trace, size = _read(path)
        _check_same(path, self.trace.header, self.header)
        os.truncate(path, size)

    def add(self, texts: Sequence[TracedText], strings_of: Callable[[list[int]], dict[int, str]]) -> None:
        """Append texts, and the strings of their token ids."""
        lines = []
        for text in texts:
            used = {*text.ids.tolist(), *text.top_ids.ravel().tolist(), *text.final_top.tolist()}
            new = strings_of(sorted(used - self.trace.strings.keys()))
            lines.append(as_line(text, new, exact=self.header["final"] != "run"))
            kept, _ = parse_line(lines[-1], self.header)  # with the rounding of the file
            self.trace.texts.append(kept)
            self.trace.strings |= new
        if self.path is not None and lines:
            with open(self.path, "ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> Trace:
        """Return the trace, sorted by the order of the data."""
        self.trace.texts.sort(key=lambda text: text.key)
        return self.trace
