"""The report of a run: how each policy scores on test data beside Standard, in sentences, numbers and pictures.

The sentences are derived from the numbers. Standard is the run's reference where the run has trained one: the base
after as many ordinary steps on the same data. Without one, policies are compared to the same model's `never`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data.data_files import COMPLETE
from ...data.rows import depth_labels, load_rows
from ...load import load_base, load_tah, load_tokenizer, parameter_counts
from ...model import TaHForCausalLM
from ...policy import Confidence, Random, Rule
from ...progress import SILENT, Reporter
from ...stats.bootstrap import Estimate, Resampled, ranking
from ...stats.threshold import threshold_for_share
from ...training.label import label
from ...training.recipe import Decider, Recipe
from ...training.run_files import run_facts, write_json
from ..run import device_of_process
from .report_text import as_markdown, draw, statements
from .scores import TokenScores, proportion, score_answers, score_tokens

SHARES = (0.03, 0.1, 0.2)  # iterated shares of the sweep
SAMPLES = 2000  # of the rows, for an interval
BASELINES = ("standard", "standard_compute", "never")
OTHERS = ("standard", "standard_compute", "blind")  # other weights: a second pass corrects or breaks none of its tokens


@dataclass
class TestSet:
    """R rows the model was not trained on."""

    source: str
    rows: list[dict[str, Any]]  # for `Collator`; with `depth_labels` where a reference has labelled them
    ranks: np.ndarray | None  # [n] of the text's token under the reference, 0 for its first choice
    questions: list[dict[str, Any]]  # with `messages` and `answer`; empty where the data has no answers


def write_report(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """`run/report` with report.md, report.json and pictures, from a run with a trained backbone.

    Test data is `run/data/test.jsonl` where the recipe generates its data, else the validation rows.

    Raises:
        ValueError: there is no trained model.
    """
    final = run / ("decider" if recipe.decider is not None else "backbone")
    if not (final / "config.json").is_file():
        raise ValueError(f"{final} is not there yet: train it before `report`")
    work = run / f".report.{os.getpid()}"  # `Run` removes it if we are killed
    work.mkdir()
    try:
        found = gather(recipe, run, final, work)
        found["statements"] = statements(found)
        (work / "made").mkdir()
        write_json(work / "made" / "report.json", found)
        (work / "made" / "report.md").write_text(as_markdown(found))
        draw(found, work / "made")
        os.replace(work / "made", run / "report")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def gather(recipe: Recipe, run: Path, final: Path, work: Path) -> dict[str, Any]:
    """All numbers of the report."""
    device = device_of_process()
    tokenizer, model = load_tokenizer(str(final)), load_tah(str(final), recipe.base.dtype).to(device)
    test, pad, own = test_set(recipe, run, work, tokenizer), tokenizer.pad_token_id, model.config.policy
    models = _models(recipe, run, model)
    scores = {name: score_tokens(of.to(device), test.rows, pad, rule) for name, (of, rule) in models.items()}
    sweep, finding = [], {}
    if model.config.max_depth > 1:
        scores |= _controls(model, test, pad, scores[own], recipe.seed)
        sweep, finding = _sweep(model, test, pad, scores), _finding(recipe, test, scores)
    answers = {}
    if test.questions:
        generated = {name: score_answers(of, tokenizer, test.questions, rule) for name, (of, rule) in models.items()}
        answers = _compare_answers({name: entry.right for name, entry in generated.items()})
        for name, entry in generated.items():
            answers[name]["iterated_share"] = entry.iterated_share
    facts = run_facts(recipe, "backbone", run / "labels", model)
    steps = _read_json(run / "standard_compute" / "training-run.json")
    plain = models["standard"][0] if "standard" in models else None
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "method": recipe.backbone.method,
        "policy": own,
        "threshold": model.config.threshold,
        "test": {
            "source": test.source,
            "rows": len(test.rows),
            "tokens": len(scores["never"].right),
            "hard_share": None if test.ranks is None else float(_hard(test).mean()),
        },
        "tokens": _compare_tokens(scores, test.ranks),
        "answers": answers,
        "sweep": sweep,
        "finding": finding,
        "quality": _read_json(final / "quality.json"),
        "parameters": {"standard": plain and parameter_counts(plain), "tah": parameter_counts(model)},
        "equal_compute_steps": steps and steps["recipe"]["backbone"]["training"]["max_steps"],
        "seconds": _seconds(run),
        "git": facts["git"],
        "versions": {"python": facts["python"], **facts["versions"]},
    }


def _models(recipe: Recipe, run: Path, model: TaHForCausalLM) -> dict[str, tuple[TaHForCausalLM, Rule]]:
    """The models to compare, each with its rule; in the order of the report."""
    found: dict[str, tuple[TaHForCausalLM, Rule]] = {}
    if (run / "reference" / "config.json").is_file():
        found["standard"] = (_plain(run / "reference", recipe), Rule())
    found["never"] = (model, Rule("never"))
    if model.config.max_depth > 1:
        found |= {"always": (model, Rule("always")), model.config.policy: (model, Rule())}
    if recipe.controls.equal_compute and (run / "standard_compute" / "config.json").is_file():
        found["standard_compute"] = (_plain(run / "standard_compute", recipe), Rule())
    if recipe.controls.blind:
        found["blind"] = (load_tah(str(run / "blind" / "decider"), recipe.base.dtype), Rule())
    return found


def _plain(directory: Path, recipe: Recipe) -> TaHForCausalLM:
    """A plain model of the run as one that never iterates."""
    base = load_base(str(directory), recipe.base.dtype)
    return TaHForCausalLM.from_base(base, max_depth=1, lora_rank=0, decider=None, policy="never")


def _controls(model: TaHForCausalLM, test: TestSet, pad: int, own: TokenScores, seed: int) -> dict[str, TokenScores]:
    """Other ways to choose as many tokens as the model's own policy does, and the oracle where there are labels."""
    share = float((own.passes > 1).mean())
    unsure = score_tokens(model, test.rows, pad, Rule(Confidence("entropy"), 1.0))  # no token iterates
    threshold = threshold_for_share(unsure.probability, share)
    rules = {"confidence": Rule(Confidence("entropy"), threshold), "random": Rule(Random(share, seed))}
    if test.ranks is not None:
        rules["oracle"] = Rule("oracle")
    return {name: score_tokens(model, test.rows, pad, rule) for name, rule in rules.items()}


