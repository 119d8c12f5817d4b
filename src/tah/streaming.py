"""Stream the tokens of an answer as they are generated, each with its text and its depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Token:
    """A generated token with its depth and continue probability."""

    id: int
    text: str  # text that this token adds; empty while a character is incomplete
    depth: int  # passes that predicted this token
    probability: float | None  # continue probability after depth 1; None if the policy computed none


class Pieces:
    """Decode a growing list of tokens piece by piece.

    A character that is split over several tokens is returned whole, with the last of these tokens.

    Args:
        decode: Function from a list of token ids to their text without special tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.context = 0  # start of the last piece, which is decoded again together with the next one
        self.done = 0  # number of ids whose text has been returned

    def add(self, token: int) -> str:
        """Return the text that the next token adds; empty if it ends in an incomplete character."""
        self.ids.append(token)
        text = self._rest()
        if not text or text.endswith("\ufffd"):
            return ""
        self.context, self.done = self.done, len(self.ids)
        return text

    def flush(self) -> str:
        """Return the remaining text at the end, without a trailing incomplete character."""
        text = self._rest().rstrip("\ufffd")
        self.context = self.done = len(self.ids)
        return text

    def _rest(self) -> str:
        before = self.decode(self.ids[self.context : self.done])
        return self.decode(self.ids[self.context :])[len(before) :]


class TokenStreamer:
    """A `streamer` for `generate` that passes each new token with its depth to a callback.

    The depth comes from the cache of the same generation. A token is predicted at the previous position, so its depth
    is the depth of that position.

    Args:
        cache: `DuoCache` of one row, the same that `generate` receives.
        decode: Function from token ids to text.
        show: Callback for each `Token`.
    """

    def __init__(self, cache: Any, decode: Callable[[list[int]], str], show: Callable[[Token], None]) -> None:
        self.cache, self.show = cache, show
        self.pieces = Pieces(decode)
        self.length: int | None = None  # number of tokens so far; None before the prompt
        self.tokens: list[Token] = []

    def put(self, value: Any) -> None:
        """Receive ids from `generate`: first the prompt `[1, T]`, then each new token `[1]`."""
        ids = value.flatten().tolist()
        if self.length is None:
            self.length = len(ids)
            return
        for token in ids:
            position = self.length - 1
            depth = int(self.cache.depth_count.view[0, position])
            logits = self.cache.continue_logits.view[0, position]
            decided = len(logits) > 0 and not math.isnan(logits[0])
            probability = float(logits[0].sigmoid()) if decided else None
            self.length += 1
            self.tokens.append(Token(token, self.pieces.add(token), depth, probability))
            self.show(self.tokens[-1])

    def end(self) -> None:
        """Show the remaining text; `generate` calls this after the last token."""
        if self.tokens and (rest := self.pieces.flush()):
            last = self.tokens[-1]
            last.text += rest
            self.show(Token(last.id, rest, last.depth, last.probability))
