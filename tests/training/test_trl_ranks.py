"""Trainers of other libraries in two processes, with gradient checkpointing and a decider that is not frozen."""

import pytest
import torch
from test_distributed import torchrun

from helpers.models import distance
from helpers.trainer_ranks import POLICIES, ROWS, SETTINGS, grpo, losses, model, plain, sft, weights

pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


@torch.no_grad()
def test_rows_with_and_without_a_token_that_iterates():
    """The precondition of the test below."""
    assert (model("uneven")(ROWS).depth_count > 1).any(1).sum() == 4


@pytest.mark.parametrize("trainer", [pytest.param(plain, marks=pytest.mark.slow), sft], ids=["plain", "trl"])
def test_two_ranks_have_the_losses_and_weights_of_one(trainer, tmp_path):
    """DDP gets a gradient of every parameter from both ranks, also of those that no loss reaches.

    Those have no gradient in one rank, and a gradient of zero in two, where weight decay reduces them.
    """
    if trainer is sft:
        pytest.importorskip("trl", reason="TRL is not installed")
    done = torchrun("-m", "helpers.trainer_ranks", trainer.__name__, str(tmp_path / "found.pt"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    for policy in POLICIES:
        alone = trainer(policy, str(tmp_path / policy), per_device_train_batch_size=2)
        before, decay = weights(alone), alone.get_decay_parameter_names(alone.model)
        want_losses, want = losses(alone), weights(alone)
        got_losses, got = found[policy]
        assert got_losses == pytest.approx(want_losses, abs=1e-4), policy
        unreached = {name for name, weight in want.items() if torch.equal(weight, before[name])}
        assert {name for name in before if name.startswith("decider.")} <= unreached
        reduced = (1 - SETTINGS["learning_rate"] * SETTINGS["weight_decay"]) ** 3
        expected = want | {name: before[name] * reduced for name in unreached.intersection(decay)}
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        assert sum(distance(want[name], before[name]) > 1e-3 for name in want) > 10  # control


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["given", "sampled"])
def test_two_ranks_of_grpo_have_the_mean_gradient_of_their_rollouts(kind, tmp_path):
    """Advantages compare the completions of both ranks, and the update is that of the gradients computed in one."""
    pytest.importorskip("trl", reason="TRL is not installed")
    done = torchrun("-m", "helpers.trainer_ranks", kind, str(tmp_path / "found"))
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"found.{rank}") for rank in (0, 1)]
    batches = [batch for made, _ in ranks for batch in made]
    advantages = torch.stack([batch["advantages"].sum() for batch in batches])
    assert len(batches) == 2 and abs(advantages.sum()) < 1e-5 < 1e-2 < advantages.abs().min()
    alone = grpo(kind, str(tmp_path / "alone"), per_device_train_batch_size=4)
    alone.model.train()
    alone.current_gradient_accumulation_steps = 1
    before = weights(alone)
    for batch in batches:
        (alone.compute_loss(alone.model, batch) / 2).backward()
    gradients = {name: weight.grad for name, weight in alone.model.named_parameters() if weight.grad is not None}
    assert any(name.startswith("decider.") for name in gradients) == (kind == "sampled")
    for _, got in ranks:
        want = {name: weight - gradients.get(name, torch.tensor(0.0)) for name, weight in before.items()}
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert sum(distance(ranks[0][1][name], before[name]) > 1e-3 for name in before) > 10  # control
