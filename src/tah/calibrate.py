"""How good a decider is, and the threshold it should use: measured on held-out tokens, never trained.

Shapes: n supervised tokens (of all validation rows together).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .loss import IGNORE, shift
from .model import TaHForCausalLM
from .trainer import Objective

BINS = 10  # of the calibration table


@dataclass
class Judged:
    """The decider's word on n supervised tokens after depth 1, and what a second pass does to them."""

    probability: np.ndarray  # [n] float64, of going on
    hard: np.ndarray  # [n] bool, what it should say
    loss_one: np.ndarray  # [n] cross-entropy after depth 1, nats
    loss_two: np.ndarray  # [n] after a second pass of every supervised token


@torch.no_grad()
def judge(model: TaHForCausalLM, batches: Iterable[dict[str, Tensor]], objective: Objective) -> Judged:
    """Ask the decider about every supervised token, and run all of them a second time.

    With `attention="own"` the second losses are those of any policy; with `duo` they are those of iterating on all
    supervised tokens, an approximation for a policy that iterates on few.

    Args:
        model: with a decider; its max_depth is >= 2.
        batches: from `data.Collator`.
        objective: of the decider's stage; says what it should find.
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
            follow_labels=True,
            policy="decider",
            max_depth=2,
            loss_weights=(0.5, 0.5),
            logits_to_keep=supervised.new_empty(0).long(),
            use_cache=False,
        )
        one, two = out.token_loss[supervised].unbind(-1)
        hard = one - two > objective.gain if objective.by_gain else batch["depth_labels"][supervised] > 1
        probability = out.continue_logits[:, :, 0][supervised].double().sigmoid()
        found.append([x.cpu() for x in (probability, hard, one, two)])
    if not found:
        raise ValueError("no validation rows to choose a threshold on")
    probability, hard, one, two = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    return Judged(probability, hard, one, two)


def threshold_for_share(probability: np.ndarray, share: float) -> float:
    """The threshold at which this share of tokens iterates, half-way between the two tokens it separates."""
    return _between(np.sort(probability)[::-1], round(share * len(probability)))


def threshold_for_loss(judged: Judged) -> float:
    """The threshold at which the mean cross-entropy is lowest."""
    order = np.argsort(-judged.probability, kind="stable")
    gained = np.concatenate([[0.0], np.cumsum((judged.loss_one - judged.loss_two)[order])])
    return _between(judged.probability[order], int(gained.argmax()))


def _between(falling: np.ndarray, count: int) -> float:
    """A threshold that `count` of the falling probabilities exceed (fewer where some are equal)."""
    above = falling[count - 1] if count > 0 else 1.0
    below = falling[count] if count < len(falling) else 0.0
    return float(np.clip((above + below) / 2, 0.0, 1.0))


def quality(judged: Judged, threshold: float) -> dict[str, Any]:
    """AUROC, average precision, precision and recall at the threshold, calibration, and the losses by policy.

    Precision, recall and AUROC are None where they are undefined (no token iterates; all or none are hard).
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    p, hard, goes = judged.probability, judged.hard, judged.probability > threshold
    both = bool(hard.any()) and not bool(hard.all())
    hits = int((goes & hard).sum())
    index = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = []
    for k in range(BINS):
        if count := int((index == k).sum()):
            bins.append({"tokens": count, "said": float(p[index == k].mean()), "was": float(hard[index == k].mean())})
    return {
        "tokens": len(p),
        "threshold": threshold,
        "iterated_share": float(goes.mean()),
        "hard_share": float(hard.mean()),
        "auroc": float(roc_auc_score(hard, p)) if both else None,
        "average_precision": float(average_precision_score(hard, p)) if both else None,
        "precision": hits / int(goes.sum()) if goes.any() else None,
        "recall": hits / int(hard.sum()) if hard.any() else None,
        "calibration_error": sum(b["tokens"] * abs(b["said"] - b["was"]) for b in bins) / len(p),
        "calibration": bins,
        "loss": {
            "never": float(judged.loss_one.mean()),
            "always": float(judged.loss_two.mean()),
            "decider": float(np.where(goes, judged.loss_two, judged.loss_one).mean()),
            "oracle": float(np.where(hard, judged.loss_two, judged.loss_one).mean()),
        },
    }
