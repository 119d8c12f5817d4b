"""The threshold of a trained decider, chosen on held-out tokens. `stats.threshold` has the arithmetic.

Shapes: n supervised tokens (of all validation rows together).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..core.loss import IGNORE, shift
from ..model import TaHForCausalLM, TrainingPass
from ..stats.threshold import Decisions, threshold_for_loss, threshold_for_share
from .recipe import Decider
from .trainer import Objective


@torch.no_grad()
def measure_decisions(model: TaHForCausalLM, batches: Iterable[dict[str, Tensor]], objective: Objective) -> Decisions:
    """The decider's probability for every supervised token, and the losses when all of them run a second pass.

    With `attention="own"` the second losses are those of any policy; with `duo` they are those of iterating on all
    supervised tokens, an approximation for a policy that iterates on few.

    Args:
        model: with a decider; its max_depth is >= 2.
        batches: from `data.Collator`.
        objective: of the decider's stage; it defines which tokens the decider should find.
    """
    model.eval()
    found: list[list[Tensor]] = []
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "row"}
        supervised = shift(batch["labels"]) != IGNORE
        rest = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        out = model(
            batch["input_ids"],
            **rest,
            labels=batch["labels"],
            depth_labels=torch.where(supervised, 2, 1),
            policy="decider",
            max_depth=2,
            training=TrainingPass(follow_labels=True, loss_weights=(0.5, 0.5)),
            logits_to_keep=supervised.new_empty(0).long(),
            use_cache=False,
        )
        one, two = out.token_loss[supervised].unbind(-1)
        hard = one - two > objective.gain if objective.by_gain else batch["depth_labels"][supervised] > 1
        probability = out.continue_logits[:, :, 0][supervised].double().sigmoid()
        found.append([x.cpu() for x in (probability, hard, one, two)])
    if not found:
        raise ValueError("no validation rows to choose a threshold on")
    return Decisions(*(torch.cat(column).numpy() for column in zip(*found, strict=True)))


def choose_threshold(decisions: Decisions, decider: Decider) -> float:
    """The threshold that gives the recipe's share of iterated tokens, or the lowest loss."""
    if decider.target == "loss":
        return threshold_for_loss(decisions)
    assert decider.target_share is not None  # checked by the recipe
    return threshold_for_share(decisions.probability, decider.target_share)
