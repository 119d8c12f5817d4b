"""Joint training of TaH2 by recipe: where it starts, the depths of a curriculum, what evaluation runs, refusals."""

import json

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("pydantic")

from test_train import SECTION, TAH2, recipe_of, run  # noqa: F401 - fixtures
from transformers import Trainer, TrainingArguments

from helpers.models import pad, token_ids
from tah import TaHForCausalLM
from tah.data.rows import Collator
from tah.training.train import Rows, prepare_model, train
from tah.training.trainer import Meter, Objective, TaHTrainer, read_of


def test_a_tah_model_can_be_the_start(run, recipe_of):  # noqa: F811
    """Its depth 1 is kept, and the parts of TaH2 are new, as from the base; a TaH2 model is continued as it is."""
    first = train(recipe_of("paper"), "backbone", run)
    recipe = recipe_of("tah2", backbone={"init": str(first), "method": "tah2", "training": SECTION})
    model, _ = prepare_model(recipe, "backbone", run)
    source = TaHForCausalLM.from_pretrained(first)
    assert model.config.output == "mixture" and model.config.threshold == 0.5
    ids = token_ids() % 60
    want = source(ids, policy="never").logits.log_softmax(-1)
    assert torch.equal(model(ids, policy="never").logits, want)
    assert not any("lora_" in name for name, _ in model.named_parameters())

    model.config.threshold = 0.93
    with torch.no_grad():
        model.decider.score.weight.fill_(0.125)
    model.save_pretrained(run / "tah2")
    model, _ = prepare_model(
        recipe_of("tah2", backbone={"init": str(run / "tah2"), "method": "tah2", "training": SECTION}), "backbone", run
    )
    assert (model.decider.score.weight == 0.125).all() and model.config.threshold == 0.5


def test_depths_of_a_curriculum_and_of_evaluation(run, recipe_of, monkeypatch):  # noqa: F811
    """Side passes run in training only; with depth 2 of 3 in the first half, no token runs depth 3 there."""
    deepest, side = {}, {}
    forward = TaHForCausalLM.forward

    def seen(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        deepest.setdefault(self.training, []).append(int(out.depth_count.max()))
        side.setdefault(self.training, set()).add(out.pass_loss is not None)
        return out

    monkeypatch.setattr(TaHForCausalLM, "forward", seen)
    training = SECTION | {"eval_strategy": "steps", "eval_steps": 2}
    schedule = {"method": "tah2", "depth_schedule": [[0, 2], [0.5, 3]], "coverage": [0.99, 0.9], "training": training}
    directory = train(recipe_of("tah2", backbone=schedule), "backbone", run)
    assert deepest[True] == [2, 2, 3, 3]
    assert side == {True: {True}, False: {False}}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval_loss" in line for line in lines) == 2


def test_padding_on_the_left_changes_no_loss_and_no_metric(run, recipe_of, tmp_path):  # noqa: F811
    """The first real token has a label, and padding before it. Only Trainer's own count has that label."""
    recipe = recipe_of("tah2", backbone={"method": "tah2", "training": SECTION})
    model, _ = prepare_model(recipe, "backbone", run)
    ids = token_ids() % 60
    bare = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    left = {
        "input_ids": pad(ids, left=3),
        "labels": pad(ids, left=3, value=-100),
        "attention_mask": pad(bare["attention_mask"], left=3),
    }
    objective = Objective("backbone", "tah2", 3)
    state = type("State", (), {"global_step": 0, "max_steps": 1})()
    found = []
    for batch in (bare, left):
        meter = Meter()
        loss, out = objective.loss(model.train(), dict(batch), state, False, None)
        meter.add(out, batch)
        found.append({"loss": loss.item(), **meter.take(lambda sums: sums)})
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[0]["decisions"] >= 1
    args = TrainingArguments(tmp_path / "trainer", use_cpu=True, report_to=[], remove_unused_columns=False)
    counts = {}
    for kind, given in ((TaHTrainer, {"objective": objective}), (Trainer, {})):
        trainer = kind(model=model, args=args, **given)
        counts[kind] = [int(trainer.get_batch_samples(iter([b]), 1, torch.device("cpu"))[1]) for b in (bare, left)]
    assert counts == {TaHTrainer: [22, 22], Trainer: [22, 24]}  # docs/reference/limits.md


def test_padding_of_packed_rows_is_not_read():
    """It is a document of its own at the end of a row, without a mask."""
    rows = [{"input_ids": [5] * n, "supervised": [False] + [True] * (n - 1)} for n in (4, 3, 5)]
    batch = Collator(0, packed=True)([{"documents": rows[:2]}, {"documents": rows[2:]}])
    assert "attention_mask" not in batch and batch["input_ids"].shape == (2, 7)
    assert read_of(batch).tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    plain = Collator(0)(rows)
    assert read_of(plain).sum() == 12


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"decider": {"training": SECTION}}, "set decider=null"),
        ({"model": {"decider": {"kind": "lean"}}}, "trains a decider of kind tah2"),
        ({"model": {"decider": None}}, "trains a decider of kind tah2"),
        ({"model": {"output": "sum"}}, "needs model.output=mixture or even"),
        ({"model": {"attention": "blind"}}, "has no blind control"),
        ({"backbone": {"loss_weights": [1, 0, 0]}}, "has no place in method tah2"),
        ({"backbone": {"coverage": []}}, "must be one number, or one per depth but the last"),
        ({"backbone": {"coverage": [0.9, 0.9, 0.9]}}, "must be one number, or one per depth but the last"),
        ({"backbone": {"method": "always", "coverage": [0.9]}}, "coverage is for method tah2, not always"),
    ],
)
def test_refusals(section, message, recipe_of):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        recipe_of("tah2", **{"backbone": {"method": "tah2"}} | section)


def test_the_decider_loss_is_that_of_the_last_forward(run, recipe_of):  # noqa: F811
    """Control of the weight: with weight 0 the loss of a step is the mixture's alone."""
    recipe = recipe_of("tah2", backbone={"method": "tah2", "training": SECTION})
    model, tokenizer = prepare_model(recipe, "backbone", run)
    rows = Rows.load(run / "labels" / "train", recipe)
    batch = Collator(tokenizer.pad_token_id)([rows[0], rows[1]])
    batch.pop("row", None)
    state = type("State", (), {"global_step": 0, "max_steps": 1})()
    losses = {}
    for weight in (0.0, 0.05, 1.0):
        objective = Objective("backbone", "tah2", 3, decider_weight=weight)
        losses[weight], out = objective.loss(model.train(), dict(batch), state, False, None)
        assert weight or torch.equal(losses[weight], out.loss)
    low, high = losses[0.05] - losses[0.0], losses[1.0] - losses[0.0]
    assert high > 0.01 and torch.allclose(20 * low, high, rtol=1e-3)
