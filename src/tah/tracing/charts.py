"""The charts of a report: `overthinking.statistics` drawn as SVG for the page, and as PNG for papers and slides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..files import write_atomically
from ..stats.bootstrap import Estimate
from ..stats.charts import COLOURS, as_png, as_svg, new_chart, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Named = Sequence[tuple[str, dict[str, Any]]]  # mark of a trace (A or B), its statistics
MARKS = {"A": COLOURS["blue"], "B": COLOURS["violet"]}
SCORES = {
    "decider": ("decider", COLOURS["amber"]),
    "confidence": ("1 \u2212 top probability", COLOURS["blue"]),
    "entropy": ("entropy", COLOURS["violet"]),
}
CHANGES = {"corrected": ("corrected, of wrong", COLOURS["teal"]), "broken": ("broken, of right", COLOURS["crimson"])}
FOUND = {"wrong": ("wrong after depth 1", COLOURS["blue"]), "gain": ("gains from a pass", COLOURS["teal"])}
POINTS = {"never": "v", "always": "^", "own policy": "o", "oracle": "*", "hindsight": "P"}  # policies, their markers
LEVEL: dict[str, Any] = {"color": COLOURS["soft"], "linestyle": "--", "linewidth": 1}
BARS, LONGEST = 12, 15  # maximum number of tokens in the chart of iterated tokens; maximum length of a token there


class Chart(NamedTuple):
    name: str  # file name without suffix
    title: str
    figure: Figure


@styled()
def save_charts(stats: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """Write the charts as PNG files and return their paths.

    The files are accuracy.png, loss.png, passes.png, compute.png and calibration.png. A chart without data is left out.

    Args:
        stats: Statistics of one or two traces. The files of the second trace are named accuracy-B.png, ...
        directory: Directory of the files; made if it does not exist.

    Raises:
        OSError: A file cannot be written. The message names it.
    """
    written = []
    for its, suffix in zip(stats, ("", "-B"), strict=False):
        for chart in (*_of_all([("A", its)]), *_of_one(its)):
            if chart.name != "iterated":  # its tokens may be of any script, for which a browser has the fonts
                written.append(directory / f"{chart.name}{suffix}.png")
                write_atomically(written[-1], as_png(chart.figure))
    return written


@styled()
def page_charts(named: Named) -> list[dict[str, Any]]:
    """Return the charts of the page in order.

    Each has a name, a title and the svg. A chart of one trace also has the mark and the statistics of that trace.
    """
    charts = [{**chart._asdict(), "svg": as_svg(chart.figure, chart.title)} for chart in _of_all(named)]
    for mark, stats in named:
        for chart in _of_one(stats):
            svg = as_svg(chart.figure, chart.title)
            if chart.name == "compute":
                svg = f"{svg.removesuffix('</svg>')}{_ring(chart.figure, mark)}</svg>"
            charts.append({**chart._asdict(), "svg": svg, "mark": mark, "stats": stats})
    return charts


def _of_all(named: Named) -> Iterator[Chart]:
    yield Chart("accuracy", "Accuracy after each depth", _depths(named, "accuracy", "accuracy", "{:.2%}"))
    yield Chart("loss", "Loss after each depth", _depths(named, "loss", "loss (nats)", "{:.4f}"))
    if any(stats["passes"] for _, stats in named):
        yield Chart("passes", "Tokens corrected and broken", _passes(named))


def _of_one(stats: dict[str, Any]) -> Iterator[Chart]:
    if stats["curves"]:
        yield Chart("compute", "Accuracy against compute", _compute(stats))
    if "decider" in stats["scores"]:
        yield Chart("calibration", "Calibration of the decider", _calibration(stats["scores"]["decider"]))
    if stats["iterated_tokens"]:
        yield Chart("iterated", "Tokens most often iterated", _iterated(stats["iterated_tokens"][:BARS]))


# -- charts ----------------------------------------------------------------------------------------------------------


def _depths(named: Named, what: str, title: str, form: str) -> Figure:
    """Draw accuracy or loss after each depth, if every token reaches it."""
    figure, axes = new_chart()
    for number, (mark, stats) in enumerate(named):
        rows = [row[what] for row in stats["depths"]]
        side = 2 * number - len(named) + 1  # the points of the first of two traces are on the left
        at = [row["depth"] + 0.04 * side for row in stats["depths"]]
        values = [row["value"] for row in rows]
        axes.errorbar(at, values, _errors(rows), marker="o", capsize=4, color=MARKS[mark], label=mark)
        for x, value in zip(at, values, strict=True):
            _write(axes, form.format(value), x, value, *((-8, "right") if side < 0 else (8, "left")))
    most = max(len(stats["depths"]) for _, stats in named)
    axes.set(xlabel="depth of every token", ylabel=title, xlim=(0.5, most + 0.5), xticks=range(1, most + 1))
    axes.margins(y=0.15)
    if what == "accuracy":
        axes.yaxis.set_major_formatter(_percent)
    if len(named) > 1:
        axes.legend()
    return figure


def _passes(named: Named) -> Figure:
    """Draw the share of wrong tokens that deeper passes correct, and the share of right tokens that they break."""
    figure, axes = new_chart()
    passes = [(mark, row) for mark, stats in named for row in stats["passes"]]
    for side, (name, (title, colour)) in zip((-0.2, 0.2), CHANGES.items(), strict=True):
        found = [(number + side, row[name]) for number, (_, row) in enumerate(passes) if row[name]["value"] is not None]
        rows = [row for _, row in found]
        values = [row["value"] for row in rows]
        at = [x for x, _ in found]
        axes.bar(at, values, 0.36, color=colour, label=title)
        axes.errorbar(at, values, _errors(rows), fmt="none", capsize=4, color=COLOURS["ink"])
        for x, row in found:
            _write(axes, f"{row['value']:.2%}", x, row["high"] or row["value"], 0, "center")
    names = [f"{mark}, {row['depth']}" if len(named) > 1 else str(row["depth"]) for mark, row in passes]
    axes.set_xticks(range(len(passes)), names)
    axes.set(xlabel="up to depth", ylabel="share")
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter(_percent)
    axes.legend()
    return figure


def _compute(stats: dict[str, Any]) -> Figure:
    """Draw accuracy against mean depth: a curve per score (by threshold), and a point per policy without a score."""
    figure, axes = new_chart()
    for at, (name, its) in enumerate(stats["curves"].items()):
        title, colour = SCORES[name]
        axes.plot(its["mean_depth"], its["accuracy"], color=colour, label=title, gid=f"curve {name}")
        if at == 0 and None not in its["low"]:
            axes.fill_between(its["mean_depth"], its["low"], its["high"], color=colour, alpha=0.13, linewidth=0)
    policies = stats["policies"]
    axes.axhline(policies["never"]["accuracy"]["value"], **LEVEL)
    for name, marker in POINTS.items():
        if (row := policies.get(name)) is None:  # a mixture whose trace has other weights
            continue
        x, y = row["mean_depth"]["value"], row["accuracy"]["value"]
        axes.plot(x, y, marker, color=COLOURS["amber" if name == "own policy" else "ink"], label=name)
    axes.set(xlabel="passes per token", ylabel="accuracy")
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(fontsize="x-small")
    return figure


def _ring(figure: Figure, mark: str) -> str:
    """Return a circle with the scale of the chart. The script of the page moves it to the policy chosen there."""
    (axes,), top = figure.axes, figure.bbox.height
    (x0, x1), (y0, y1), box = axes.get_xlim(), axes.get_ylim(), axes.get_window_extent()
    scale = " ".join(f"{v:.6g}" for v in (x0, x1, y0, y1, box.x0, top - box.y0, box.x1, top - box.y1))
    return f'<circle class="now" r="7" data-mark="{mark}" data-scale="{scale}"></circle>'


def _calibration(found: dict[str, Any]) -> Figure:
    """Draw, by the decider's probability, the share of tokens that are wrong and the share that gain from a pass."""
    figure, axes = new_chart()
    axes.plot([0, 1], [0, 1], **LEVEL)
    for name, (title, colour) in FOUND.items():
        bins = found[name]["calibration"]
        axes.plot([b["said"] for b in bins], [b["was"] for b in bins], marker="o", color=colour, label=title)
    axes.set(xlabel="decider's continue probability", ylabel="share of tokens")
    axes.legend()
    return figure


