"""DPO: TRL's loss is that of a slow computation, in which each model decides for itself which tokens iterate."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from helpers.trl_models import model_of, words

pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
trl = pytest.importorskip("trl", reason="TRL is not installed")

BETA = 0.3
ROWS = [
    {
        "prompt": "e1>e2 " * (1 + i),
        "chosen": " ".join(f"e{j}>e{j + i}" for j in range(4 + i)),
        "rejected": " ".join(f"e{j + i}>e{j}" for j in range(6 - i)),
    }
    for i in range(4)
]


@pytest.fixture(scope="module")
def tokenizer():
    return words()


def reference_of(model):
    """Another model than the policy: other weights, and other decisions."""
    reference = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "layers" in name:
                weight.add_(torch.randn_like(weight), alpha=0.1 * float(weight.std().nan_to_num()))
        reference.decider.output.weight.neg_()
    return reference


@pytest.fixture
def trainer_for(tokenizer, tmp_path):
    def make(model, reference, **settings):
        fixed = {"max_steps": 3, "per_device_train_batch_size": 4, "beta": BETA, "logging_steps": 1, "use_cpu": True}
        fixed |= {"report_to": "none", "save_strategy": "no", "bf16": False, "disable_tqdm": True}
        arguments = trl.DPOConfig(str(tmp_path), **fixed | settings)
        rows = Dataset.from_list(ROWS)
        return trl.DPOTrainer(model, reference, arguments, train_dataset=rows, processing_class=tokenizer)

    return make


@torch.no_grad()
def log_prob(model, row, name, depths=None):
    """Log-probability of a completion, and the depths [1, T]; without padding, and with the model's own decisions."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
    given = {} if depths is None else {"policy": "oracle", "depth_labels": depths}
    out = model(ids, **given)
    each = out.logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    return each[-len(row[f"{name}_ids"]) :].sum(), out.depth_count


def slow_loss(model, reference, rows, other_decisions=False):
    """The loss of DPO, one completion at a time; as a control with the decisions of the reference model."""
    losses = []
    for row in rows:
        score = 0.0
        for name, sign in (("chosen", 1), ("rejected", -1)):
            wanted, depths = log_prob(reference, row, name)
            found, _ = log_prob(model, row, name, depths if other_decisions else None)
            score += sign * (found - wanted)
        losses.append(-F.logsigmoid(BETA * score))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("precomputed", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("policy", ["decider", "always"])
def test_loss_equals_a_slow_computation(trainer_for, tokenizer, policy, precomputed):
    model = model_of(tokenizer, policy=policy)
    reference = reference_of(model)
    slow = copy.deepcopy(model), copy.deepcopy(reference)
    trainer = trainer_for(model, reference, precompute_ref_log_probs=precomputed)
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("ref_chosen_logps" in batch) == precomputed and (batch["attention_mask"] == 0).any()
    loss = float(trainer.compute_loss(trainer.model.train(), batch))
    assert loss == pytest.approx(slow_loss(*slow, trainer.train_dataset), abs=1e-4)
    assert abs(loss - 0.6931) > 1e-2  # the models differ
    if policy == "decider":  # control: the decisions of the policy are its own
        share = torch.cat([log_prob(slow[0], row, "chosen")[1].flatten() for row in trainer.train_dataset]) > 1
        assert 0.1 < float(share.float().mean()) < 0.9
        assert abs(loss - slow_loss(*slow, trainer.train_dataset, other_decisions=True)) > 1e-2


def test_it_trains_base_and_lora_and_not_the_decider(trainer_for, tokenizer, tmp_path):
    """Without a reference model TRL loads one from the directory of the model, so the first loss is log 2."""
    model = model_of(tokenizer)
    model.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model")
    trainer = trainer_for(model, None, learning_rate=1e-3)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0]
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    for part in ("embed_tokens", "q_proj.weight", "lora_A", "lora_B"):
        assert any(part in name for name in changed), part
    assert not any(name.startswith("decider.") for name in changed)
