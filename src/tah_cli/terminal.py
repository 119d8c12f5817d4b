"""Tokens on a terminal: coloured by the passes they took and by how probable another pass was."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

NEARLY = 0.8  # a token whose probability exceeds this share of the threshold is shown as nearly iterated
NEARLY_STYLE = "color(179)"
# By depth: (text, background just above the threshold, background at probability 1).
SHADES = {
    2: ("#000000", "#ffe0a3", "#ff9a2e"),
    3: ("#000000", "#ff9d7a", "#f0532d"),
    4: ("#ffffff", "#d33682", "#8c1d5c"),
}
# Invisible characters that reorder the text around them (Unicode bidirectional controls).
REORDER = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


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


class Painter:
    """Shows tokens on a console: colours on a terminal, brackets around iterated tokens elsewhere.

    Args:
        console: where to print.
        threshold: of the policy, which the colour of a probability is relative to.
    """

    def __init__(self, console: Console, threshold: float = 0.5) -> None:
        self.console, self.threshold = console, threshold
        self.coloured = console.is_terminal and console.color_system is not None and not console.no_color
        self.waiting = 1  # depth of the tokens whose character is not complete

    def show(self, token: Token) -> None:
        """Print a token right away, on the current line."""
        text, style = self.paint(token)
        if text:
            self.console.print(Segments([Segment(text, style)]), end="", soft_wrap=True)
            self.console.file.flush()

    def text(self, tokens: Sequence[Token]) -> Text:
        """All of an answer as one rich text, to be laid out."""
        return Text.assemble(*((text, style or "") for text, style in map(self.paint, tokens)))

    def paint(self, token: Token) -> tuple[str, Style | None]:
        """A token's text, safe to print, and its style."""
        depth = self.waiting = max(self.waiting, token.depth)
        text = printable(token.text)
        if not text:
            return "", None
        self.waiting = 1
        if self.coloured:
            return text, style_of(depth, token.probability, self.threshold)
        return (bracket(text, depth), None) if depth > 1 else (text, None)

    def legend(self) -> Text:
        """What the colours or brackets mean."""
        if not self.coloured:
            return Text("legend: plain = one pass, [two passes], [[three passes]]", style="dim")
        parts = [("one pass", None), (" one pass, nearly two ", style_of(1, self.threshold, self.threshold))]
        parts += [(" two passes, just ", style_of(2, self.threshold, self.threshold))]
        parts += [
            (" two passes, surely ", style_of(2, 1.0, self.threshold)),
            (" three ", style_of(3, 1.0, self.threshold)),
        ]
        line = Text.assemble(("legend: ", "dim"))
        for index, (words, style) in enumerate(parts):
            line.append(" " if index else "").append(words, style)
        return line


def style_of(depth: int, probability: float | None, threshold: float) -> Style | None:
    """Colour of a token: plain text for one pass, a background for more, darker the surer the policy was."""
    if depth == 1:
        nearly = probability is not None and probability > 0 and probability >= NEARLY * threshold
        return Style.parse(NEARLY_STYLE) if nearly else None
    text, low, high = SHADES[min(depth, max(SHADES))]
    sure = 1.0 if probability is None or threshold >= 1 else (probability - threshold) / (1 - threshold)
    sure = min(max(sure, 0.0), 1.0)
    ends = zip(Color.parse(low).get_truecolor(), Color.parse(high).get_truecolor(), strict=True)
    return Style(color=text, bgcolor=Color.from_rgb(*(a + sure * (b - a) for a, b in ends)))


def bracket(text: str, depth: int) -> str:
    """` word` of depth 2 as ` [word]`: the spaces around it stay where they are; a line break is `[]` and the break."""
    core = text.strip() or text.strip("\n")
    before = text.partition(core)[0] if core else ""
    return f"{before}{'[' * (depth - 1)}{core}{']' * (depth - 1)}{text[len(before) + len(core) :]}"


def printable(text: str) -> str:
    """`text` without control characters: a model must not steer the terminal."""
    kept = (c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160 or ord(c) in REORDER))
    return "".join(kept)


def summary(num_tokens: int, seconds: float, depths: Sequence[int]) -> str:
    """`64 tokens, 21.3 tokens/s, 7.8 % iterated, mean depth 1.08`"""
    share = sum(depth > 1 for depth in depths) / max(1, len(depths))
    mean = sum(depths) / max(1, len(depths))
    rate = num_tokens / seconds if seconds > 0 else math.inf
    return f"{num_tokens} tokens, {rate:.1f} tokens/s, {share:.1%} iterated, mean depth {mean:.2f}"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to the command, which ends quietly; rich would exit with the code of an error."""
        raise BrokenPipeError


def make_console(*, stderr: bool = False, color: bool = True) -> Console:
    """A console that prints text as it is: no markup, no emoji codes, no highlighting."""
    file = sys.stderr if stderr else sys.stdout
    return _Console(file=file, markup=False, emoji=False, highlight=False, no_color=None if color else True)
