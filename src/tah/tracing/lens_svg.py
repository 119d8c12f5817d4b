"""The charts of the depth lens as SVG: `overthinking.statistics` drawn. Colours are classes of lens.css."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..stats.bootstrap import Estimate

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 16, 46  # margins
LETTER = 6.6  # width of one, of the small print
Named = Sequence[tuple[str, dict[str, Any]]]  # mark of a trace, its statistics
REACHED = ("never", "always", "own policy", "oracle", "hindsight")  # policies that are points, not curves


def percent(value: float) -> str:
    return f"{value * 100:.4g} %"


class Chart:
    """Axes, and what is drawn between them.

    Args:
        title: what it shows, for those who cannot see it.
        x, y: (lowest, highest) value.
    """

    def __init__(self, title: str, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.title, self.x, self.y = title, x, y
        self.parts: list[str] = []
        self.taken: list[tuple[float, float, float, float]] = []  # boxes of labels: left, top, right, bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    def draw(self, tag: str, name: str, said: str = "", **attributes: Any) -> None:
        """An element of a class, with words that show when the mouse is over it."""
        values = " ".join(f'{key.replace("_", "-")}="{_short(value)}"' for key, value in attributes.items())
        inside = f"<title>{escape(said)}</title>" if said else ""
        self.parts.append(f'<{tag} class="{name}" {values}>{inside}</{tag}>')

    def write(self, x: float, y: float, text: str, name: str = "small", anchor: str = "middle", turn: str = "") -> None:
        turned = f' transform="{turn}"' if turn else ""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{name}" {place}{turned}>{escape(text)}</text>')

    def axes(
        self,
        across: str,
        up: str,
        ticks: Sequence[tuple[float, str]] | None = None,
        shown: Callable[[float], str] = percent,
        shown_x: Callable[[float], str] = percent,
    ) -> None:
        """Lines at round values of y, ticks at those of x or the ones given, and what both measure."""
        for value in steps(*self.y):
            left, y = self.at(self.x[0], value)
            self.draw("line", "grid", x1=left, x2=WIDTH - RIGHT, y1=y, y2=y)
            self.write(LEFT - 7, y + 4, shown(value), anchor="end")
        for value, text in ticks if ticks is not None else [(value, shown_x(value)) for value in steps(*self.x)]:
            self.write(self.at(value, 0)[0], HEIGHT - BOTTOM + 17, text)
        self.draw("line", "axis", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM)
        self.write((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, across, "label")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        self.write(13, middle, up, "label", turn=f"rotate(-90 13 {middle:.1f})")

    def line(self, points: Sequence[tuple[float, float]], name: str) -> None:
        self.draw("polyline", f"line {name}", points=self._pixels(points))

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], name: str) -> None:
        edge = [*zip(x, low, strict=True), *reversed(list(zip(x, high, strict=True)))]
        self.draw("polygon", f"band {name}", points=self._pixels(edge))

    def point(self, x: float, y: float, name: str, said: str) -> None:
        """A dot."""
        left, top = self.at(x, y)
        self.draw("circle", f"dot {name}", said, cx=left, cy=top, r=4.5)
        self.taken.append((left - 5, top - 5, left + 5, top + 5))

    def bar(self, x: float, width: float, value: Estimate, name: str, said: str, zero: float = 0.0) -> None:
        """From zero up, with its interval; `width` in pixels."""
        left, top = self.at(x, value["value"] or 0.0)
        _, foot = self.at(x, zero)
        self.draw("rect", f"bar {name}", said, x=left - width / 2, y=top, width=width, height=max(foot - top, 0.5))
        self.whisker(x, value)

    def whisker(self, x: float, value: Estimate) -> None:
        if value["low"] is not None and value["high"] is not None:
            (left, low), (_, high) = self.at(x, value["low"]), self.at(x, value["high"])
            self.draw("path", "whisker", d=f"M{left:.1f} {low:.1f}V{high:.1f}m-4 0h8M{left - 4:.1f} {low:.1f}h8")

    def name(self, x: float, y: float, text: str) -> None:
        """A point's name, on the first side where it overlaps no other point or name; nowhere if there is none."""
        left, top = self.at(x, y)
        wide = len(text) * LETTER
        sides = [
            (8, 4, "start"),
            (-8, 4, "end"),
            (0, -10, "middle"),
            (0, 18, "middle"),
            (8, -8, "start"),
            (8, 16, "start"),
        ]
        for dx, dy, anchor in sides:
            start = left + dx - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            box = (start, top + dy - 10, start + wide, top + dy + 3)
            inside = box[0] > LEFT and box[2] < WIDTH and box[1] > 0 and box[3] < HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                self.write(left + dx, top + dy, text, "small name", anchor)
                return

    def _pixels(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*self.at(*point)) for point in points)

    def svg(self, height: int = HEIGHT, extra: str = "") -> str:
        head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(self.title)}" {extra}>'
        return f"{head}{''.join(self.parts)}</svg>"


