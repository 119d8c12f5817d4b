"""Tokens on a terminal, coloured by depth and by continue probability."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from tah.streaming import Token

NEARLY = 0.8  # a token of one pass has a colour from this share of the threshold on
NEARLY_STYLE = "color(179)"
# By depth: (text, background just above the threshold, background at probability 1).
SHADES = {
    2: ("#000000", "#ffe0a3", "#ff9a2e"),
    3: ("#000000", "#ff9d7a", "#f0532d"),
    4: ("#ffffff", "#d33682", "#8c1d5c"),
}
# Invisible characters that reorder the text around them (Unicode bidirectional controls).
REORDER = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


class Painter:
    """Print tokens on a console: with colours on a terminal, elsewhere with brackets around iterated tokens.

    Args:
        console: Console to print on.
        threshold: Threshold of the policy; the colour of a continue probability is relative to it. None: the decisions
            are drawn, and the colour is relative to 1/2.
    """

    def __init__(self, console: Console, threshold: float | None = 0.5) -> None:
        self.console, self.threshold = console, 0.5 if threshold is None else threshold
        self.near = "near threshold" if threshold is not None else "probability near 1/2"
        self.coloured = console.is_terminal and console.color_system is not None and not console.no_color
        self.waiting = 1  # largest depth of the tokens whose last character is incomplete

    def show(self, token: Token) -> None:
        """Print a token on the current line, unbuffered."""
        text, style = self.paint(token)
        if text:
            self.console.print(Segments([Segment(text, style)]), end="", soft_wrap=True)
            self.console.file.flush()

    def text(self, tokens: Sequence[Token]) -> Text:
        """Return an answer as one rich text."""
        return Text.assemble(*((text, style or "") for text, style in map(self.paint, tokens)))

    def paint(self, token: Token) -> tuple[str, Style | None]:
        """Return the printable text of a token, and its style."""
        depth = self.waiting = max(self.waiting, token.depth)
        text = printable(token.text)
        if not text:
            return "", None
        self.waiting = 1
        if self.coloured:
            return text, style_of(depth, token.probability, self.threshold)
        return (bracket(text, depth), None) if depth > 1 else (text, None)

    def legend(self) -> Text:
        """Return the legend of the colours or brackets."""
        if not self.coloured:
            return Text("legend: plain = one pass, [two passes], [[three passes]]", style="dim")
        parts = [("one pass", None), (f" one pass, {self.near} ", style_of(1, self.threshold, self.threshold))]
        parts += [(" two passes ", style_of(2, self.threshold, self.threshold))]
        parts += [
            (" two, probability near 1 ", style_of(2, 1.0, self.threshold)),
            (" three ", style_of(3, 1.0, self.threshold)),
        ]
        line = Text.assemble(("legend: ", "dim"))
        for index, (words, style) in enumerate(parts):
            line.append(" " if index else "").append(words, style)
        return line


def style_of(depth: int, probability: float | None, threshold: float) -> Style | None:
    """Return the style of a token.

    One pass has no background. More passes have a background, which is darker for a higher continue probability.
    """
    if depth == 1:
        nearly = probability is not None and probability > 0 and probability >= NEARLY * threshold
        return Style.parse(NEARLY_STYLE) if nearly else None
    text, low, high = SHADES[min(depth, max(SHADES))]
    sure = 1.0 if probability is None or threshold >= 1 else (probability - threshold) / (1 - threshold)
    sure = min(max(sure, 0.0), 1.0)
    ends = zip(Color.parse(low).get_truecolor(), Color.parse(high).get_truecolor(), strict=True)
    return Style(color=text, bgcolor=Color.from_rgb(*(a + sure * (b - a) for a, b in ends)))


def bracket(text: str, depth: int) -> str:
    """Return ` word` of depth 2 as ` [word]`: brackets exclude the spaces around it; a line break follows `[]`."""
    core = text.strip() or text.strip("\n")
    before = text.partition(core)[0] if core else ""
    return f"{before}{'[' * (depth - 1)}{core}{']' * (depth - 1)}{text[len(before) + len(core) :]}"


def printable(text: str) -> str:
    """Return `text` without control characters: the output of a model must not control the terminal."""
    kept = (c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160 or ord(c) in REORDER))
    return "".join(kept)


def summary(num_tokens: int, seconds: float, depths: Sequence[int]) -> str:
    """Return a line like `64 tokens, 21.3 tokens/s, 7.8% iterated, mean depth 1.08`."""
    share = sum(depth > 1 for depth in depths) / max(1, len(depths))
    mean = sum(depths) / max(1, len(depths))
    rate = num_tokens / seconds if seconds > 0 else math.inf
    return f"{num_tokens} tokens, {rate:.1f} tokens/s, {share:.1%} iterated, mean depth {mean:.2f}"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, which the command handles; rich would exit with the code of an error."""
        raise BrokenPipeError


def make_console(*, stderr: bool = False, color: bool = True) -> Console:
    """Return a console without markup, emoji codes and highlighting."""
    file = sys.stderr if stderr else sys.stdout
    return _Console(file=file, markup=False, emoji=False, highlight=False, no_color=None if color else True)