def test_set(recipe: Recipe, run: Path, work: Path, tokenizer: Any) -> TestSet:
    """The rows to score on, tokenized and, where the run has its own reference, labelled."""
    texts, own = run / "data" / "test.jsonl", run / "reference"
    source, directory = "validation rows, on which the threshold was chosen too", run / "labels" / "validation"
    questions = []
    if texts.is_file():
        source, directory = "test rows", work / "tokens"
        reference = load_base(str(own)) if (own / "config.json").is_file() else None
        label(load_rows(str(texts)), tokenizer, reference, directory, max_length=recipe.data.max_length)
        questions = [json.loads(line) for line in texts.read_text("utf-8").splitlines()]
    if not (directory / COMPLETE).is_file():
        raise ValueError(f"{directory} has no labelled data; run `tah label` first")
    rows, ranks = [], []
    rule = recipe.label.rule if recipe.label is not None else "top1"
    for row in load_rows(str(directory)):
        kept = {"input_ids": row["input_ids"], "supervised": row["supervised"]}
        if "ref_rank" in row:
            scored = (row["ref_rank"], row["ref_prob"], row["supervised"])
            kept["depth_labels"] = depth_labels(*scored, rule, recipe.max_depth, [recipe.seed, row["row"]]).tolist()
            ranks.append(_asked(row, row["ref_rank"]))
        rows.append(kept)
    return TestSet(source, rows, np.concatenate(ranks) if ranks else None, questions)


def _asked(row: Mapping[str, Any], values: Sequence[int]) -> np.ndarray:
    """Those of `values` [T] that are about a supervised token."""
    return np.asarray(values)[:-1][np.asarray(row["supervised"])[1:]]


