"""Choose the threshold of a trained decider on held-out tokens (method.md, section 10).

`stats.threshold` has the arithmetic.

Shapes: n supervised tokens of all validation rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..model import TaHForCausalLM, TrainingPass
from ..stats.threshold import Decisions, threshold_for_loss, threshold_for_share
from .recipe import Decider
from .trainer import Objective, supervised_of


@torch.no_grad()
def measure_decisions(model: TaHForCausalLM, batches: Iterable[dict[str, Tensor]], objective: Objective) -> Decisions:
    """Return the continue probability of every supervised token, and its losses at depths 1 and 2.

    All supervised tokens run a second pass. With `attention="own"` the losses at depth 2 hold for every policy. With
    `duo` they hold only if all supervised tokens iterate, and approximate a policy that iterates on few.

    Args:
        model: Model with a decider and `max_depth` of at least 2.
        batches: Batches of `data.Collator`.
        objective: Objective of stage `decider`. It defines which tokens should iterate.

    Returns:
        Arrays `[n]` in the order of the batches.

    Raises:
        ValueError: There are no validation rows.
    """
    model.eval()
    found: list[list[Tensor]] = []
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "row"}
        supervised = supervised_of(batch)
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
        raise ValueError("there are no validation rows to choose a threshold on")
    return Decisions(*(torch.cat(column).numpy() for column in zip(*found, strict=True)))


def choose_threshold(decisions: Decisions, decider: Decider) -> float:
    """Return the threshold for the recipe's iterated share, or for the lowest loss.

    Args:
        decisions: Result of `measure_decisions`.
        decider: Section `decider` of the recipe.
    """
    if decider.target == "loss":
        return threshold_for_loss(decisions)
    assert decider.target_share is not None  # the recipe checks it
    return threshold_for_share(decisions.probability, decider.target_share)
