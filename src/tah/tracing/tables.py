"""The statistics of a trace as tables, for the page of `tah report` and as Markdown.

Text from models, data and traces is escaped, so that it is shown as text.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ..markdown import estimate, table
from ..stats.bootstrap import Estimate

MARKS = re.compile(r"[\\`*\[\]<>&|#!~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word has no effect
LINKS = re.compile(r"(?i)(https?|ftp):|www\.")  # GitHub makes links of these
CHANGES = {
    "corrected, of wrong": "corrected",
    "broken, of right": "broken",
    "break-even precision": "break_even_precision",
    "loss falls": "improved",
    "loss rises": "worsened",
}
POLICIES = {
    "iterated": "iterated",
    "accuracy": "accuracy",
    "gain over never": "gain",
    "loss": "loss",
    "precision": "precision",
    "break-even precision": "break_even_precision",
    "accuracy by second choice": "second_choice",
}


class Cell(NamedTuple):
    text: str  # may come from a model or a file, so it is escaped
    more: str = ""  # an interval or a threshold: made here, so it is not escaped


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    below: str = ""


def tables_of(stats: dict[str, Any]) -> list[Table]:
    """Return the tables of `overthinking.statistics`. A table without rows is left out."""
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
        Table("After each depth, if every token reaches it", ["depth", "accuracy", "loss"], depths),
        Table("Changes by deeper passes", ["up to depth", *CHANGES], passes),
        Table("Policies", ["policy", *POLICIES], policies, f"Headroom of the oracle: {over}."),
        Table(
            "Scores as detectors of wrong tokens and of tokens that gain",
            ["score", "detects", "AUROC", "average precision", "share of such tokens"],
            scores,
        ),
    ]
    return [each for each in tables if each.rows]


def difference_table(found: dict[str, Any]) -> Table:
    """Return the table of `overthinking.compare`."""
    rows = [[Cell(name), _percent(row["accuracy"]), _nats(row["loss"])] for name, row in found["difference"].items()]
    return Table("", ["policy", "accuracy, B minus A", "loss, B minus A"], rows)


def as_markdown(stats: dict[str, Any]) -> str:
    """Return the tables of `overthinking.statistics` as a Markdown page."""
    about, counted = stats["about"], "tokens" if stats["every_token"] else "supervised tokens"
    measure = f" ({_plain(about['confidence_measure'])})" if about.get("confidence_measure") else ""
    model, data, policy = (_plain(about[name]) for name in ("model", "data", "policy"))
    lines = [
        f"# {model} on {data}",
        "",
        f"{stats['tokens']:,} {counted} of {stats['texts']:,} texts, at most {about['max_depth']} passes, policy "
        f"{policy}{measure} at {about['threshold']:.4g}. Intervals: {stats['level']:.0%}, by a bootstrap over texts.",
    ]
    if stats["missing_texts"]:
        lines += ["", f"The trace is unfinished: {stats['missing_texts']:,} texts are missing."]
    if not stats["exact"]:
        exact = "never, always and own policy" if about["final"] == "run" else "never and always"
        lines += [
            "",
            f'With attention "duo" deeper passes attend to each other, so only {exact} are exact. The other rows are '
            "approximations from a run in which every token took all passes.",
        ]
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
    """Return a text on one line, with the characters that Markdown or HTML interprets escaped."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
    shown = MARKS.sub(lambda mark: "&lt;" if mark[0] == "<" else "&amp;" if mark[0] == "&" else f"\\{mark[0]}", shown)
    return LINKS.sub(lambda link: f"{link[0][:-1]}\\{link[0][-1]}", shown)


def _code(text: str) -> str:
    """Return a text as code in a cell of a Markdown table."""
    return "`" + (repr(text)[1:-1].replace("|", "\\|").replace("`", "'") or "(empty)") + "`"
