"""Stream the tokens of an answer as they are generated, each with its text and its depth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Token:
    """A generated token with its depth and continue probability."""

    id: int
    text: str  # text that this token adds; empty while a character is incomplete
    depth: int  # passes that predicted this token
    probability: float | None  # continue probability after depth 1; None if the policy computed none
    weights: list[float] | None = None  # weight of each pass in the output; None if the output is no mixture

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, without `weights` if there are none."""
        return {name: value for name, value in vars(self).items() if name != "weights" or value is not None}


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
        weigh: Function from passes [B, T] and continue logits [B, T, M - 1] to the weights [B, T, M] of the passes, or
            to None, as `TaHForCausalLM.mixture_weights`.
    """

    def __init__(
        self,
        cache: Any,
        decode: Callable[[list[int]], str],
        show: Callable[[Token], None],
        weigh: Callable[[Tensor, Tensor], Tensor | None] = lambda depth_count, continue_logits: None,
    ) -> None:
        self.cache, self.show, self.weigh = cache, show, weigh
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
            count = self.cache.depth_count.view[:1, position : position + 1]
            every = self.cache.continue_logits.view[:1, position : position + 1]
            depth, logits, weights = int(count), every[0, 0], self.weigh(count, every)
            decided = len(logits) > 0 and not math.isnan(logits[0])
            probability = float(logits[0].sigmoid()) if decided else None
            self.length += 1
            token_weights = None if weights is None else weights[0, 0, :depth].tolist()
            self.tokens.append(Token(token, self.pieces.add(token), depth, probability, token_weights))
            self.show(self.tokens[-1])

    def end(self) -> None:
        """Show the remaining text; `generate` calls this after the last token."""
        if self.tokens and (rest := self.pieces.flush()):
            last = self.tokens[-1]
            last.text += rest
            self.show(replace(last, text=rest))
