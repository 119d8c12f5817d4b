"""Encode problems of the nine tasks: as rows for the trainer, and as questions to generate answers to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from tah.pipeline.experiment.tiny import SPECIAL, as_fast

from .problem import IDS, LENGTH, MADE, Problem


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of all nine tasks and the chat template of `tah run tiny`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(IDS, unk_token=SPECIAL[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(SPECIAL))
    return as_fast(words)


def question(problem: Problem) -> dict[str, Any]:
    """Return a problem in the format of `scores.score_answers`, for `read=str.strip`."""
    texts = {"user": problem.line, "assistant": problem.reply}
    return {"messages": [{"role": role, "content": text} for role, text in texts.items()], "answer": problem.reply}


class Rows(Dataset):
    """Encode problems for `data.rows.Collator`, equal to the tokenizer's encoding of `question`.

    Args:
        problems: Problems to encode. They are read one after the other and not kept, because there may be a million.

    Attributes:
        ids: Token ids `[rows, LENGTH]`, int16, with padding at the end.
        steps: Number of steps that lead to each token `[rows, LENGTH]`, int8; 0 for all tokens but the answers.
        lengths: Number of tokens `[rows]` without padding.
        depth_labels: Depth labels `[rows, LENGTH]` of a reference model, or None.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        ids, steps, lengths = bytearray(), bytearray(), []
        for problem in problems:
            tokens = problem.tokens
            lengths.append(len(tokens))
            ids += bytes(tokens).ljust(LENGTH, b"\0")  # the padding token is 0, and all ids are below 256
            steps += bytes(problem.steps).ljust(LENGTH, b"\0")
        self.ids = np.frombuffer(ids, np.uint8).reshape(-1, LENGTH).astype(np.int16)
        self.steps = np.frombuffer(steps, np.int8).reshape(-1, LENGTH)
        self.lengths = np.array(lengths)
        self.depth_labels: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: Sequence[Rows], order: np.ndarray) -> Rows:
        """Return the rows of all parts in a new order, without depth labels.

        Args:
            parts: Rows without depth labels.
            order: Number of the row at each place of the result, `[rows]`.
        """
        found = cls([])
        found.ids, found.steps, found.lengths = (
            np.concatenate([getattr(part, name) for part in parts])[order] for name in ("ids", "steps", "lengths")
        )
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, Any]:
        length = self.lengths[at]
        row = {"input_ids": self.ids[at, :length], "supervised": np.arange(length) >= length - MADE, "row": at}
        if self.depth_labels is not None:
            row["depth_labels"] = self.depth_labels[at, :length]
        return row
