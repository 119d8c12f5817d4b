"""Write sentences, tables and pictures of a report from its numbers alone (`report.gather`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ...markdown import estimate, percent, table

ROWS = {  # in the order of the tables: the name of a row, the model, and which tokens iterate
    "standard": ("baseline", "the base after as many ordinary steps on the same data", "none"),
    "standard_compute": (
        "baseline (equal compute)",
        "the base after more ordinary steps, which cost as much as labels, backbone and decider",
        "none",
    ),
    "never": ("never", "this model", "none"),
    "decider": ("decider", "this model", "chosen by the trained decider"),
    "confidence": (
        "confidence at equal share",
        "this model",
        "the most uncertain tokens, as many as by the model's own policy",
    ),
    "random": ("random at equal share", "this model", "as many tokens, drawn at random"),
    "blind": (
        "blind",
        "both stages again, with deeper passes that read no text: its gain is not reasoning about the text",
        "chosen by its own decider",
    ),
    "second_choice_of_policy": (
        "second choice of the policy's tokens",
        "this model; where its own policy iterates, the second choice after depth 1 counts",
        "none",
    ),
    "always": ("always", "this model", "all"),
    "oracle": (
        "oracle",
        "this model; it uses the answers, so it cannot be deployed",
        "those that the baseline predicts wrongly",
    ),
    "second_choice": (
        "second_choice",
        "the baseline; where it is wrong, its second choice counts; this uses the answers like the oracle",
        "none",
    ),
}
OTHER = {"standard": "the baseline", "standard_compute": "the baseline", "never": "`never`", "blind": "`blind`"}
QUALITY = ("auroc", "average_precision", "precision", "recall", "iterated_share", "calibration_error")
Numbers = Mapping[str, Any]


# -- sentences -------------------------------------------------------------------------------------------------------


def statements(found: Numbers) -> list[str]:
    """Return the results as sentences, the comparison with the baseline first.

    Args:
        found: Numbers of the report.
    """
    answers, tokens, own = found["answers"], found["tokens"], found["policy"]
    scores = answers or tokens
    lines = []
    if "standard" in tokens:
        lines.append(_against("standard", own, answers if "standard" in answers else tokens, "at equal data and steps"))
    else:
        lines.append("The run has no baseline trained on the same data, so the gain over a baseline is not measured.")
    if "standard_compute" in tokens:
        steps = found["equal_compute_steps"]
        lines.append(_against("standard_compute", own, scores, f"at equal compute: {steps} steps"))
    if own != "never":
        lines.append(_against("never", own, scores, "the same weights without a second pass"))
    if "blind" in tokens:
        lines.append(_against("blind", own, scores, "both stages again, with deeper passes that read no text"))
    if own not in ("never", "always") and answers:
        every = answers["always"]
        lines.append(
            f"If every token takes a second pass, {percent(every['exact_match']['share'])} of the answers are right. "
            f"The difference to `never` is {_signed(every['minus_never'])}."
        )
    if own == "decider":
        others = ", ".join(f"{name} {percent(tokens[name]['accuracy'])}" for name in ("never", "confidence", "random"))
        its = tokens[own]
        lines.append(
            f"With the decider, {percent(its['iterated_share'])} of the tokens of the given texts iterate. "
            f"The token accuracy is {percent(its['accuracy'])} ({others}). "
            f"The second passes correct {its['fixed']} tokens and break {its['broke']}, against `never`. "
            "If at these tokens the second choice after depth 1 counts, and no second pass runs, "
            f"{percent(tokens['second_choice_of_policy']['accuracy'])} of the tokens are right."
        )
    if "oracle" in tokens:
        lines.append(_about_oracle(tokens))
    return [*lines, "This is one run with one seed. The intervals cover the choice of the test rows, not of the seed."]


def _against(other: str, own: str, scores: Numbers, how: str) -> str:
    """Return the comparison of the model's own policy with another row of the tables, on answers or on tokens."""
    change, answered = scores[own][f"minus_{other}"], "exact_match" in scores[own]
    if change["low"] is not None and change["low"] > 0:
        verb = "beats"
    else:
        verb = "is worse than" if change["high"] is not None and change["high"] < 0 else "does not measurably beat"
    policy = "the decider's policy" if own == "decider" else f"the policy {own}"
    what, count = "On the tokens of the given texts", "the tokens"
    if answered:
        what, count = "On generated answers", f"{scores[own]['exact_match']['questions']} answers"
    its, theirs = (
        percent(scores[name]["exact_match"]["share"] if answered else scores[name]["accuracy"]) for name in (own, other)
    )
    return (
        f"{what}, {policy} {verb} {OTHER[other]} ({how}). It gets {its} of {count} right, {OTHER[other]} {theirs}. "
        f"The difference is {_signed(change)}."
    )


