"""The charts of a report as PNG, for papers and slides: `overthinking.statistics` drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ..files import write_atomically

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("charts need one more package: pip install 'tah[report]'") from error

COLOURS = {"decider": "#d97706", "confidence": "#2158c4", "entropy": "#7a3fc0", "wrong": "#2158c4", "gain": "#08786a"}
CORRECTED, BROKEN = "#08786a", "#be1647"
POINTS = {"never": "v", "always": "^", "own policy": "o", "oracle": "*", "hindsight": "P"}  # and their markers
NAMES = {"confidence": "1 - top probability"}


def draw_charts(stats: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """Files accuracy.png, loss.png, passes.png, compute.png and calibration.png, as far as there is something to show.

    Args:
        stats: of one trace, or of two: the files of the second are named accuracy-B.png, ...
        directory: for the files; made if needed.

    Raises:
        OSError: a file cannot be written; names it.
    """
    written = []
    for its, suffix in zip(stats, ("", "-B"), strict=False):
        charts: dict[str, Callable[..., None]] = {"accuracy": _accuracy, "loss": _loss}
        if its["passes"]:
            charts |= {"passes": _passes, "compute": _compute}
        if "decider" in its["scores"]:
            charts["calibration"] = _calibration
        for name, draw in charts.items():
            figure = Figure(figsize=(4.6, 3.4), layout="constrained")
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.9")
            axes.set_axisbelow(True)
            draw(axes, its)
            content = BytesIO()
            figure.savefig(content, format="png", dpi=200)
            written.append(directory / f"{name}{suffix}.png")
            write_atomically(written[-1], content.getvalue())
    return written


def _accuracy(axes: Axes, stats: dict[str, Any]) -> None:
    _by_depth(axes, stats["depths"], "accuracy", 100)
    axes.set_ylabel("accuracy (%)")


def _loss(axes: Axes, stats: dict[str, Any]) -> None:
    _by_depth(axes, stats["depths"], "loss", 1)
    axes.set_ylabel("loss (nats)")


def _by_depth(axes: Axes, rows: Sequence[dict[str, Any]], name: str, times: float) -> None:
    depths, values = [row["depth"] for row in rows], [row[name]["value"] * times for row in rows]
    errors = _errors([row[name] for row in rows], times)
    axes.errorbar(depths, values, errors, marker="o", capsize=4, color=COLOURS["confidence"])
    axes.set_xticks(depths)
    axes.set_xlim(0.5, len(rows) + 0.5)
    axes.set_xlabel("depth, if every token runs it")


def _passes(axes: Axes, stats: dict[str, Any]) -> None:
    width = 0.38
    for side, (name, title, colour) in enumerate(
        (("corrected", "wrong ones corrected", CORRECTED), ("broken", "right ones broken", BROKEN))
    ):
        found = [(row["depth"], row[name]) for row in stats["passes"] if row[name]["value"] is not None]
        x = [depth + (side - 0.5) * width for depth, _ in found]
        rows = [row for _, row in found]
        values = [100 * row["value"] for row in rows]
        axes.bar(x, values, width * 0.9, yerr=_errors(rows, 100), capsize=4, color=colour, label=title)
    axes.set_xticks([row["depth"] for row in stats["passes"]])
    axes.set_xlabel("up to depth")
    axes.set_ylabel("share of them (%)")
    axes.legend(frameon=False)


def _compute(axes: Axes, stats: dict[str, Any]) -> None:
    for at, (name, its) in enumerate(stats["curves"].items()):
        colour = COLOURS[name]
        axes.plot(its["mean_depth"], _percents(its["accuracy"]), color=colour, label=NAMES.get(name, name))
        if at == 0 and None not in its["low"]:
            axes.fill_between(
                its["mean_depth"], _percents(its["low"]), _percents(its["high"]), color=colour, alpha=0.15
            )
    policies = stats["policies"]
    axes.axhline(100 * policies["never"]["accuracy"]["value"], color="0.5", linestyle="--", linewidth=1)
    for name, marker in POINTS.items():
        row = policies[name]
        x, y = row["mean_depth"]["value"], 100 * row["accuracy"]["value"]
        axes.plot(x, y, marker, color="0.15", markersize=6, label=name, linestyle="none")
    axes.set_xlabel("passes per token")
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, fontsize="x-small")


def _calibration(axes: Axes, stats: dict[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1)
    for label, title in (("wrong", "wrong after depth 1"), ("gain", "gains from a pass")):
        bins = stats["scores"]["decider"][label]["calibration"]
        said, was = [its["said"] for its in bins], [its["was"] for its in bins]
        axes.plot(said, was, marker="o", color=COLOURS[label], label=title)
    axes.set_xlabel("decider's probability of going on")
    axes.set_ylabel("share where that is so")
    axes.legend(frameon=False)


def _percents(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _errors(rows: Sequence[dict[str, float]], times: float) -> list[list[float]] | None:
    """How far intervals reach below and above; None where they are unknown."""
    if any(row["low"] is None or row["high"] is None for row in rows):
        return None
    below = [max(0.0, times * (row["value"] - row["low"])) for row in rows]
    above = [max(0.0, times * (row["high"] - row["value"])) for row in rows]
    return [below, above]
