"""Compute the report of a run: the scores of each policy and of the one-pass baseline on test data.

The baseline is the run's reference model, if the run has trained one: the base after as many ordinary steps on the same
data. Without it, policies are compared with policy `never` of the same model. In `report.json` and on disk the baseline
has the name `standard`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.data_files import COMPLETE
from ...data.rows import depth_labels, load_rows
from ...load import load_base, load_tah, load_tokenizer, parameter_counts
from ...model import TaHForCausalLM
from ...policy import Confidence, DepthState, Rule
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
SAMPLES = 2000  # bootstrap samples of the rows for an interval
BASELINES = ("standard", "standard_compute", "never", "blind")
OTHERS = (
    "standard",
    "standard_compute",
    "blind",
)  # models with other weights, whose passes do not correct or break tokens of `never`


@dataclass
class TestSet:
    """R rows that the model was not trained on, with n supervised predictions.

    Args:
        source: Name of the rows in the report.
        rows: Rows in the form of `Collator`, with `depth_labels` if a reference model has labelled them.
        ranks: Rank of the text's token under the reference model, `[n]`; 0 is the most probable token.
        questions: Rows with `messages` and `answer`; empty if the data has no answers.
    """

    source: str
    rows: list[dict[str, Any]]
    ranks: np.ndarray | None
    questions: list[dict[str, Any]]


def write_report(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """Make `run/report` with report.md, report.json and pictures.

    Test data is `run/data/test.jsonl` if the recipe generates its data, else the validation rows.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run, with a trained model.
        progress: Not used.

    Raises:
        ValueError: There is no trained model.
    """
    final = run / ("decider" if recipe.decider is not None else "backbone")
    if not (final / "config.json").is_file():
        raise ValueError(f"{final} does not exist: train it before `report`")
    work = run / f".report.{os.getpid()}"  # `Run` removes it if this process is killed
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
    """Return all numbers of the report, the contents of report.json without `statements`.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        final: Directory of the trained model.
        work: Directory for temporary files.
    """
    device = device_of_process()
    tokenizer, model = load_tokenizer(str(final)), load_tah(str(final), recipe.base.dtype).to(device)
    test, pad, own = test_set(recipe, run, work, tokenizer), tokenizer.pad_token_id, model.config.policy
    models = _models(recipe, run, model)
    scores = {name: score_tokens(of.to(device), test.rows, pad, rule) for name, (of, rule) in models.items()}
    sweep, finding = [], {}
    if model.config.max_depth > 1:
        rules = _controls(model, test, pad, scores[own], recipe.seed)
        controls = {name: (model, rule) for name, rule in rules.items() if name not in models}
        scores |= {name: score_tokens(model, test.rows, pad, rule) for name, (_, rule) in controls.items()}
        sweep, finding = _sweep(model, test, pad, scores, recipe.seed), _finding(recipe, test, scores)
        models |= {name: control for name, control in controls.items() if name != "oracle"}  # answers have no labels
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
        "tokens": _compare_tokens(scores, own, test.ranks),
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
    """Return the models to compare, each with its rule, in the order of the report."""
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
    """Return a base model of the run as a TaH model that never iterates."""
    base = load_base(str(directory), recipe.base.dtype)
    return TaHForCausalLM.from_base(base, max_depth=1, lora_rank=0, decider=None, policy="never")


def _controls(model: TaHForCausalLM, test: TestSet, pad: int, own: TokenScores, seed: int) -> dict[str, Rule]:
    """Return `confidence` and `random` at the iterated share of the model's own policy, and `oracle` with labels."""
    share = float((own.passes > 1).mean())
    unsure = score_tokens(
        model, test.rows, pad, Rule(Confidence("entropy"), 1.0)
    )  # the threshold 1.0 lets no token iterate
    threshold = threshold_for_share(unsure.probability, share)
    rules = {"confidence": Rule(Confidence("entropy"), threshold), "random": Rule(_at_random(share, seed))}
    if test.ranks is not None:
        rules["oracle"] = Rule("oracle")
    return rules


def _at_random(share: float, seed: int) -> Callable[[DepthState], Tensor]:
    """Return a policy that draws a share of the tokens.

    The policy `random` is a hash of position and token. In rows that all have the same form, it chooses the same
    positions in every row.
    """
    draws = torch.Generator().manual_seed(seed)

    def choose(state: DepthState) -> Tensor:
        return (torch.rand(state.positions.shape, generator=draws) < share).to(state.positions.device)

    return choose


def test_set(recipe: Recipe, run: Path, work: Path, tokenizer: Any) -> TestSet:
    """Return the rows to score on, labelled if the run has trained a reference model.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        work: Directory for temporary files.
        tokenizer: Tokenizer of the model.

    Raises:
        ValueError: There are no rows.
    """
    texts, own = run / "data" / "test.jsonl", run / "reference"
    source, directory = "validation rows, on which the threshold was also chosen", run / "labels" / "validation"
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
    """Return the entries of `values` `[T]` at positions that predict a supervised token."""
    return np.asarray(values)[:-1][np.asarray(row["supervised"])[1:]]