def _about_oracle(tokens: Numbers) -> str:
    """Return the gain of the oracle, and whether it needs a second pass."""
    oracle, second = tokens["oracle"]["accuracy"], tokens["second_choice"]["accuracy"]
    if oracle <= tokens["never"]["accuracy"]:
        return "Even if exactly the tokens iterate that the baseline predicts wrongly, second passes gain nothing."
    leak = "This is less, but the oracle still uses the answers."
    if second >= oracle:
        leak = (
            "This is at least as much without any second pass, so the gain of the oracle is not evidence that second "
            "passes help."
        )
    return (
        f"If exactly the tokens iterate that the baseline predicts wrongly, {percent(oracle)} of the tokens are right. "
        f"This uses the answers. If the second choice of the baseline counts at these tokens, {percent(second)} are "
        f"right. {leak}"
    )


def _about_cost(seconds: Numbers) -> list[str]:
    """Return the cost as a sentence. It is not one of the `statements`, because it differs from run to run."""
    made = [seconds[name]["cpu"] for name in ("reference", "label", "backbone", "decider") if name in seconds]
    if "reference" not in seconds or len(made) < 2 or None in made:
        return []
    ratio = sum(made[1:]) / made[0]
    return [
        f"Labels, backbone and decider took {ratio:.1f} times the CPU seconds of the baseline. "
        "The two have equal steps, not equal cost."
    ]


def _signed(change: Numbers | None) -> str:
    return "".join(estimate(change, "+.1f", " points"))


# -- markdown --------------------------------------------------------------------------------------------------------


def as_markdown(found: Numbers) -> str:
    """Return the text of report.md."""
    test, names = found["test"], [name for name in ROWS if name in found["tokens"]]
    hard = "" if test["hard_share"] is None else f", {percent(test['hard_share'])} of them hard"
    lines = [
        f"# {found['recipe']}: results",
        "",
        *(f"- {line}" for line in [*found["statements"], *_about_cost(found["seconds"])]),
        "",
        table(
            ["setting", "value"],
            [
                ["method", f"`{found['method']}`"],
                ["policy", f"`{found['policy']}` at threshold {found['threshold']:.3f}"],
                ["seed", found["seed"]],
                ["test data", f"{test['rows']} {test['source']}: {test['tokens']} tokens{hard}"],
                ["intervals", "95 %, bootstrap over rows; Wilson for single shares"],
            ],
        ),
        "",
        "Rows of the tables below:",
        "",
        table(["row", "model", "tokens that iterate"], [ROWS[name] for name in names]),
        "",
    ]
    if found["answers"]:
        head = ["policy", "exact match", "interval", "iterated", "minus baseline", "minus never"]
        body = [_answer_line(name, found["answers"][name]) for name in names if name in found["answers"]]
        lines += ["## Answers generated greedily", "", table(head, body), "", "![exact match](answers.png)", ""]
    head = ["policy", "accuracy", "loss", "iterated", "with prompts", "corrects", "breaks", "minus baseline"]
    lines += ["## Tokens of the given texts", ""]
    lines += [table(head, [_token_line(name, found["tokens"][name]) for name in names]), ""]
    lines += ["Corrects and breaks: tokens that a second pass turns right or wrong, against `never`.", ""]
    lines += ["![accuracy by share](sweep.png)", ""]
    return "\n".join([*lines, *_decider_part(found), *_cost_part(found)]) + "\n"


