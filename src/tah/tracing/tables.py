"""The statistics of a trace as tables, for the page of `tah report` and as Markdown.

Text from models, data and traces is escaped, so that it is shown as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..markdown import estimate, table
from ..stats.bootstrap import Estimate
from .trace_file import drawn

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
WEIGHTS = {
    "certain": "continue probabilities of 1",
    "decider": "the decider's continue probabilities",
    "confidence": "the continue probabilities 1 - top probability",
    "entropy": "the continue probabilities 1 - exp(-entropy)",
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
        Table("Policies", ["policy", *POLICIES], policies, f"Headroom of the oracle: {over}." if over else ""),
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


def rule_of(about: Mapping[str, Any]) -> str:
    """Return the policy of a trace with its threshold, or that its decisions were drawn, from the header."""
    if drawn(about):
        return f"{about['policy']}, decisions drawn"
    measure = f" ({about['confidence_measure']})" if about.get("confidence_measure") else ""
    return f"{about['policy']}{measure} at {about['threshold']:.4g}"


def about_weights(weights: str | None) -> str:
    """Return what a page says about the weights of a mixture, as text; "" if the output has none."""
    if weights is None:
        return ""
    if weights == "certain":
        same = "Rows of the decider and of confidence measures have other weights and are left out."
    else:
        same = "Rows of policies with other weights, such as always and oracle, are left out; trace with --policy NAME."
    return (
        f"The output is a mixture. After depth 2 and deeper, all numbers are of passes weighed by {_named(weights)}, "
        f"those of the trace's policy. {same}"
    )


def different_weights(one: str | None, other: str | None) -> str:
    """Return the note on two traces whose passes have different weights; "" if they have the same."""
    if one == other:
        return ""
    shown = ["not weighed by a policy" if each is None else f"weighed by {_named(each)}" for each in (one, other)]
    return (
        f"The passes of the first trace are {shown[0]}, those of the second are {shown[1]}: after depth 2 and deeper "
        "their numbers also differ for this reason."
    )


def _named(weights: str) -> str:
    return WEIGHTS.get(weights, f"the continue probabilities of {weights}")


def as_markdown(stats: dict[str, Any]) -> str:
    """Return the tables of `overthinking.statistics` as a Markdown page."""
    about, counted = stats["about"], "tokens" if stats["every_token"] else "supervised tokens"
    model, data, rule = (_plain(text) for text in (about["model"], about["data"], rule_of(about)))
    lines = [
        f"# {model} on {data}",
        "",
        f"{stats['tokens']:,} {counted} of {stats['texts']:,} texts, at most {about['max_depth']} passes, policy "
        f"{rule}. Intervals: {stats['level']:.0%}, by a bootstrap over texts.",
    ]
    if stats["missing_texts"]:
        lines += ["", f"The trace is unfinished: {stats['missing_texts']:,} texts are missing."]
    if not stats["exact"]:
        named = ["never", *["always"] * ("always" in stats["policies"]), *["own policy"] * (about["final"] == "run")]
        lines += [
            "",
            'With attention "duo" deeper passes attend to each other, so only these rows are exact: '
            f"{', '.join(named)}. "
            "The other rows are approximations from a run in which every token took all passes.",
        ]
    if weighed := about_weights(stats["weights"]):
        lines += ["", _plain(weighed)]
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