def _hard(test: TestSet) -> np.ndarray:
    """Return which tokens the labels mark as hard, `[n]` bool."""
    return np.concatenate([_asked(row, row["depth_labels"]) > 1 for row in test.rows])


# -- comparisons -----------------------------------------------------------------------------------------------------


def _compare_tokens(scores: Mapping[str, TokenScores], own: str, ranks: np.ndarray | None) -> dict[str, dict[str, Any]]:
    """Return per policy: accuracy, loss, iterated shares, differences to the baselines, corrected and broken tokens.

    Corrected and broken tokens are counted against policy `never`.

    Args:
        scores: Scores by policy.
        own: Name of the model's own policy.
        ranks: Ranks of the tokens under the reference model, `[n]`.
    """
    never, rows = scores["never"], Resampled(scores["never"].row, SAMPLES)
    right = {name: its.right for name, its in scores.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, its in scores.items():
        found[name] = _against_never(its, never) | _minus(name, right, rows)
        if name in OTHERS:
            found[name] |= {"fixed": None, "broke": None}
    if own != "never":
        second = np.where(scores[own].passes > 1, never.rank == 1, never.right)
        change = _minus("second_choice_of_policy", right | {"second_choice_of_policy": second}, rows)
        found["second_choice_of_policy"] = {"accuracy": float(second.mean()), "iterated_share": 0.0} | change
    if ranks is not None:  # uses the oracle's labels, but runs no second pass
        found["second_choice"] = {"accuracy": float((ranks <= 1).mean()), "iterated_share": 0.0}
    return found


def _compare_answers(right: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return per policy: exact match, and differences to the baselines."""
    rows = Resampled(np.arange(len(right["never"])), SAMPLES)
    return {name: {"exact_match": proportion(its)} | _minus(name, right, rows) for name, its in right.items()}


def _minus(name: str, right: Mapping[str, np.ndarray], rows: Resampled) -> dict[str, Estimate]:
    """Return the accuracy of `name` minus that of each other entry of BASELINES, paired by prediction."""
    others = () if name == "standard" else tuple(other for other in BASELINES if other in right and other != name)
    return {f"minus_{other}": paired(right[name], right[other], rows) for other in others}


def paired(a: np.ndarray, b: np.ndarray, rows: Resampled) -> Estimate:
    """Return the mean of a - b with its 95 % interval.

    Args:
        a: Whether each prediction is right, `[n]` bool.
        b: The same for the other policy.
        rows: Bootstrap samples of the rows.
    """
    return rows.estimate(rows.mean(a.astype(float) - b))


def _sweep(
    model: TaHForCausalLM, test: TestSet, pad: int, scores: Mapping[str, TokenScores], seed: int
) -> list[dict[str, Any]]:
    """Return token accuracy at the iterated shares SHARES by policy `decider`, `confidence` and `random`."""
    found = []
    for share in SHARES:
        random = _at_random(share, seed)
        policies: dict[str, Any] = {"confidence": Confidence("entropy"), "decider": "decider", "random": random}
        for name, policy in policies.items():
            if name in scores and not (name == "decider" and model.config.decision == "sample"):
                threshold = 0.5 if name == "random" else threshold_for_share(scores[name].probability, share)
                its = score_tokens(model, test.rows, pad, Rule(policy, threshold))
                found.append({"policy": name, **_against_never(its, scores["never"])})
    return found


def _against_never(its: TokenScores, never: TokenScores) -> dict[str, Any]:
    """Return accuracy, loss and iterated shares, and the tokens corrected and broken against policy `never`."""
    return {
        "accuracy": float(its.right.mean()),
        "loss": float(its.loss.mean()),
        "iterated_share": float((its.passes > 1).mean()),
        "iterated_share_with_prompts": its.share_of_all,
        "fixed": int((its.right & ~never.right).sum()),
        "broke": int((~its.right & never.right).sum()),
    }


def _finding(recipe: Recipe, test: TestSet, scores: Mapping[str, TokenScores]) -> dict[str, dict[str, Any]]:
    """Return how well the decider and the entropy rank the tokens that should iterate; empty if there is no target."""
    if recipe.by_gain or recipe.backbone.method == "tah2":
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
    """Return wall-clock and CPU seconds of the steps before the report."""
    records: Sequence[Any] = [_read_json(path) for path in sorted((run / "steps").glob("*.json"))]
    return {
        record["step"]: {"wall": record["seconds"], "cpu": record.get("cpu_seconds")}
        for record in records
        if "seconds" in record
    }


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