# -- charts ----------------------------------------------------------------------------------------------------------


def depth_chart(named: Named, what: str) -> str:
    """`accuracy` or `loss` after each depth, if everyone runs it."""
    shown, unit = ((lambda value: f"{value:.2%}"), "right") if what == "accuracy" else ("{:.4f}".format, "nats")
    M = max(len(stats["depths"]) for _, stats in named)
    rows = [row[what] for _, stats in named for row in stats["depths"]]
    values = [value for row in rows for value in row.values()]
    chart = Chart(f"{what.capitalize()} after each depth", (0.5, M + 0.5), around(values))
    title = "first choice is right" if what == "accuracy" else "loss (nats)"
    ticks = [(float(d), str(d)) for d in range(1, M + 1)]
    chart.axes("depth", title, ticks, percent if what == "accuracy" else "{:.4g}".format)
    for number, (mark, stats) in enumerate(named):
        points = [(row["depth"] + 0.04 * (2 * number - len(named) + 1), row[what]["value"]) for row in stats["depths"]]
        side, anchor = (-9, "end") if number < len(named) - 1 else (9, "start")  # of two, the first on the left
        chart.line(points, mark)
        for (x, value), row in zip(points, stats["depths"], strict=True):
            chart.whisker(x, row[what])
            chart.point(x, value, mark, f"{mark}, depth {row['depth']}: {shown(value)} {unit}")
            left, top = chart.at(x, value)
            chart.write(left + side, top - 8, shown(value), "small name", anchor)
    return chart.svg()


def pass_chart(named: Named) -> str | None:
    """Of the wrong tokens, how many deeper passes correct; of the right ones, how many they break."""
    bars = [(mark, row, what) for mark, stats in named for row in stats["passes"] for what in ("corrected", "broken")]
    if not bars:
        return None
    most = max(max(row[what]["value"] or 0, row[what]["high"] or 0) for _, row, what in bars)
    chart = Chart("Tokens corrected and broken", (0, len(bars)), (0, max(most * 1.1, 0.001)))
    ticks = [(2 * at + 1.0, f"{mark}, depth {row['depth']}") for at, (mark, row, _) in enumerate(bars[::2])]
    if len(bars) == 2:
        ticks = [(0.62, "wrong, then right"), (1.38, "right, then wrong")]
    chart.axes("", "share of them", ticks)
    width = min(90.0, 260 / len(bars))
    for at, (mark, row, what) in enumerate(bars):
        of = "wrong ones corrected" if what == "corrected" else "right ones broken"
        value, x = row[what]["value"], at + (0.62 if at % 2 == 0 else 0.38)
        said = f"{mark}, up to depth {row['depth']}: {of}" + ("" if value is None else f" {percent(value)}")
        chart.bar(x, width, row[what], what, said)
        if value is not None:
            chart.write(chart.at(x, 0)[0], chart.at(0, row[what]["high"] or value)[1] - 6, f"{value:.2%}", "small name")
    return chart.svg()


