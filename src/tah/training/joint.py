"""Joint training of TaH2, method.md (16) and (17): labels by what one more pass gains, and the decider's loss.

Shapes: B batch, T tokens, M = max_depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.logits import TaHOutput

SMALLEST_COST = 1e-6
LARGEST_COST = 1.0
LARGEST_POS_WEIGHT = 50.0


@dataclass
class GainLabels:
    """How many passes each supervised token should take, by what its passes gain.

    Args:
        depth_labels: Passes [B, T] that each token should take; 0 where not supervised.
        cost: Weight [B, T, M - 1] float32 of the decision after each depth.
        asked: Whether [B, T, M - 1] bool the decision after each depth counts.
        boundaries: Smallest gain [M - 1] in nats, float64, that makes a token hard.
    """

    depth_labels: Tensor
    cost: Tensor
    asked: Tensor
    boundaries: Tensor


def gain_labels(
    out: TaHOutput,
    supervised: Tensor,
    coverage: Sequence[float],
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> GainLabels:
    """Return labels by what one more pass gains, method.md (16).

    Args:
        out: Output of a forward with `TrainingPass(side_passes=True)`.
        supervised: Mask [B, T] bool.
        coverage: Share of the total gain that hard tokens have, by depth. The last one holds for deeper decisions too.
        gather: Function that joins one-dimensional tensors of all processes.
    """
    loss, count = out.pass_loss, out.depth_count
    assert loss is not None and count is not None
    label = supervised.long()
    candidates = supervised
    cost = torch.full_like(loss[:, :, 1:], SMALLEST_COST)
    asked = torch.zeros_like(cost, dtype=torch.bool)
    boundaries = []
    for depth in range(1, loss.shape[2]):
        ran = supervised & (count >= depth) & ~loss[:, :, depth].isnan()  # no decision in a row at its largest depth
        executed = candidates & ran
        gain = torch.where(executed, loss[:, :, depth - 1] - loss[:, :, depth], 0)
        share = coverage[min(depth, len(coverage)) - 1]
        bound = _boundary(gather(gain[executed & (gain > 0)].double()), share)
        hard = executed & (gain > 0 if bound == 0 else gain.double() >= bound)
        cost[:, :, depth - 1] = torch.where(
            executed, (gain - bound).abs().clamp(SMALLEST_COST, LARGEST_COST).to(cost), SMALLEST_COST
        )
        asked[:, :, depth - 1] = ran
        label = label + hard
        candidates = hard
        boundaries.append(bound)
    return GainLabels(label, cost, asked, torch.tensor(boundaries, dtype=torch.float64))


def _boundary(gains: Tensor, share: float) -> float:
    """Return the smallest of the largest gains that add up to `share` of all; 0 if there are none."""
    if not len(gains):
        return 0.0
    falling = gains.sort(descending=True).values
    sums = falling.cumsum(0)
    at = int((sums < share * sums[-1]).sum())
    return float(falling[min(at, len(falling) - 1)])


def joint_decider_loss(
    out: TaHOutput,
    labels: GainLabels,
    items: int | Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return the decider's loss, method.md (17), a scalar.

    Args:
        out: Output of the forward.
        labels: Labels of its tokens.
        items: Divisor: supervised tokens of the whole optimiser step.
        reduce: Function that adds up a tensor of all processes.
    """
    assert out.continue_logits is not None
    total: Any = out.continue_logits.new_zeros(())
    for depth in range(1, labels.asked.shape[2] + 1):
        asked = labels.asked[:, :, depth - 1]
        target = (labels.depth_labels > depth)[asked].to(out.continue_logits)
        positive, negative = reduce(torch.stack([target.sum(), (1 - target).sum()])).tolist()
        ratio = negative / positive if positive and negative else 1.0
        weight = min(max(ratio, 1 / LARGEST_POS_WEIGHT), LARGEST_POS_WEIGHT)
        logits = out.continue_logits[:, :, depth - 1][asked]
        each = F.binary_cross_entropy_with_logits(
            logits, target, pos_weight=logits.new_tensor(weight), reduction="none"
        )
        total = total + (each * labels.cost[:, :, depth - 1][asked]).sum()
    return total / items
