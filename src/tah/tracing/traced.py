"""A trace in memory: of every token of some texts, what each pass made of it (`trace_file.py` has it on disk).

Shapes: T tokens of a text, n = T - 1 predictions (position t predicts token t + 1), M = max_depth, k = top_k,
N predictions of all texts together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TINY = 1e-38  # probabilities below count as this: a loss is 87.5 nats at most
Key = tuple[int, int]  # (row, part)


@dataclass
class TracedText:
    """A text, and what each pass made of its tokens if every token ran all of them."""

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
    decider: np.ndarray | None  # [M - 1, n] probability of going on
    depth: np.ndarray  # [n] passes under the trace's policy
    final_rank: np.ndarray  # [n] after the passes it took under the policy
    final_prob: np.ndarray  # [n]
    final_top: np.ndarray  # [n] first choice

    @property
    def key(self) -> Key:
        return self.row, self.part


@dataclass
class Tokens:
    """Columns of a trace: N predictions of all texts one after the other."""

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
        header: what was traced, with what: model, tokenizer, data, max_depth, attention, policy, threshold, ...
        texts: those that are done.
        strings: text of every token id that occurs, also as an alternative.
    """

    header: dict[str, Any]
    texts: list[TracedText]
    strings: dict[int, str] = field(default_factory=dict)

    @property
    def max_depth(self) -> int:
        return int(self.header["max_depth"])

    @property
    def missing(self) -> int:
        """How many texts an unfinished trace lacks."""
        return int(self.header["texts"]) - len(self.texts)

    def string(self, token: int) -> str:
        return self.strings.get(int(token), f"<{int(token)}>")

    def tokens(self, every: bool = False) -> Tokens:
        """All predictions of supervised tokens, or of `every` token.

        Raises:
            ValueError: there are none.
        """
        kept = [(number, text, text.supervised | every) for number, text in enumerate(self.texts)]
        if not any(chosen.any() for _, _, chosen in kept):
            raise ValueError(f"the trace of {self.header['data']} holds no tokens yet; run it again to continue it")

        def column(name: str) -> np.ndarray:
            return np.concatenate([getattr(text, name)[..., chosen] for _, text, chosen in kept], axis=-1)

        names = ("rank", "prob", "entropy", "max_prob", "depth", "final_rank", "final_prob")
        return Tokens(
            text=np.concatenate([np.full(int(chosen.sum()), number) for number, _, chosen in kept]),
            target=np.concatenate([text.ids[1:][chosen] for _, text, chosen in kept]),
            decider=column("decider") if self.header["decider"] else None,
            **{name: column(name) for name in names},
        )


def check_comparable(one: Trace, other: Trace) -> None:
    """Raises `ValueError` unless both traces have the same tokens for the same texts."""
    names = [f"{which} trace ({trace.header['model']})" for which, trace in (("the first", one), ("the second", other))]
    if one.header["tokenizer"] != other.header["tokenizer"]:
        raise ValueError(f"{names[0]} and {names[1]} were traced with different tokenizers: they cannot be compared")
    texts = {text.key: text for text in one.texts}
    shared = [(text, texts[text.key]) for text in other.texts if text.key in texts]
    if not shared:
        raise ValueError(f"{names[0]} and {names[1]} have no text in common")
    for text, its in shared:
        if not (np.array_equal(text.ids, its.ids) and np.array_equal(text.supervised, its.supervised)):
            raise ValueError(f"row {text.row} is another text in {names[0]} than in {names[1]}")


def loss_of(prob: np.ndarray) -> np.ndarray:
    """Cross-entropy in nats of the probability of the true token."""
    return -np.log(np.maximum(prob.astype(np.float64), TINY))
