"""Tokens on a terminal: whole characters, the right colour, nothing that a model's text could do to the screen."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from tah.core.cache import DuoCache
from tah.streaming import Pieces, Token, TokenStreamer
from tah_cli.terminal import Painter, bracket, printable, style_of, summary


def console(color: bool) -> Console:
    """Prints into memory, as on a terminal of 16 million colours or as into a file."""
    system = "truecolor" if color else None
    return Console(
        file=io.StringIO(),
        force_terminal=color,
        color_system=system,
        markup=False,
        emoji=False,
        no_color=not color,
        width=20,
    )


def shown(tokens: list[Token], color: bool) -> str:
    painter = Painter(console(color))
    for token in tokens:
        painter.show(token)
    return painter.console.file.getvalue()


def decode(ids: list[int]) -> str:
    """Ids as the bytes of UTF-8; broken characters become U+FFFD, as in a byte-level tokenizer."""
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "\u00e9\u6f22\U0001f600!", "a\U0001f469\u200d\U0001f680z", "\n\t \u20ac"])
def test_split_characters_come_out_whole(text):
    pieces = Pieces(decode)
    out = [pieces.add(byte) for byte in text.encode()]
    assert "".join(out) + pieces.flush() == text
    assert not any("\ufffd" in piece for piece in out)


def test_a_character_cut_off_at_the_end_is_dropped():
    pieces = Pieces(decode)
    assert [pieces.add(byte) for byte in "ab\U0001f600".encode()[:-1]] == ["a", "b", "", "", ""]
    assert pieces.flush() == ""


def test_text_before_a_cut_off_character_is_kept():
    pieces = Pieces(lambda ids: "".join(["x\ufffd", "y"][i] for i in ids))
    assert pieces.add(0) == "" and pieces.flush() == "x"


def test_a_split_character_has_the_deepest_colour_of_its_tokens():
    tokens = [Token(1, "", 2, 0.9), Token(2, "\u6f22", 1, 0.1), Token(3, "b", 1, 0.1)]
    assert shown(tokens, color=False) == "[\u6f22]b"


def test_markup_emoji_and_long_lines_of_a_model_are_literal():
    text = "[bold]x[/bold] :smile: 1.5 " + "long " * 20 + "\n end"
    assert shown([Token(1, text, 1, None)], color=False) == text
    assert shown([Token(1, text, 1, None)], color=True) == text


def test_escape_sequences_of_a_model_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\x9b31m\x7f\u202ec\n\t") == "a[2Jb31mc\n\t"
    assert "\x1b" not in shown([Token(1, "\x1b]0;title\x07x", 1, None)], color=True)


def test_colours_on_a_terminal_brackets_elsewhere():
    tokens = [Token(1, "one", 1, 0.1), Token(2, " two", 2, 0.8), Token(3, " deep", 3, 0.9), Token(4, " near", 1, 0.45)]
    assert shown(tokens, color=False) == "one [two] [[deep]] near"
    coloured = shown(tokens, color=True)
    assert coloured.startswith("one\x1b[") and "[two]" not in coloured and coloured.count("\x1b[0m") == 3


def test_brackets_leave_white_space_where_it_is():
    assert [bracket(text, 2) for text in (" a ", "\n", " ", "\n\na", "a")] == [" [a] ", "[]\n", "[ ]", "\n\n[a]", "[a]"]


def test_colour_follows_depth_and_probability():
    assert style_of(1, 0.1, 0.5) is None and style_of(1, None, 0.5) is None and style_of(1, 0.45, 0.5) is not None
    just, sure = style_of(2, 0.5, 0.5), style_of(2, 1.0, 0.5)
    assert just.bgcolor != sure.bgcolor and style_of(2, None, 1.0).bgcolor == sure.bgcolor
    assert style_of(9, 1.0, 0.5) == style_of(4, 1.0, 0.5) != style_of(3, 1.0, 0.5)


def test_streamer_gives_a_token_the_depth_of_the_position_before_it():
    cache, got = DuoCache(), []
    streamer = TokenStreamer(cache, decode, got.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    cache.commit(torch.tensor([[1, 1, 2]]), torch.tensor([[[0.0], [0.0], [2.0]]]))
    streamer.put(torch.tensor([65]))
    cache.commit(torch.tensor([[1]]), torch.tensor([[[float("nan")]]]))
    streamer.put(torch.tensor([66]))
    streamer.end()
    assert [(token.text, token.depth) for token in got] == [("A", 2), ("B", 1)]
    assert got[0].probability == pytest.approx(0.8808, abs=1e-4) and got[1].probability is None


def test_summary():
    assert summary(4, 2.0, [1, 2, 1, 2]) == "4 tokens, 2.0 tokens/s, 50.0% iterated, mean depth 1.50"
    assert summary(0, 0.0, []).startswith("0 tokens")


def test_legend_explains_colours_or_brackets():
    assert "[two passes]" in Painter(console(False)).legend().plain
    assert "two passes" in Painter(console(True)).legend().plain and "[" not in Painter(console(True)).legend().plain
