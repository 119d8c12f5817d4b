"""The words and pictures of a report, from its numbers alone (`report.gather`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ORDER = (
    *("standard", "standard_compute", "never", "decider", "confidence", "random", "blind", "always", "oracle"),
    "second_choice",
)
ROWS = {  # what is not called by its name
    "standard_compute": "standard (equal compute)",
    "confidence": "confidence at equal share",
    "random": "random at equal share",
}
MEANING = {
    "standard": "the base after as many ordinary steps on the same data, one pass",
    "standard_compute": "the base after more ordinary steps: they cost what labels, backbone and decider did, one pass",
    "never": "this model, one pass",
    "decider": "this model, the trained decider chooses",
    "confidence": "this model, the most uncertain tokens iterate, as many as by the model's own policy",
    "random": "this model, as many tokens drawn at random",
    "blind": "both stages again with deeper passes that see no text, its own decider: its gain is no reasoning",
    "always": "this model, every token iterates",
    "oracle": "this model told which tokens Standard gets wrong: uses the answers, cannot be deployed",
    "second_choice": "no second pass: Standard's second choice where it is wrong; uses the answers like the oracle",
}
_NAMED = {"standard": "Standard", "standard_compute": "Standard", "never": "`never`"}
Numbers = Mapping[str, Any]


def statements(found: Numbers) -> list[str]:
    """What the numbers say, the comparison with Standard first."""
    answers, tokens, own = found["answers"], found["tokens"], found["policy"]
    said = []
    if "standard" in answers:
        said.append(_answers_against("standard", own, answers, "at equal data and steps"))
    elif "standard" in tokens:
        said.append(_tokens_against("standard", own, tokens, "at equal data and steps"))
    else:
        said.append("No Standard model was trained on the same data, so this says nothing about being better than one.")
    which = _answers_against if answers else _tokens_against
    if "standard_compute" in tokens:
        how = f"at equal compute: {found['equal_compute_steps']} steps"
        said.append(which("standard_compute", own, answers or tokens, how))
    if own != "never":
        said.append(which("never", own, answers or tokens, "the same weights without a second pass"))
    if own not in ("never", "always") and answers:
        said.append(
            f"A second pass of every token gets {_percent(answers['always']['exact_match']['share'])} right: "
            f"{_signed(answers['always']['minus_never'])} against `never`."
        )
    said += _about_choice(own, tokens) + _about_oracle(tokens)
    said.append("One run with one seed: intervals cover the choice of test rows, not of the seed.")
    return said


def _answers_against(other: str, own: str, answers: Numbers, how: str) -> str:
    a, b = answers[own]["exact_match"], answers[other]["exact_match"]
    change = answers[own][f"minus_{other}"]
    return (
        f"Generated answers: {_title(own, other)} {_word(change)} {_NAMED[other]} here ({how}): "
        f"{_percent(a['share'])} against {_percent(b['share'])} of {a['questions']} right, {_signed(change)}."
    )


def _tokens_against(other: str, own: str, tokens: Numbers, how: str) -> str:
    change = tokens[own][f"minus_{other}"]
    return (
        f"Tokens along the given texts: {_title(own, other)} {_word(change)} {_NAMED[other]} here ({how}): "
        f"{_percent(tokens[own]['accuracy'])} against {_percent(tokens[other]['accuracy'])} right, {_signed(change)}."
    )


def _title(own: str, other: str) -> str:
    return f"the {own}'s policy" if own == "decider" else f"the policy {own}"


def _word(change: Numbers) -> str:
    if change["low"] is not None and change["low"] > 0:
        return "beats"
    return "is worse than" if change["high"] is not None and change["high"] < 0 else "does not measurably beat"


def _about_choice(own: str, tokens: Numbers) -> list[str]:
    """Whether choosing tokens matters."""
    if own != "decider":
        return []
    rest = [f"{name} {_percent(tokens[name]['accuracy'])}" for name in ("never", "confidence", "random")]
    its = tokens[own]
    return [
        f"Token accuracy along the given texts, {_percent(its['iterated_share'])} iterated: {own} "
        f"{_percent(its['accuracy'])}; {', '.join(rest)}. Against `never` the decider's second pass "
        f"mended {its['fixed']} tokens and broke {its['broke']}."
    ]


def _about_oracle(tokens: Numbers) -> list[str]:
    if "oracle" not in tokens:
        return []
    gain = tokens["oracle"]["accuracy"] - tokens["never"]["accuracy"]
    second = tokens["second_choice"]["accuracy"]
    if gain <= 0:
        return ["Even told by the labels where Standard is wrong, the second pass gains nothing."]
    leak = (
        "at least as much without any second pass, so the oracle's gain is no evidence of thinking"
        if second >= tokens["oracle"]["accuracy"]
        else "less, but the oracle still uses the answers"
    )
    return [
        f"Told by the labels where Standard is wrong (they use the answers), the second pass gets "
        f"{_percent(tokens['oracle']['accuracy'])} of tokens right; 'told it is wrong, take its second choice' gets "
        f"{_percent(second)}: {leak}."
    ]


def _about_cost(seconds: Numbers) -> list[str]:
    """Not among the `statements`: it differs from run to run."""
    made = [seconds[name]["cpu"] for name in ("label", "backbone", "decider") if name in seconds]
    if "reference" not in seconds or not made or None in (*made, seconds["reference"]["cpu"]):
        return []
    ratio = sum(made) / seconds["reference"]["cpu"]
    return [
        f"Labels, backbone and decider took {ratio:.1f} times the CPU seconds of Standard; steps are equal, not cost."
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _signed(change: Numbers | None) -> str:
    if change is None:
        return "-"
    if change["low"] is None:  # a single row has no interval
        return f"{100 * change['value']:+.1f} points"
    return f"{100 * change['value']:+.1f} points [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"


# -- markdown --------------------------------------------------------------------------------------------------------


def as_markdown(found: Numbers) -> str:
    test, names = found["test"], [name for name in ORDER if name in found["tokens"]]
    lines = [
        f"# {found['recipe']}: what came of it",
        "",
        *(f"- {said}" for said in [*found["statements"], *_about_cost(found["seconds"])]),
        "",
    ]
    hard = "" if test["hard_share"] is None else f", {_percent(test['hard_share'])} of them hard"
    lines += [
        f"Method `{found['method']}`, policy `{found['policy']}` at threshold {found['threshold']:.3f}, seed "
        f"{found['seed']}. Scored on {test['rows']} {test['source']}: {test['tokens']} tokens{hard}. "
        "Intervals are 95 %, bootstrap over rows (Wilson for single shares).",
        "",
    ]
    if found["answers"]:
        lines += ["## Answers generated greedily", ""]
        lines += _table(
            ["policy", "exact match", "interval", "iterated", "minus Standard", "minus never"],
            [_answer_line(name, found["answers"][name]) for name in names if name in found["answers"]],
        )
        lines += ["![exact match](answers.png)", ""]
    lines += ["## Tokens along the given texts", ""]
    lines += _table(
        ["policy", "accuracy", "loss", "iterated", "with prompts", "fixed", "broke", "minus Standard"],
        [_token_line(name, found["tokens"][name]) for name in names],
    )
    lines += ["Fixed and broke: tokens that a second pass turned right or wrong, against `never`.", ""]
    lines += [f"- {_row(name)}: {MEANING[name]}" for name in names]
    lines += ["", "![accuracy by share](sweep.png)", ""]
    return "\n".join([*lines, *_decider_part(found), *_cost_part(found)]) + "\n"


def _answer_line(name: str, entry: Numbers) -> list[str]:
    match, iterated = entry["exact_match"], entry["iterated_share"]
    low, high = match["interval"]
    changes = [_signed(entry.get(f"minus_{other}")) for other in ("standard", "never")]
    return [_row(name), _percent(match["share"]), f"[{_percent(low)}, {_percent(high)}]", _percent(iterated), *changes]


def _row(name: str) -> str:
    return ROWS.get(name, name)


def _token_line(name: str, entry: Numbers) -> list[str]:
    loss = entry.get("loss")
    counts = ["-" if entry.get(key) is None else str(entry[key]) for key in ("fixed", "broke")]
    shares = [_percent(entry.get(key)) for key in ("iterated_share", "iterated_share_with_prompts")]
    accuracy = f"{100 * entry['accuracy']:.2f} %"
    return [
        _row(name),
        accuracy,
        "-" if loss is None else f"{loss:.4f}",
        *shares,
        *counts,
        _signed(entry.get("minus_standard")),
    ]


def _decider_part(found: Numbers) -> list[str]:
    lines = []
    if found["finding"]:
        lines += ["## Finding the tokens that should iterate", ""]
        finding = found["finding"].items()
        lines += _table(
            ["scorer", "AUROC", "average precision", "share to find"],
            [
                [name, f"{v['auroc']:.3f}", f"{v['average_precision']:.3f}", _percent(v["wanted_share"])]
                for name, v in finding
            ],
        )
    if quality := found["quality"]:
        numbers = [f"{key.replace('_', ' ')} {quality[key]:.3f}" for key in QUALITY if quality[key] is not None]
        lines += [f"On the validation rows, at the threshold: {', '.join(numbers)}.", ""]
    return lines


QUALITY = ("auroc", "average_precision", "precision", "recall", "iterated_share", "calibration_error")


def _cost_part(found: Numbers) -> list[str]:
    sizes, plain = found["parameters"]["tah"], found["parameters"]["standard"]
    lines = ["## Parameters", ""]
    columns = [name for name in sizes if sizes[name]]
    body = [["this model", *(f"{sizes[name]:,}" for name in columns), f"{sum(sizes.values()):,}"]]
    if plain is not None:
        body.append(["standard", *(f"{plain[name]:,}" for name in columns), f"{sum(plain.values()):,}"])
    lines += _table(["", *columns, "all"], body)
    lines += ["## Seconds by step", ""]
    lines += _table(
        ["step", "wall clock", "CPU"],
        [
            [name, f"{v['wall']:.1f}", "-" if v["cpu"] is None else f"{v['cpu']:.1f}"]
            for name, v in found["seconds"].items()
        ],
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return [*lines, f"{versions}; commit {found['git']}"]


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *body]
    return [*("| " + " | ".join(row) + " |" for row in rows), ""]


# -- pictures --------------------------------------------------------------------------------------------------------


def draw(found: Numbers, directory: Path) -> None:
    """answers.png, where answers were generated, and sweep.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if found["answers"]:
        names = [name for name in ORDER if name in found["answers"]]
        entries = [found["answers"][name]["exact_match"] for name in names]
        shares = [100 * entry["share"] for entry in entries]
        low = [share - 100 * entry["interval"][0] for share, entry in zip(shares, entries, strict=True)]
        high = [100 * entry["interval"][1] - share for share, entry in zip(shares, entries, strict=True)]
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        axes.bar(names, shares, yerr=[low, high], capsize=4, color="0.6")
        axes.set_ylabel("answers right (%), 95 % interval")
        figure.savefig(directory / "answers.png", dpi=100)
        pyplot.close(figure)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    tokens = found["tokens"]
    for name in ("decider", "confidence", "random"):
        points = [(100 * e["iterated_share"], 100 * e["accuracy"]) for e in found["sweep"] if e["policy"] == name]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    for name, style in (("standard", "--"), ("never", ":")):
        if name in tokens:
            axes.axhline(100 * tokens[name]["accuracy"], linestyle=style, color="0.4", label=name)
    axes.set_xlabel("iterated tokens (%)")
    axes.set_ylabel("tokens right along the given texts (%)")
    axes.legend()
    figure.savefig(directory / "sweep.png", dpi=100)
    pyplot.close(figure)
