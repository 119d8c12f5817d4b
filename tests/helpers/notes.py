"""A reporter that keeps its lines, for tests to read."""

from __future__ import annotations

from tah.progress import Reporter


class Notes(Reporter):
    """Appends the lines that are reported to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def note(self, line: str) -> None:
        self.lines.append(line)
