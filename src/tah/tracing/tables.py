"""The statistics of a trace as Markdown tables. Text from models, data and traces is shown as text there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..stats.bootstrap import Estimate

MARKS = re.compile(r"[\\`*\[\]<>&|#!~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is none
LINKS = re.compile(r"(?i)(https?|ftp):|www\.")  # which GitHub turns into links on its own


def as_markdown(stats: dict[str, Any]) -> str:
    """`overthinking.statistics` as a page of tables."""
    lines = [*_about(stats), *_each_depth(stats)]
    shown = ("iterated", "accuracy", "gain", "loss", "precision", "break_even_precision", "second_choice")
    titles = ["policy", "iterated", "accuracy", "over never", "loss", "precision", "break-even", "second choice there"]
    rows = []
    for name, row in stats["policies"].items():
        title = _plain(name) if row["threshold"] is None else f"{_plain(name)} > {row['threshold']:.4g}"
        rows.append([title, *(_number(row[n]) if n == "loss" else _percent(row[n]) for n in shown)])
    over = ", ".join(f"{_percent(gap)} {_plain(name)}" for name, gap in stats["headroom"].items())
    lines += [*_section("Who iterates", titles, rows), "", f"Headroom of the oracle: {over}."]
    rows = [
        [
            *(_plain(name), _plain(label), _percent(its["auroc"]), _percent(its["average_precision"])),
            f"{its['share']:.2%}",
        ]
        for name, labels in stats["scores"].items()
        for label, its in labels.items()
    ]
    titles = ["score", "finds", "AUROC", "average precision", "share of such tokens"]
    lines += _section("How well scores find wrong tokens, and tokens that gain", titles, rows)
    rows = [[_code(t["text"]), f"{t['count']:,}", f"{t['iterated']:.1%}"] for t in stats["iterated_tokens"]]
    lines += _section("Tokens most often iterated", ["token", "count", "iterated"], rows)
    return "\n".join(lines) + "\n"


def _about(stats: dict[str, Any]) -> list[str]:
    about, counted = stats["about"], "tokens" if stats["every_token"] else "supervised tokens"
    measure = f" ({_plain(about['confidence_measure'])})" if about.get("confidence_measure") else ""
    model, data, policy = (_plain(about[name]) for name in ("model", "data", "policy"))
    lines = [
        f"# {model} on {data}",
        "",
        f"{stats['tokens']:,} {counted} of {stats['texts']:,} texts, at most {about['max_depth']} passes, policy "
        f"{policy}{measure} at {about['threshold']:.4g}. Intervals: {stats['level']:.0%}, by drawing texts.",
    ]
    if stats["missing_texts"]:
        lines += ["", f"Unfinished: {stats['missing_texts']:,} texts are missing."]
    if not stats["exact"]:
        exact = "never, always and own policy" if about["final"] == "run" else "never and always"
        why = f'Deeper passes read each other (attention "duo"): all but {exact} are approximated by outputs of a run'
        lines += ["", f"{why} where every token iterated."]
    return lines


def _each_depth(stats: dict[str, Any]) -> list[str]:
    depths = [[str(row["depth"]), _percent(row["accuracy"]), _number(row["loss"])] for row in stats["depths"]]
    names = ("corrected", "broken", "break_even_precision", "improved", "worsened")
    passes = [[str(row["depth"]), *(_percent(row[name]) for name in names)] for row in stats["passes"]]
    titles = ["wrong ones corrected", "right ones broken", "break-even precision", "loss falls", "loss rises"]
    return [
        *_section("After each pass, if every token runs it", ["depth", "accuracy", "loss"], depths),
        *_section("What deeper passes change", ["up to depth", *titles], passes),
    ]


def _section(title: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A heading and a table; nothing where the table is empty."""
    lines = [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]
    return ["", f"## {title}", "", *lines] if len(lines) > 2 else []


def _percent(estimate: Estimate) -> str:
    return _number(estimate, 100, " %")


def _number(estimate: Estimate | None, times: float = 1, unit: str = "") -> str:
    """`81.80 % (81.21 to 82.40)`, or - where undefined."""
    if estimate is None or estimate["value"] is None:
        return "-"
    digits = 2 if unit else 4
    text = f"{estimate['value'] * times:.{digits}f}{unit}"
    low, high = estimate["low"], estimate["high"]
    return text if low is None or high is None else f"{text} ({low * times:.{digits}f} to {high * times:.{digits}f})"


def _plain(text: Any) -> str:
    """Any text as itself, on one line: what Markdown or HTML would interpret is escaped."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
    shown = MARKS.sub(lambda mark: "&lt;" if mark[0] == "<" else "&amp;" if mark[0] == "&" else f"\\{mark[0]}", shown)
    return LINKS.sub(lambda link: f"{link[0][:-1]}\\{link[0][-1]}", shown)


def _code(text: str) -> str:
    """Any text in a cell of a table, as code."""
    return "`" + (repr(text)[1:-1].replace("|", "\\|").replace("`", "'") or "(empty)") + "`"