def _iterated(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the tokens most often iterated as horizontal bars."""
    figure, axes = new_chart(height=0.5 + 0.29 * len(rows))
    bars = axes.barh(range(len(rows)), [row["iterated"] for row in rows], color=COLOURS["amber"])
    axes.bar_label(bars, [f"{row['iterated']:.1%} of {row['count']:,}" for row in rows], padding=5, fontsize="small")
    texts = [visible(row["text"]) for row in rows]
    texts = [text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\u2026" for text in texts]
    axes.set_yticks(range(len(rows)), texts, color=COLOURS["ink"], family="monospace")
    axes.set(xticks=[], xlim=(0, 1.35 * rows[0]["iterated"]), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def visible(text: str) -> str:
    """Return a token with visible spaces and line ends, and with characters escaped that would reorder other text."""
    return "".join("\u2423" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


def _write(axes: Axes, text: str, x: float, y: float, away: int, anchor: Literal["left", "center", "right"]) -> None:
    """Write a number above a point of the chart, `away` points to its right."""
    place: dict[str, Any] = {"xytext": (away, 5), "textcoords": "offset points"}
    axes.annotate(text, (x, y), ha=anchor, fontsize="small", color=COLOURS["ink"], **place)


def _percent(value: float, _: float) -> str:
    return f"{100 * value:.4g}%"


def _errors(rows: Sequence[Estimate]) -> list[list[float]] | None:
    """Return the lengths of the intervals below and above their values; None if an interval is unknown."""
    if any(row["low"] is None or row["high"] is None for row in rows):
        return None
    below = [max(0.0, row["value"] - row["low"]) for row in rows]  # type: ignore[operator]
    above = [max(0.0, row["high"] - row["value"]) for row in rows]  # type: ignore[operator]
    return [below, above]
