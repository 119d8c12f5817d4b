"""The statistics of a trace as tables, for its page and as Markdown. Text from models, data and traces stays text."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ..markdown import estimate, table
from ..stats.bootstrap import Estimate

MARKS = re.compile(r"[\\`*\[\]<>&|#!~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is none
LINKS = re.compile(r"(?i)(https?|ftp):|www\.")  # which GitHub turns into links on its own
CHANGES = {
    "wrong ones corrected": "corrected",
    "right ones broken": "broken",
    "break-even precision": "break_even_precision",
    "loss falls": "improved",
    "loss rises": "worsened",
}
POLICIES = {
    "iterated": "iterated",
    "accuracy": "accuracy",
    "over never": "gain",
    "loss": "loss",
    "precision": "precision",
    "break-even": "break_even_precision",
    "second choice there": "second_choice",
}


class Cell(NamedTuple):
    text: str  # any
    more: str = ""  # ours: an interval, a threshold


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    below: str = ""


def tables_of(stats: dict[str, Any]) -> list[Table]:
    """`overthinking.statistics` as tables, as far as there is something to show."""
    depths = [[Cell(str(row["depth"])), _percent(row["accuracy"]), _nats(row["loss"])] for row in stats["depths"]]
    passes = [[Cell(str(row["depth"])), *(_percent(row[key]) for key in CHANGES.values())] for row in stats["passes"]]
    policies = []
    for name, row in stats["policies"].items():
        first = Cell(name, "" if row["threshold"] is None else f" > {row['threshold']:.4g}")
        policies.append([first, *((_nats if key == "loss" else _percent)(row[key]) for key in POLICIES.values())])
    scores = [
        [
            Cell(name),
            Cell(label),
            _percent(its["auroc"]),
            _percent(its["average_precision"]),
            Cell(f"{its['share']:.2%}"),
        ]
        for name, labels in stats["scores"].items()
        for label, its in labels.items()
    ]
    over = ", ".join(f"{''.join(_percent(gap))} {name}" for name, gap in stats["headroom"].items())
    tables = [
        Table("After each pass, if every token runs it", ["depth", "accuracy", "loss"], depths),
        Table("What deeper passes change", ["up to depth", *CHANGES], passes),
        Table("Who iterates", ["policy", *POLICIES], policies, f"Headroom of the oracle: {over}."),
        Table(
            "How well scores find wrong tokens, and tokens that gain",
            ["score", "finds", "AUROC", "average precision", "share of such tokens"],
            scores,
        ),
    ]
    return [each for each in tables if each.rows]


def difference_table(found: dict[str, Any]) -> Table:
    """`overthinking.compare` as a table."""
    rows = [[Cell(name), _percent(row["accuracy"]), _nats(row["loss"])] for name, row in found["difference"].items()]
    return Table("", ["policy", "accuracy, B less A", "loss, B less A"], rows)


def as_markdown(stats: dict[str, Any]) -> str:
    """`overthinking.statistics` as a page of tables."""
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
    for each in tables_of(stats):
        rows = [[f"{_plain(cell.text)}{cell.more}" for cell in row] for row in each.rows]
        lines += _section(each.title, each.columns, rows) + (["", _plain(each.below)] if each.below else [])
    rows = [[_code(t["text"]), f"{t['count']:,}", f"{t['iterated']:.1%}"] for t in stats["iterated_tokens"]]
    if rows:
        lines += _section("Tokens most often iterated", ["token", "count", "iterated"], rows)
    return "\n".join(lines) + "\n"


def _section(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    return ["", f"## {title}", "", table(columns, rows)]


def _percent(found: Estimate) -> Cell:
    return Cell(*estimate(found, ".2f", interval=" ({} to {})"))


def _nats(found: Estimate | None) -> Cell:
    return Cell(*estimate(found, ".4f", "", 1, " ({} to {})"))


def _plain(text: Any) -> str:
    """Any text as itself, on one line: what Markdown or HTML would interpret is escaped."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
    shown = MARKS.sub(lambda mark: "&lt;" if mark[0] == "<" else "&amp;" if mark[0] == "&" else f"\\{mark[0]}", shown)
    return LINKS.sub(lambda link: f"{link[0][:-1]}\\{link[0][-1]}", shown)


def _code(text: str) -> str:
    """Any text in a cell of a table, as code."""
    return "`" + (repr(text)[1:-1].replace("|", "\\|").replace("`", "'") or "(empty)") + "`"
