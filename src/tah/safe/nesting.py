"""How deep brackets stand inside each other in JSON, measured before a parser descends into them.

pyarrow's parser ends in a segmentation fault at 20,000 brackets, and Python's raises RecursionError at some thousand.
The measure takes linear time and reads a file in chunks. Brackets inside strings do not count.
"""

from __future__ import annotations

import numpy as np

DEEPEST = 60  # brackets; Arrow stores 64 levels at most, and the tool schemas of public data sets have about 20
TOO_DEEP = f"has brackets more than {DEEPEST} deep inside each other"
OTHERS = bytes(byte for byte in range(256) if byte not in b'"[]{}\n')


class Nesting:
    """The depth of a text that arrives in chunks.

    A string ends at the latest with its line, since JSON has no line breaks in strings: parsers start again at a line
    wherever they like, so a quotation mark that is never closed must not hide the brackets after it. For the same
    reason a closing bracket that has no opening one leaves the depth at 0.
    """

    def __init__(self) -> None:
        self._depth, self._in_string, self._line, self._kept = 0, 0, 1, b""

    def add(self, chunk: bytes) -> int | None:
        """The line, counted from 1, in which the text is deeper than `DEEPEST` for the first time; else None."""
        chunk = self._kept + chunk
        backslashes = len(chunk) - len(chunk.rstrip(b"\\"))
        self._kept = b"\\" if backslashes % 2 else b""  # it may escape what the next chunk begins with
        chunk = chunk[: len(chunk) - len(self._kept)]
        unescaped = chunk.replace(rb"\\", b"").replace(rb"\"", b"")  # a run of backslashes, in pairs from its start
        kept = np.frombuffer(unescaped.translate(None, OTHERS), np.uint8)
        if not len(kept):
            return None
        quotes, breaks = self._in_string + np.cumsum(kept == ord('"')), kept == ord("\n")
        inside = (quotes - np.maximum.accumulate(np.where(breaks, quotes, 0))) % 2
        opens = ((kept == ord("[")) | (kept == ord("{"))) & (inside == 0)
        closes = ((kept == ord("]")) | (kept == ord("}"))) & (inside == 0)
        sums = self._depth + np.cumsum(opens.astype(np.int64) - closes)
        depths = sums - np.minimum(np.minimum.accumulate(sums), 0)
        self._depth, self._in_string = int(depths[-1]), int(inside[-1])
        if depths.max() > DEEPEST:
            return self._line + int(breaks[: int((depths > DEEPEST).argmax())].sum())
        self._line += int(breaks.sum())
        return None


def too_deep(text: str | bytes) -> bool:
    """Whether brackets are more than `DEEPEST` deep in a text that is there as a whole."""
    text = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    return text.count(b"[") + text.count(b"{") > DEEPEST and Nesting().add(text) is not None