def compute_chart(mark: str, stats: dict[str, Any]) -> str | None:
    """Accuracy against mean depth: a curve for each score, by its threshold, and points for policies without one."""
    curves, policies = stats["curves"], stats["policies"]
    if not curves:
        return None
    points = {name: policies[name] for name in REACHED if name in policies}
    values = [row["accuracy"]["value"] for row in points.values()]
    values += [value for its in curves.values() for value in its["accuracy"]]
    first = next(iter(curves))
    values += [value for end in ("low", "high") for value in curves[first][end]]
    deepest = max(its["mean_depth"][-1] for its in curves.values())
    chart = Chart("Accuracy against compute", (1, deepest), around(values))
    chart.axes("passes per token", "first choice is right", shown_x=lambda value: f"{value:.4g}")
    its = curves[first]
    if its["low"][0] is not None:
        chart.band(its["mean_depth"], its["low"], its["high"], first)
    for name, its in curves.items():
        chart.line(list(zip(its["mean_depth"], its["accuracy"], strict=True)), name)
    never = policies["never"]["accuracy"]["value"]
    chart.line([(1, never), (deepest, never)], "level")
    for name, row in points.items():
        x, y = row["mean_depth"]["value"], row["accuracy"]["value"]
        said = f"{name}: {percent(y)} right, {percent(row['iterated']['value'])} iterated, {x:.3f} passes per token"
        chart.point(x, y, "own" if name == "own policy" else "plain", said)
    for name, row in points.items():
        chart.name(row["mean_depth"]["value"], row["accuracy"]["value"], name)
    corners = (*chart.at(chart.x[0], chart.y[0]), *chart.at(chart.x[1], chart.y[1]))
    chart.parts.append('<circle class="now" r="7"><title>The rule chosen above the text</title></circle>')
    places = " ".join(f"{value:.6g}" for value in (*chart.x, *chart.y, *corners))
    return chart.svg(extra=f'class="compute" data-mark="{mark}" data-scale="{places}"')


def calibration_chart(stats: dict[str, Any]) -> str | None:
    """Of the tokens that the decider gave a probability, how many were wrong or gain from a pass."""
    scores = stats["scores"].get("decider")
    if scores is None:
        return None
    chart = Chart("Calibration of the decider", (0, 1), (0, 1))
    chart.axes("decider's probability of going on", "share where that is so")
    chart.line([(0, 0), (1, 1)], "level")
    for label, title in (("wrong", "wrong after depth 1"), ("gain", "gain from a pass")):
        bins = scores[label]["calibration"]
        chart.line([(its["said"], its["was"]) for its in bins], label)
        for its in bins:
            said = f"{its['tokens']:,} tokens at {its['said']:.3f}: {percent(its['was'])} {title}"
            chart.point(its["said"], its["was"], label, said)
    return chart.svg()


def iterated_chart(stats: dict[str, Any], most: int = 12) -> str | None:
    """The tokens most often iterated, as bars from the left."""
    rows = stats["iterated_tokens"][:most]
    if not rows:
        return None
    chart = Chart("Tokens most often iterated", (0, 1), (0, 1))
    step, start, full = 21, 130, WIDTH - 130 - 96
    scale = full / max(row["iterated"] for row in rows)
    for at, row in enumerate(rows):
        y = 8 + at * step
        shown = visible(row["text"])
        shown = shown if len(shown) <= 15 else f"{shown[:14]}\u2026"
        said = f"token {row['id']}: {row['count']:,} times, {percent(row['iterated'])} iterated"
        chart.write(start - 8, y + 14, shown, "token", "end")
        chart.draw("rect", "bar depth", said, x=start, y=y + 2, width=row["iterated"] * scale, height=step - 6, rx=2)
        words = f"{row['iterated']:.1%} of {row['count']:,}"
        chart.write(start + row["iterated"] * scale + 6, y + 14, words, anchor="start")
    return chart.svg(height=16 + step * len(rows))


def visible(text: str) -> str:
    """A token with its spaces and line ends to be seen, and nothing that reorders the text around it."""
    return "".join("\u2423" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


# -- scales ----------------------------------------------------------------------------------------------------------


def around(values: Sequence[float | None]) -> tuple[float, float]:
    """A range with room around all the values that are there."""
    found = [value for value in values if value is not None]
    low, high = min(found), max(found)
    room = max((high - low) * 0.12, 0.002)
    return low - room, high + room


def steps(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from low to high, at most so many."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [at * step for at in range(first, last + 1)]


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _short(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else escape(str(value))