def _hard(test: TestSet) -> np.ndarray:
    """[n] bool, the tokens that the labels mark as hard."""
    return np.concatenate([_asked(row, row["depth_labels"]) > 1 for row in test.rows])


# -- comparisons -----------------------------------------------------------------------------------------------------


def _compare_tokens(scores: Mapping[str, TokenScores], ranks: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """By policy: accuracy, loss, what it iterates, what it corrects and breaks of `never`, and against Standard."""
    never, rows = scores["never"], Resampled(scores["never"].row, SAMPLES)
    found: dict[str, dict[str, Any]] = {}
    for name, its in scores.items():
        found[name] = _against_never(its, never)
        if name in OTHERS:
            found[name] |= {"fixed": None, "broke": None}
        found[name] |= _minus(name, {other: entry.right for other, entry in scores.items()}, rows)
    if ranks is not None:  # the same labels as the oracle's, but no pass is run
        found["second_choice"] = {"accuracy": float((ranks <= 1).mean()), "iterated_share": 0.0}
    return found


def _compare_answers(right: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    rows = Resampled(np.arange(len(right["never"])), SAMPLES)
    return {name: {"exact_match": proportion(its)} | _minus(name, right, rows) for name, its in right.items()}


def _minus(name: str, right: Mapping[str, np.ndarray], rows: Resampled) -> dict[str, Estimate]:
    """Share right of `name` [n] minus that of each baseline it is to beat, paired."""
    others = () if name == "standard" else tuple(other for other in BASELINES if other in right and other != name)
    return {f"minus_{other}": paired(right[name], right[other], rows) for other in others}


def paired(a: np.ndarray, b: np.ndarray, rows: Resampled) -> Estimate:
    """Mean of a - b [n] bool, with its interval."""
    return rows.estimate(rows.mean(a.astype(float) - b))


def _sweep(model: TaHForCausalLM, test: TestSet, pad: int, scores: Mapping[str, TokenScores]) -> list[dict[str, Any]]:
    """Token accuracy at several iterated shares, chosen by the decider, by entropy and at random."""
    found = []
    for share in SHARES:
        policies: dict[str, Any] = {"confidence": Confidence("entropy"), "decider": "decider", "random": Random(share)}
        for name, policy in policies.items():
            if name in scores:
                threshold = 0.5 if name == "random" else threshold_for_share(scores[name].probability, share)
                its = score_tokens(model, test.rows, pad, Rule(policy, threshold))
                found.append({"policy": name, **_against_never(its, scores["never"])})
    return found


def _against_never(its: TokenScores, never: TokenScores) -> dict[str, Any]:
    return {
        "accuracy": float(its.right.mean()),
        "loss": float(its.loss.mean()),
        "iterated_share": float((its.passes > 1).mean()),
        "iterated_share_with_prompts": its.share_of_all,
        "fixed": int((its.right & ~never.right).sum()),
        "broke": int((~its.right & never.right).sum()),
    }


def _finding(recipe: Recipe, test: TestSet, scores: Mapping[str, TokenScores]) -> dict[str, dict[str, Any]]:
    """How well the decider, and entropy without any training, find the tokens that the decider was to find."""
    if recipe.by_gain:
        gain = recipe.decider.gain if recipe.decider is not None else Decider().gain
        wanted = scores["never"].loss - scores["always"].loss > gain
    elif test.ranks is not None:
        wanted = _hard(test)
    else:
        return {}
    if wanted.all() or not wanted.any():
        return {}
    found = {}
    for title, name in (("decider", "decider"), ("entropy, untrained", "confidence")):
        if name in scores:
            (auroc,), (precision,) = ranking(scores[name].probability, wanted)
            share = float(wanted.mean())
            found[title] = {"auroc": float(auroc), "average_precision": float(precision), "wanted_share": share}
    return found


def _seconds(run: Path) -> dict[str, dict[str, float]]:
    """Wall-clock and CPU seconds of the steps before this one."""
    records: Sequence[Any] = [_read_json(path) for path in sorted((run / "steps").glob("*.json"))]
    return {
        record["step"]: {"wall": record["seconds"], "cpu": record.get("cpu_seconds")}
        for record in records
        if "seconds" in record
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
