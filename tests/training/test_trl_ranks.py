"""Trainers of other libraries in two processes, with gradient checkpointing and a decider that is not frozen."""

import json

import pytest
import torch
from test_distributed import torchrun

from helpers.trainer_ranks import POLICIES, ROWS, losses, model, plain, sft

pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


@torch.no_grad()
def test_rows_with_and_without_a_token_that_iterates():
    """The precondition of the test below."""
    assert (model("uneven")(ROWS).depth_count > 1).any(1).sum() == 4


@pytest.mark.parametrize("trainer", [plain, sft], ids=["plain", "trl"])
def test_two_ranks_have_the_losses_of_one(trainer, tmp_path):
    """DDP gets a gradient of every parameter from both ranks, also of those that no loss reaches."""
    if trainer is sft:
        pytest.importorskip("trl", reason="TRL is not installed")
    done = torchrun("-m", "helpers.trainer_ranks", trainer.__name__, str(tmp_path / "losses.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    for policy in POLICIES:
        want = losses(trainer(policy, str(tmp_path / policy), per_device_train_batch_size=2))
        assert found[policy] == pytest.approx(want, abs=1e-3), policy
