"""GRPO at given depth: an update computes the log-probabilities of the rollout, although decisions have changed."""

import pytest
import torch
from datasets import Dataset

from helpers.trl_models import model_of, words

pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
trl = pytest.importorskip("trl", reason="TRL is not installed")

from tah.training import trl as ours  # noqa: E402

ROWS = [{"prompt": "e1>e2 " * 3 * (i % 2) + f"e{i}>e1 e{i}"} for i in range(4)]
SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "steps_per_generation": 2,  # two batches of a rollout, so that the log-probabilities of the old policy are computed
    "gradient_accumulation_steps": 1,
    "max_completion_length": 10,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def reward(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture(scope="module")
def tokenizer():
    return words()


@pytest.fixture
def trainer_for(tokenizer, tmp_path):
    """Makes a trainer of a class, with settings that differ from `SETTINGS`."""

    def make(cls=ours.GivenDepthGRPOTrainer, model=None, dataset=ROWS, **settings):
        model = model_of(tokenizer) if model is None else model
        arguments = trl.GRPOConfig(str(tmp_path), **SETTINGS | settings)
        torch.manual_seed(0)
        return cls(model, reward, arguments, Dataset.from_list(dataset), processing_class=tokenizer)

    return make


def rollout(trainer):
    """The completions [8, C] of a rollout, as the trainer makes them, before it splits them into batches."""
    trainer.model.train()
    return trainer._generate_and_score_completions([row for row in ROWS[:2] for _ in range(4)])


def log_probs(trainer, batch):
    """Log-probabilities [B, C] of the completions in an update, 0 where masked."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])
    return found * batch["completion_mask"]


def ratio(trainer, batch):
    """Importance ratios [B, C] of an update."""
    trainer._depths = batch.get("depth_labels")
    return (log_probs(trainer, batch) - batch["old_per_token_logps"] * batch["completion_mask"]).exp()


@torch.no_grad()
def decoded(model, batch):
    """Log-probabilities [B, C] of the completions, each row alone, token by token with a cache."""
    found = torch.zeros(batch["completion_ids"].shape)
    for row, (prompt, mask) in enumerate(zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)):
        out = model(prompt[mask > 0][None], use_cache=True, logits_to_keep=1)
        for column in range(int(batch["completion_mask"][row].sum())):
            token = batch["completion_ids"][row, column]
            found[row, column] = out.logits[0, -1].log_softmax(-1)[token]
            out = model(token[None, None], past_key_values=out.past_key_values, use_cache=True)
    return found


def other_threshold(model):
    model.config.threshold = 0.3


def other_decider(model):
    with torch.no_grad():
        model.decider.output.weight.neg_()


def test_depths_and_log_probs_are_those_of_token_by_token_decoding(trainer_for):
    trainer = trainer_for()
    batch = rollout(trainer)
    length = batch["prompt_ids"].shape[1]
    again = batch["depth_labels"][:, length - 1 : -1] > 1
    share = float(again[batch["completion_mask"] > 0].float().mean())
    assert 0.1 < share < 0.9 and (batch["prompt_mask"] == 0).any()  # both kinds of tokens, and padding
    want = decoded(trainer.model.eval(), batch)
    trainer.model.train()
    torch.testing.assert_close(batch["old_per_token_logps"] * batch["completion_mask"], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ratio(trainer, batch), torch.ones_like(want), atol=1e-5, rtol=0)
    assert trainer._metrics["train"]["iterated_share"][0] > 0.1


@pytest.mark.parametrize("change", [other_threshold, other_decider])
def test_ratio_stays_one_where_the_decisions_change(trainer_for, change):
    """Replayed, the ratio is 1; decided again (control), it is not."""
    trainer = trainer_for()
    batch = rollout(trainer)
    change(trainer.model)
    assert float((ratio(trainer, batch) - 1).abs().max()) < 1e-5
    control = trainer_for(trl.GRPOTrainer)
    again = rollout(control)
    torch.testing.assert_close(again["completion_ids"], batch["completion_ids"])  # the same rollout
    assert float((ratio(control, again) - 1).abs().max()) < 1e-5  # the decisions are the same until they change
    change(control.model)
    assert float((ratio(control, again) - 1).abs().max()) > 1e-2


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "gradient_checkpointing": False}, {"beta": 0.1}])
def test_it_trains_base_and_lora_and_not_the_decider(trainer_for, tokenizer, tmp_path, settings):
    model = model_of(tokenizer)
    if "beta" in settings:  # TRL loads the reference model from the directory of the model
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model")
    trainer = trainer_for(model=model, max_steps=4, learning_rate=1e-3, **settings)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 4 and all(abs(line["loss"]) < 100 for line in logged)
    if "beta" in settings:
        assert logged[0]["kl"] == pytest.approx(0, abs=1e-6) and logged[-1]["kl"] > 1e-6
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    for part in ("embed_tokens", "q_proj.weight", "lora_A", "lora_B"):
        assert any(part in name for name in changed), part
    assert not any(name.startswith("decider.") for name in changed)


def test_reference_of_an_adapter_of_peft_takes_the_same_depths(trainer_for, tokenizer):
    """The reference is the model without the adapter, whose own decisions would differ after training."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)

    def with_adapter(*args, **kwargs):
        return ours.GivenDepthGRPOTrainer(*args, **kwargs, peft_config=adapter)

    trainer = trainer_for(with_adapter, beta=0.1)
    with torch.no_grad():
        batch = rollout(trainer)
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        plain, depths, length = model_of(tokenizer), batch["depth_labels"], batch["completion_ids"].shape[1]
        chosen = {"policy": "oracle", "depth_labels": depths}
        want, own = (plain(ids, mask, **given).logits.log_softmax(-1) for given in (chosen, {}))
    found = batch["ref_per_token_logps"] * batch["completion_mask"]
    want, own = (
        x[:, -length - 1 : -1].gather(-1, batch["completion_ids"][..., None]).squeeze(-1) * batch["completion_mask"]
        for x in (want, own)
    )
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert (found - own).abs().max() > 1e-2  # control


@torch.no_grad()
def test_evaluation_takes_the_depths_of_its_own_completions(trainer_for):
    """With ratios of 1 the loss is the mean advantage of the tokens, which no longer holds if decisions are new."""
    found = []
    for cls in (ours.GivenDepthGRPOTrainer, trl.GRPOTrainer):
        trainer = trainer_for(cls)
        trainer.model.eval()
        batch = trainer._prepare_inputs(ROWS)
        other_decider(trainer.model)
        mask = batch["completion_mask"]
        want = -(batch["advantages"][:, None] * mask).sum() / mask.sum()
        found.append(float((trainer.compute_loss(trainer.model, batch) - want).abs()))
    assert found[0] < 1e-5 < 1e-3 < found[1]


def test_other_sources_of_completions_are_refused(trainer_for):
    with pytest.raises(ValueError, match="rollout_func: depths are known only if the model's generate"):
        trainer_for(lambda *a, **k: ours.GivenDepthGRPOTrainer(*a, **k, rollout_func=lambda prompts, trainer: {}))


def test_a_rollout_of_other_tokens_is_refused(trainer_for, monkeypatch):
    """The depths are those of the tokens that `generate` returned, and a TRL that changes them is noticed."""
    trainer = trainer_for()
    generate = trl.GRPOTrainer._generate_single_turn

    def changed(self, *args, **kwargs):
        ids, log_probs = generate(self, *args, **kwargs)
        return [[ids[0][0] ^ 1, *ids[0][1:]], *ids[1:]], log_probs

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", changed)
    with pytest.raises(ValueError, match="not those of the rollout"):
        rollout(trainer)


def test_another_trl_is_refused(trainer_for, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"written for trl 1.16, not 1.17.0: pip install 'trl==1.16"):
        trainer_for()
