"""GRPO of tokens and depths: decisions are drawn with their probability, which is part of the loss, and are learned."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from helpers.trl_models import model_of, words
from tah.model import TrainingPass

pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
trl = pytest.importorskip("trl", reason="TRL is not installed")

from tah.training import trl as ours  # noqa: E402

ROWS = [{"prompt": "e1>e2 " * 3 * (i % 2) + f"e{i}>e1 e{i}"} for i in range(4)]
SETTINGS = {
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "num_iterations": 2,
    "max_completion_length": 10,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def tokenizer():
    return words()


@pytest.fixture
def trainer_for(tokenizer, tmp_path):
    def make(reward, model=None, peft_config=None, **settings):
        model = model_of(tokenizer) if model is None else model
        arguments = trl.GRPOConfig(str(tmp_path), **SETTINGS | settings)
        given = {"processing_class": tokenizer, "peft_config": peft_config}
        return ours.SampledDepthGRPOTrainer(model, reward, arguments, Dataset.from_list(ROWS), **given)

    return make


def passes(depth_count, **kwargs):
    """A reward for each pass."""
    return [sum(depths) / len(depths) for depths in depth_count]


def cost(depth_count, **kwargs):
    """A cost for each pass."""
    return [-reward for reward in passes(depth_count)]


@torch.no_grad()
@pytest.mark.parametrize("max_depth", [2, 3])
def test_log_probability_is_that_of_the_token_and_of_the_decisions_before_it(trainer_for, tokenizer, max_depth):
    """Of each completion alone, from the logits and the continue logits of the model."""
    seen = {}

    def reward(depth_count, completion_ids, **kwargs):
        seen["counts"] = depth_count
        return [float(len(ids)) for ids in completion_ids]

    torch.manual_seed(0)
    trainer = trainer_for(reward, model_of(tokenizer, max_depth=max_depth))
    model = trainer.model.train()
    batch = trainer._generate_and_score_completions([row for row in ROWS[:2] for _ in range(4)])
    width, tokens_only = batch["prompt_ids"].shape[1], []
    for row in range(8):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row] > 0]
        completion = batch["completion_ids"][row][batch["completion_mask"][row] > 0]
        start, end = width - len(prompt), width + len(completion)
        depths = batch["depth_labels"][row, start:end][None]
        assert seen["counts"][row] == depths[0, len(prompt) - 1 : -1].tolist()
        training = TrainingPass(follow_labels=True)
        out = model(torch.cat([prompt, completion])[None], depth_labels=depths, training=training)
        each = out.logits.log_softmax(-1)[0, :-1].gather(-1, torch.cat([prompt, completion])[1:, None])[:, 0]
        decisions = torch.zeros(depths.shape[1])
        for depth in range(1, max_depth):
            logits = out.continue_logits[0, :, depth - 1]
            taken = F.logsigmoid(torch.where(depths[0] > depth, logits, -logits))
            decisions += torch.where(depths[0] >= depth, taken, 0)
        found = batch["old_per_token_logps"][row, : len(completion)]
        each, decisions = each[len(prompt) - 1 :], decisions[len(prompt) - 1 : -1]
        torch.testing.assert_close(found, each + decisions, atol=1e-5, rtol=1e-5)
        tokens_only.append((found - each).abs().max())
    assert max(tokens_only) > 0.1  # control: the decisions are part of it


@torch.no_grad()
def test_decisions_are_drawn_with_their_probability(tokenizer):
    model = model_of(tokenizer)
    policy = ours.Sampled(model.decider)
    ids = torch.randint(4, len(tokenizer), (40, 20), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    probability = model(ids).continue_prob.flatten()
    taken = sum((model(ids, policy=policy).depth_count > 1).flatten().double() for _ in range(5))
    deviation = float((5 * probability * (1 - probability)).sum().sqrt())
    assert abs(float(taken.sum() - 5 * probability.sum())) < 4 * deviation
    assert not torch.equal(taken > 2, probability > 0.5)  # control: not the threshold


@pytest.mark.parametrize("reward", [passes, cost])
def test_the_decider_learns_what_a_pass_is_worth(trainer_for, reward):
    torch.manual_seed(0)
    trainer = trainer_for(reward, max_steps=20, learning_rate=1e-2, per_device_train_batch_size=16)
    trainer.train()
    shares = [line["iterated_share"] for line in trainer.state.log_history if "iterated_share" in line]
    first, last = shares[0], sum(shares[-4:]) / 4  # the first rollout is that of the untrained decider
    assert last > first + 0.2 if reward is passes else last < first - 0.2, shares


def test_an_adapter_of_peft_has_to_train_the_decider(trainer_for):
    """PEFT freezes all other weights; `modules_to_save` makes a copy of the decider that is trained."""
    peft = pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"no weight of the decider requires a gradient.*modules_to_save=\['decider'\]"
    ):
        trainer_for(passes, peft_config=peft.LoraConfig(r=2, target_modules=["o_proj"]))
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["decider"])
    trainer = trainer_for(passes, peft_config=adapter, max_steps=2, learning_rate=1e-2)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters() if "decider" in name}
    trainer.train()
    changed = {
        name for name, weight in trainer.model.named_parameters() if name in before and (weight != before[name]).any()
    }
    assert changed and all("modules_to_save" in name for name in changed)


def test_a_frozen_decider_is_refused(trainer_for, tokenizer):
    model = model_of(tokenizer)
    model.decider.requires_grad_(False)
    with pytest.raises(ValueError, match=r"without PEFT call model.decider.requires_grad_\(True\)$"):
        trainer_for(passes, model)


def test_another_trl_is_refused(trainer_for, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"^SampledDepthGRPOTrainer is written for trl 1.16, not 1.17.0"):
        trainer_for(passes)


def test_a_mixture_is_refused(trainer_for, tokenizer):
    with pytest.raises(ValueError, match=r"^the output is a mixture, or the head has"):
        trainer_for(passes, model_of(tokenizer, output="mixture"))


def test_a_model_without_a_decider_is_refused(trainer_for, tokenizer):
    with pytest.raises(ValueError, match="the model has no decider"):
        trainer_for(cost, model_of(tokenizer, policy="always", decider=None))
