"""The tokens of an answer as they are produced, each with its text and the passes it took."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Token:
    """A produced token, and what it cost."""

    id: int
    text: str  # what it adds to the text; empty while a character is incomplete
    depth: int  # passes spent on predicting it
    probability: float | None  # that the policy gave to a second pass; None where it was not asked


class Pieces:
    """Text of a growing list of tokens, piece by piece; a character split over tokens comes out whole, with its last.

    Args:
        decode: from a list of token ids to their text, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.context = 0  # the last piece starts here; decoding it again shows how the next one joins it
        self.done = 0  # ids whose text is out

    def add(self, token: int) -> str:
        """What the next token adds; empty where more are needed."""
        self.ids.append(token)
        text = self._rest()
        if not text or text.endswith("\ufffd"):
            return ""
        self.context, self.done = self.done, len(self.ids)
        return text

    def flush(self) -> str:
        """What is left at the end, without the broken character it ends in."""
        text = self._rest().rstrip("\ufffd")
        self.context = self.done = len(self.ids)
        return text

    def _rest(self) -> str:
        before = self.decode(self.ids[self.context : self.done])
        return self.decode(self.ids[self.context :])[len(before) :]


class TokenStreamer:
    """A `streamer` for `generate`: hands over each new token with its depth, read off the cache of that generation.

    A token is predicted at the position before its own, so its cost is the depth of that position.

    Args:
        cache: the `DuoCache` that is also given to `generate`; of one row.
        decode: from token ids to text.
        show: called with each `Token`.
    """

    def __init__(self, cache: Any, decode: Callable[[list[int]], str], show: Callable[[Token], None]) -> None:
        self.cache, self.show = cache, show
        self.pieces = Pieces(decode)
        self.length: int | None = None  # tokens so far; None before the prompt
        self.tokens: list[Token] = []

    def put(self, value: Any) -> None:
        """Called by `generate`: first with the prompt [1, T], then with each token [1]."""
        ids = value.flatten().tolist()
        if self.length is None:
            self.length = len(ids)
            return
        for token in ids:
            position = self.length - 1
            depth = int(self.cache.depth_count.view[0, position])
            logits = self.cache.continue_logits.view[0, position]
            asked = len(logits) > 0 and not math.isnan(logits[0])
            probability = float(logits[0].sigmoid()) if asked else None
            self.length += 1
            self.tokens.append(Token(token, self.pieces.add(token), depth, probability))
            self.show(self.tokens[-1])

    def end(self) -> None:
        """Called by `generate` after the last token."""
        if self.tokens and (rest := self.pieces.flush()):
            last = self.tokens[-1]
            last.text += rest
            self.show(Token(last.id, rest, last.depth, last.probability))