def _answer_line(name: str, entry: Numbers) -> list[str]:
    match = entry["exact_match"]
    low, high = map(percent, match["interval"])
    shares = [percent(match["share"]), f"[{low}, {high}]", percent(entry["iterated_share"])]
    return [ROWS[name][0], *shares, *(_signed(entry.get(f"minus_{other}")) for other in ("standard", "never"))]


def _token_line(name: str, entry: Numbers) -> list[str]:
    loss = "-" if entry.get("loss") is None else f"{entry['loss']:.4f}"
    shares = [percent(entry.get(key)) for key in ("iterated_share", "iterated_share_with_prompts")]
    counts = ["-" if entry.get(key) is None else str(entry[key]) for key in ("fixed", "broke")]
    change = _signed(entry.get("minus_standard"))
    return [ROWS[name][0], percent(entry["accuracy"], ".2f"), loss, *shares, *counts, change]


def _decider_part(found: Numbers) -> list[str]:
    lines: list[str] = []
    if found["finding"]:
        body = [
            [name, f"{v['auroc']:.3f}", f"{v['average_precision']:.3f}", percent(v["wanted_share"])]
            for name, v in found["finding"].items()
        ]
        lines += ["## Finding the tokens that should iterate", ""]
        lines += [table(["scorer", "AUROC", "average precision", "share that should iterate"], body), ""]
    if quality := found["quality"]:
        body = [[key.replace("_", " "), f"{quality[key]:.3f}"] for key in QUALITY if quality[key] is not None]
        lines += ["## The decider on the validation rows, at the threshold", "", table(["measure", "value"], body), ""]
    return lines


def _cost_part(found: Numbers) -> list[str]:
    models = {"this model": found["parameters"]["tah"], "baseline": found["parameters"]["standard"]}
    columns = [name for name, count in models["this model"].items() if count]
    sizes = [
        [name, *(f"{counts.get(column, 0):,}" for column in columns), f"{sum(counts.values()):,}"]
        for name, counts in models.items()
        if counts is not None
    ]
    seconds = [
        [name, f"{spent['wall']:.1f}", "-" if spent["cpu"] is None else f"{spent['cpu']:.1f}"]
        for name, spent in found["seconds"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return [
        *("## Parameters", "", table(["", *columns, "all"], sizes), ""),
        *("## Seconds by step", "", table(["step", "wall clock", "CPU"], seconds), ""),
        f"{versions}; commit {found['git']}",
    ]


# -- pictures --------------------------------------------------------------------------------------------------------


def draw(found: Numbers, directory: Path) -> None:
    """Draw sweep.png, and answers.png if there are answers.

    Args:
        found: Numbers of the report.
        directory: Directory of the pictures.
    """
    from ...stats.charts import as_png, new_chart, styled

    with styled():
        if answers := {name: found["answers"][name]["exact_match"] for name in ROWS if name in found["answers"]}:
            figure, axes = new_chart(width=max(6.4, 1.15 * len(answers)))
            shares = [100 * entry["share"] for entry in answers.values()]
            ends = [[100 * entry["interval"][end] for entry in answers.values()] for end in (0, 1)]
            errors = [[abs(end - share) for end, share in zip(side, shares, strict=True)] for side in ends]
            axes.bar(
                [ROWS[name][0].replace(" ", "\n") for name in answers], shares, yerr=errors, capsize=4, color="0.6"
            )
            axes.set_ylabel("answers right (%), 95 % interval")
            write_atomically(directory / "answers.png", as_png(figure))
        figure, axes = new_chart()
        for name in ("decider", "confidence", "random"):
            points = [(100 * e["iterated_share"], 100 * e["accuracy"]) for e in found["sweep"] if e["policy"] == name]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        for name, style in (("standard", "--"), ("never", ":")):
            if name in found["tokens"]:
                axes.axhline(100 * found["tokens"][name]["accuracy"], linestyle=style, color="0.4", label=ROWS[name][0])
        axes.set_xlabel("iterated tokens (%)")
        axes.set_ylabel("token accuracy on the given texts (%)")
        axes.legend()
        write_atomically(directory / "sweep.png", as_png(figure))
