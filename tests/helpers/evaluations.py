"""Small evaluations that more than one test module runs."""

from __future__ import annotations

import json
from pathlib import Path

from tah.evaluation.evaluate import evaluate
from tah.evaluation.request import Sampling
from tah.progress import Reporter

ITEMS = Path(__file__).parents[1] / "evaluation" / "items"
LONG = {"max_position_embeddings": 512}
SHORT = Sampling(samples=2, max_new_tokens=24, temperature=0.7)


class Notes(Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def go(model, output, **options):
    """Two tasks, two policies, two samples."""
    data = {"gsm8k": ITEMS / "math.jsonl", "arc_e": ITEMS / "choice.jsonl"}
    given = {"tasks": list(data), "data": data, "policies": ["never", "random"], "sampling": SHORT, "batch_size": 3}
    return evaluate(str(model), output=output, **{**given, **options})


def lines_of(directory: Path) -> dict[str, list[dict]]:
    """All answers but the time they took."""
    found = {}
    for path in sorted((directory / "samples").rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(directory))] = [line | {"seconds": 0} for line in lines]
    return found
