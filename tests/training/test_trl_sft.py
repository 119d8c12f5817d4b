"""SFT with the loss of every depth, in TRL's own trainer: the numbers of our trainer and of a slow computation."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, TrainingArguments

from helpers.trl_models import model_of, words
from tah.core.loss import shift
from tah.training.trainer import Objective, TaHTrainer

pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
trl = pytest.importorskip("trl", reason="TRL is not installed")

from tah.training import trl as ours  # noqa: E402

PACKED = {"packing": True, "max_length": 24}
LAYOUTS = {"padded": {}, "padding_free": {"padding_free": True, "max_length": None}, "packed": PACKED}
ROWS = [
    {"prompt": "e1>e2 " * (1 + i % 3), "completion": " ".join(f"e{j % 15}>e{(i + j) % 13}" for j in range(3 + i % 4))}
    for i in range(8)
]


@pytest.fixture(scope="module")
def tokenizer():
    return words()


@pytest.fixture
def trainer_for(tokenizer, tmp_path):
    """Makes a trainer of rows of prompt and completion; only the completion is supervised."""

    def make(cls=ours.LookAheadSFTTrainer, model=None, rows=ROWS, objective=None, **settings):
        fixed = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True}
        fixed |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "learning_rate": 1e-3}
        own = {} if objective is None else {"objective": objective}
        model = model_of(tokenizer) if model is None else model
        arguments = trl.SFTConfig(str(tmp_path), **fixed | settings)
        return cls(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **own)

    return make


def own_trainer(model, objective, directory):
    """Our trainer of the same model."""
    return TaHTrainer(objective=objective, model=model, args=TrainingArguments(str(directory), use_cpu=True))


@torch.no_grad()
def slow_loss(model, batch, weights):
    """The loss (12) of a batch from the logits [1, T, V] of each document alone, one call per depth."""
    total, count = 0.0, 0
    for row in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        ids, labels = (
            x if "attention_mask" not in batch else x[batch["attention_mask"][row] > 0] for x in (ids, labels)
        )
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist() if "position_ids" in batch else [0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            document, targets = ids[start:end][None], shift(labels[start:end][None])
            for depth, weight in enumerate(weights, 1):
                depths = torch.where(targets != -100, depth, 1)
                logits = model(document, policy="oracle", depth_labels=depths, max_depth=len(weights)).logits
                total += weight * float(F.cross_entropy(logits[0], targets[0], reduction="sum"))
            count += int((targets != -100).sum())
    return total / count


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights", [None, (0.25, 0.75)], ids=["equal", "weighted"])
def test_loss_is_that_of_our_trainer_and_of_each_document_alone(trainer_for, tmp_path, layout, weights):
    objective = Objective("backbone", "lookahead", 2, loss_weights=weights)
    trainer = trainer_for(objective=objective, **LAYOUTS[layout])
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in batch) == (layout != "padded") and (batch["labels"] == -100).any()
    model = trainer.model.eval()
    loss = trainer.compute_loss(model, dict(batch))
    want = own_trainer(model, objective, tmp_path / "own").compute_loss(model, dict(batch))
    assert float(loss) == pytest.approx(float(want), abs=1e-6)
    assert float(loss) == pytest.approx(slow_loss(model, batch, weights or (0.5, 0.5)), abs=1e-5)
    last = trl.SFTTrainer.compute_loss(trainer, model, dict(batch))
    assert abs(float(loss) - float(last)) > 1e-2  # control: TRL's own loss is that of the last output
    counted = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(100))
    supervised = int((shift(batch["labels"]) != -100).sum())
    assert float(counted) == pytest.approx(float(loss) * supervised / 100, rel=1e-5)


def test_loss_of_flattened_rows(trainer_for):
    """transformers' own collator of rows without padding gives the boundaries by position ids too."""
    rows = [{"input_ids": [5, 9, 17, 4][: 2 + i], "labels": [-100, 9, 17, 4][: 2 + i]} for i in range(3)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(copy.deepcopy(rows))
    trainer = trainer_for()
    model = trainer.model.eval()
    assert float(trainer.compute_loss(model, batch)) == pytest.approx(slow_loss(model, batch, (0.5, 0.5)), abs=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("joint", [False, True], ids=["backbone", "joint"])
def test_it_trains_every_part_and_logs_each_depth(trainer_for, layout, joint):
    objective = Objective("backbone", "lookahead", 2, joint=joint)
    trainer = trainer_for(objective=objective, eval_strategy="no", gradient_accumulation_steps=2, **LAYOUTS[layout])
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    for part in ("embed_tokens", "q_proj.weight", "lora_A", "lora_B", "norm"):
        assert any(part in name for name in changed), part
    assert any(name.startswith("decider.") for name in changed) == joint
    line = trainer.state.log_history[0]
    assert line["iterated_share"] == 1 and {"loss_depth_1", "loss_depth_2"} <= line.keys()
    if not joint:
        assert line["loss"] == pytest.approx((line["loss_depth_1"] + line["loss_depth_2"]) / 2, abs=1e-4)
    found = trainer.evaluate(Dataset.from_list(ROWS[:4]))
    assert found["eval_loss"] > 0 and "eval_loss_depth_2" in found


def test_two_updates_equal_those_of_our_trainer(trainer_for, tokenizer, tmp_path):
    """The same rows in the same order give the same weights, with the counts of accumulated batches."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "optim": "sgd"}
    settings |= {"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 3}
    trainer = trainer_for(gradient_checkpointing=False, **settings)
    trainer.train()
    arguments = TrainingArguments(str(tmp_path / "own" / "run"), use_cpu=True, save_strategy="no", **settings)
    own = TaHTrainer(
        objective=Objective("backbone", "lookahead", 2),
        model=model_of(tokenizer),
        args=arguments,
        train_dataset=trainer.train_dataset.select_columns(["input_ids", "labels"]),
        data_collator=trainer.data_collator,
    )
    own.train()
    for name, weight in own.model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), weight, atol=1e-6, rtol=1e-5)
    start = model_of(tokenizer).get_parameter("base.model.layers.0.self_attn.q_proj.lora_B.weight")
    assert not torch.allclose(own.model.get_parameter("base.model.layers.0.self_attn.q_proj.lora_B.weight"), start)


def test_a_directory_and_an_adapter_of_peft(trainer_for, tokenizer, tmp_path):
    """TRL loads the model itself; with PEFT only the adapter is trained, and the loss is still that of every depth."""
    peft = pytest.importorskip("peft")
    model = model_of(tokenizer)
    model.save_pretrained(tmp_path / "model")
    adapter = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"])
    arguments = trl.SFTConfig(str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to="none")
    trainer = ours.LookAheadSFTTrainer(
        str(tmp_path / "model"),
        arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = float(trainer.compute_loss(trainer.model.eval(), dict(batch)))
    assert loss == pytest.approx(slow_loss(model, batch, (0.5, 0.5)), abs=1e-5)  # a new adapter changes nothing
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all(".default." in name for name in changed)


def test_compute_metrics_gets_the_logits_of_the_policy(trainer_for):
    trainer = trainer_for()
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    _, out = trainer.compute_loss(model, dict(batch), return_outputs=True)
    with torch.no_grad():
        want = model(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(out.logits, want)


def test_a_head_with_a_soft_cap_is_trained_too(trainer_for, tokenizer):
    """The loss is that of the model, which holds the passes apart; TRL's own loss is refused there."""
    trainer = trainer_for(model=model_of(tokenizer, "gemma2"))
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    assert float(trainer.compute_loss(model, dict(batch))) == pytest.approx(
        slow_loss(model, batch, (0.5, 0.5)), abs=1e-5
    )
    with pytest.raises(ValueError, match="soft-cap"):
        trl.SFTTrainer.compute_loss(trainer, model, dict(batch))


@pytest.mark.parametrize("stage, method", [("backbone", "paper"), ("decider", "lookahead"), ("backbone", "always")])
def test_objectives_that_need_more_than_the_rows_are_refused(trainer_for, stage, method):
    with pytest.raises(ValueError, match=f"for the objective {stage} {method}; use method lookahead"):
        trainer_for(objective=Objective(stage, method, 2))


def test_joint_training_without_a_decider_is_refused(trainer_for, tokenizer):
    model = model_of(tokenizer, policy="always", decider=None)
    with pytest.raises(ValueError, match="the model has none"):
        trainer_for(model=model, objective=Objective("backbone", "lookahead", 2, joint=True))


def test_another_model_is_refused(trainer_for, tokenizer):
    with pytest.raises(ValueError, match="the model is a LlamaForCausalLM; make a TaH model"):
        trainer_for(model=model_of(tokenizer).base)
