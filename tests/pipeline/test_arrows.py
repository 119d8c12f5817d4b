"""`tah run tiny`: the task `arrows`, the chain with its controls in miniature, and the gain at full size."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tah.data.assistant_mask import encode
from tah.load import load_tah, load_tokenizer
from tah.pipeline.experiment.arrows import Arrows
from tah.pipeline.experiment.report import _at_random
from tah.pipeline.experiment.scores import score_tokens
from tah.pipeline.experiment.tiny import distinct_rows
from tah.pipeline.run import Run
from tah.pipeline.steps import chain as chain_of
from tah.pipeline.steps import run
from tah.policy import Rule
from tah.progress import SILENT
from tah.training.recipe_file import load_recipe, validated

TRAINING = {"max_steps": 6, "per_device_train_batch_size": 4, "warmup_steps": 1, "logging_steps": 2}
SIZES = {"train": 40, "validation": 8, "test": 30}
MINIATURE = [
    *(f"data.generate.{split}={size}" for split, size in SIZES.items()),
    *(f"base.scratch.{name}" for name in ("hidden_size=32", "intermediate_size=48", "num_attention_heads=2")),
    "model.decider.width=8",
    *(
        f"{part}.training.{name}={value}"
        for part in ("base.scratch", "backbone", "decider")
        for name, value in TRAINING.items()
    ),
]
BEFORE = {  # fingerprints of tah 0.2.0, when the sums were called `tiny` and data.generate had no `task`
    "data": "d3f08cd963632672",
    "base": "d994199da8d77e8a",
    "reference": "1dcfa30ffbd38f1f",
    "label": "56f78bd48767be20",
    "backbone": "81d4884a27eb069e",
    "decider": "d10817a5502a8665",
    "standard_compute": "116c31b8badbc6a1",
    "blind": "b86f6fea5edc0bf6",
    "report": "09c2a678ce524e83",
}


def settings(**changed) -> Arrows:
    return validated(Arrows, {"task": "arrows", "train": 30, "validation": 5, "test": 5} | changed, "data.generate")


def rows_of(run_directory: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (run_directory / "data" / f"{split}.jsonl").read_text().splitlines()]


def encoded(run_directory: Path, tokenizer) -> list[dict]:
    rows = (encode(row, tokenizer) for row in rows_of(run_directory, "test"))
    return [{"input_ids": ids, "supervised": supervised} for ids, supervised in rows]


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """Directory of a finished run of `tiny`, made where reasoning-gym cannot be imported."""
    directory = tmp_path_factory.mktemp("chain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "reasoning_gym", None)
        run(load_recipe("tiny", MINIATURE), directory, SILENT)
    return directory


# -- data ------------------------------------------------------------------------------------------------------------


def test_the_answer_is_where_the_arrows_end():
    counts = []
    for row in distinct_rows(settings(), seed=3, count=300):
        *words, start = row["messages"][0]["content"].split()
        target = dict(word.split(">") for word in words)
        assert len(target) == 12 and {f"e{place}" for place in range(12)} == set(target)
        path = [start]
        while target[path[-1]] != path[-1]:
            path.append(target[path[-1]])
        counts.append(len(path) - 1)
        assert row["answer"] == f"{start} {path[-1]}"
        assert row["messages"][1]["content"] == f"the value is Answer: {row['answer']}"
    assert set(counts) == {1, 2} and 0.58 < np.mean(np.array(counts) == 1) < 0.75  # two thirds


def test_the_settings_decide_the_form():
    for row in distinct_rows(settings(places=8, levels=4, arrows=[3]), seed=0, count=20):
        *words, at = row["messages"][0]["content"].split()
        target = dict(word.split(">") for word in words)
        assert len(target) == 8 and sum(place == end for place, end in target.items()) == 2
        for _ in range(3):
            assert target[at] != at
            at = target[at]
        assert target[at] == at


def test_a_seed_gives_its_own_data():
    first, again, other = (list(distinct_rows(settings(), seed, 30)) for seed in (0, 0, 1))
    assert first == again and not any(row in first for row in other)


def test_too_few_questions():
    few = settings(places=2, levels=2, arrows=[1])  # two lines in two orders
    assert len(list(distinct_rows(few, 0, 4))) == 4
    with pytest.raises(ValueError, match="data.generate allows only 4 different questions, not 5; allow more places"):
        list(distinct_rows(few, 0, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": 13}, "data.generate.places=13 must be a multiple of levels=3"),
        ({"arrows": [1, 3]}, r"data.generate.arrows=\[1, 3\] must be numbers below levels=3"),
        ({"arrows": []}, "data.generate.arrows"),
        ({"min_terms": 3}, "data.generate.min_terms is unknown"),
    ],
)
def test_wrong_settings_are_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


# -- the chain -------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint(chain):
    asked = {split: {row["messages"][0]["content"] for row in rows_of(chain, split)} for split in SIZES}
    assert {split: len(questions) for split, questions in asked.items()} == SIZES
    assert len(set.union(*asked.values())) == sum(SIZES.values())


def test_every_word_is_one_token(chain):
    tokenizer = load_tokenizer(str(chain / "base"))
    for row in rows_of(chain, "test"):
        ids, supervised = encode(row, tokenizer)
        said = row["messages"][1]["content"].split()
        assert len(ids) == 2 + 13 + len(said) + 1 and tokenizer.pad_token_id not in ids
        words = tokenizer.convert_ids_to_tokens([token for token, flag in zip(ids, supervised, strict=True) if flag])
        assert words == [*said, tokenizer.eos_token]


def test_the_report_has_every_control(chain):
    found = json.loads((chain / "report" / "report.json").read_text())
    tokens, answers = found["tokens"], found["answers"]
    assert set(answers) == {
        *("standard", "standard_compute", "never", "decider", "confidence", "random", "blind", "always")
    }
    assert set(tokens) == {*answers, "oracle", "second_choice", "second_choice_of_policy"}
    text = (chain / "report" / "report.md").read_text()
    for row in ("baseline (equal compute)", "second choice of the policy's tokens", "random at equal share"):
        assert f"| {row} |" in text
    change = tokens["decider"]["accuracy"] - tokens["blind"]["accuracy"]
    assert tokens["decider"]["minus_blind"]["value"] == pytest.approx(change)
    (blind,) = (line for line in found["statements"] if "read no text" in line)
    assert "does not measurably beat `blind`" in blind or " beats `blind`" in blind or "worse than `blind`" in blind


def test_second_choices_are_those_after_one_pass(chain):
    """The row is recomputed from logits of the base, one text at a time."""
    tokenizer, model = load_tokenizer(str(chain / "decider")), load_tah(str(chain / "decider")).eval()
    rows = encoded(chain, tokenizer)
    passes = score_tokens(model, rows, tokenizer.pad_token_id, Rule()).passes > 1
    hits = []
    for row in rows:
        target = np.array(row["input_ids"])[1:][row["supervised"][1:]]
        logits = (
            model(torch.tensor([row["input_ids"]]), policy="never")
            .logits[0, :-1]
            .detach()
            .numpy()[row["supervised"][1:]]
        )
        order = (-logits).argsort(1)
        chosen = passes[len(hits) : len(hits) + len(target)]
        hits += (order[np.arange(len(target)), chosen.astype(int)] == target).tolist()
    found = json.loads((chain / "report" / "report.json").read_text())["tokens"]["second_choice_of_policy"]
    assert 0 < passes.mean() < 1 and found["accuracy"] == pytest.approx(np.mean(hits))


def test_random_tokens_differ_between_rows_of_one_form(chain):
    """The policy `random` is a hash, by which either all rows or no row iterate at a position with the same token."""
    tokenizer, model = load_tokenizer(str(chain / "decider")), load_tah(str(chain / "decider"))
    rows = encoded(chain, tokenizer)
    first = {}
    for name, policy in (("hash", "random"), ("drawn", _at_random(0.3, 1)), ("again", _at_random(0.3, 1))):
        passes = score_tokens(model, rows, tokenizer.pad_token_id, Rule(policy)).passes.reshape(30, 7)
        first[name] = passes > 1
    assert len(set(first["hash"][:, 0])) == 1 and len(set(first["drawn"][:, 0])) == 2
    assert (first["drawn"] == first["again"]).all() and 0.2 < first["drawn"].mean() < 0.4


def test_runs_of_before_are_not_made_again(tmp_path):
    recipe = load_recipe("tiny-paper", ["controls.equal_compute=true", "controls.blind=true"])
    made = Run(recipe, tmp_path / "run", chain_of(recipe), SILENT).wanted
    assert {name: record["fingerprint"] for name, record in made.items()} == BEFORE
    other = load_recipe("tiny-paper", ["data.generate.task=sums"])
    assert Run(other, tmp_path / "run", chain_of(other), SILENT).wanted["data"]["fingerprint"] != BEFORE["data"]


@pytest.mark.slow
def test_the_first_training_gains(tmp_path):
    """At full size, the decider's policy beats both baselines by more than a tenth, and the blind control does not."""
    begin = time.process_time()
    run(load_recipe("tiny"), tmp_path / "run", SILENT)
    assert time.process_time() - begin < 300
    answers = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["answers"]
    for baseline in ("standard", "standard_compute", "blind"):
        assert answers["decider"][f"minus_{baseline}"]["low"] > 0.1
    assert abs(answers["blind"]["minus_standard"]["value"]) < 0.03
    assert answers["random"]["minus_never"]["high"] < answers["decider"]["minus_never"]["low"]
