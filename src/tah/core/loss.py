"""Next-token loss without [B, T, V], and the loss that trains a decider.

Shapes: B batch, T tokens, N tokens in question, n supervised ones of them, D width, V vocabulary, M = max_depth.

Position t predicts token t + 1, so labels are shifted here, once; a token is supervised where its shifted label is not
`IGNORE`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .head import Head
from .logits import RunningOutput

IGNORE = -100
CHUNK = 256  # tokens whose logits [CHUNK, V] exist at the same time


def shift(labels: Tensor) -> Tensor:
    """Labels [B, T] of tokens -> [B, T] of what each position should predict; nothing at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


class DepthLoss:
    """Cross-entropy of each supervised token after every pass, added up as the passes happen.

    A token that stops at depth c keeps its output at deeper depths, so its loss is sum_d weights[d] * CE[min(d, c)].

    Args:
        labels: [B, T], not shifted.
        max_depth: M, most passes of this call.
        weights: one per depth 1..M, what the output after that depth counts; None: only the final output, with 1.

    Raises:
        ValueError: the wrong number of weights.
    """

    def __init__(self, labels: Tensor, max_depth: int, weights: Sequence[float] | None) -> None:
        if weights is not None and len(weights) != max_depth:
            raise ValueError(f"{len(weights)} loss_weights for a max_depth of {max_depth}; give one per depth")
        weights = [0.0] * (max_depth - 1) + [1.0] if weights is None else weights
        self.weights, self.max_depth = torch.tensor(weights, dtype=torch.float32), max_depth
        self.target = shift(labels).flatten()  # [B*T]
        self.count = (self.target != IGNORE).sum()
        self.total: Tensor = torch.zeros((), device=labels.device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []  # rows for the one call of the head
        self.by_depth = torch.full((len(self.target), max_depth), math.nan, device=labels.device)

    def add(self, output: RunningOutput, depth: int, tokens: Tensor, go: Tensor | None = None) -> None:
        """After pass `depth`: `tokens` [N] just ran it, those where `go` [N] run another (None: nobody does)."""
        here, rest = float(self.weights[depth - 1]), float(self.weights[depth - 1 :].sum())
        weight = torch.full((len(tokens),), rest, device=tokens.device)
        if go is not None:
            weight = torch.where(go, here, weight)
        counts = (self.target[tokens] != IGNORE) & (weight != 0)
        stops = torch.ones_like(counts) if go is None else ~go
        tokens, weight, stops = tokens[counts], weight[counts], stops[counts]
        if len(tokens) == 0:
            return
        if is_single_matrix(output):
            self.waiting.append((output.total[tokens], weight, tokens, stops, depth))
        else:
            total, each = replayed_cross_entropy(output, tokens, self.target[tokens], weight)
            self.total = self.total + total.to(self.total.device)
            self._note(each, tokens, stops, depth)

    def add_zero(self, zero: Tensor) -> None:
        """Add a scalar zero whose gradient reaches what an idle pass uses."""
        self.total = self.total + zero

    def _note(self, each: Tensor, tokens: Tensor, stops: Tensor, depth: int) -> None:
        each = each.to(self.by_depth)
        self.by_depth[tokens, depth - 1] = each
        self.by_depth[tokens[stops], depth:] = each[stops, None]

    def value(self, output: RunningOutput, num_items_in_batch: int | Tensor | None) -> Tensor:
        """The sum over tokens, per item, or per supervised token of this call. Ends the forward: rows of all
        depths meet the head at once, so that its gradient [V, D] exists once."""
        if self.waiting:
            hidden = torch.cat([rows for rows, *_ in self.waiting])
            weight = torch.cat([weights for _, weights, *_ in self.waiting])
            tokens = torch.cat([ran for _, _, ran, *_ in self.waiting])
            total, each = cross_entropy(output.head, hidden, self.target[tokens.to(self.target.device)], weight)
            self.total = self.total + total.to(self.total.device)
            sizes = [len(entry[0]) for entry in self.waiting]
            for part, (_, _, ran, stops, depth) in zip(each.split(sizes), self.waiting, strict=True):
                self._note(part, ran, stops, depth)
            self.waiting = []
        items: Any = self.count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return self.total / (items.to(self.total.device) if isinstance(items, Tensor) else items)


def is_single_matrix(output: RunningOutput) -> bool:
    """Whether logits are one matrix times a hidden state, which `cross_entropy` takes.

    Raises:
        ValueError: under ZeRO-3, which holds no whole matrix and would need all ranks to call the head equally often.
    """
    if hasattr(output.head.linear.weight, "ds_id"):
        raise ValueError("training under ZeRO-3 is not supported; use FSDP2 or ZeRO-2")
    return output.head.is_single_matrix


def cross_entropy(head: Head, hidden: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum (float32, differentiable) and each token's cross-entropy [N] (float32, not differentiable).

    `CHUNK` tokens at a time: logits, their softmax and the gradients, all within the forward, so that the head runs
    once and no [N, V] is kept.

    Args:
        head: a single matrix without bias or soft-cap.
        hidden: [N, D], summed over the passes so far.
        target: [N] token ids.
        weight: [N] float32.
    """
    grad, scale = torch.is_grad_enabled(), head.scale / head.divide
    return _LinearCrossEntropy.apply(hidden, head.linear.weight, target, weight, scale, grad)


def replayed_cross_entropy(
    output: RunningOutput, tokens: Tensor, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """As `cross_entropy`, for any head: `CHUNK` tokens at a time, the head run again in the backward.

    Args:
        output: accumulated over the passes so far.
        tokens: [N] flat indices.
    """
    now = output.so_far()  # the backward must not see later passes

    def chunk(tokens: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        each = F.cross_entropy(now.logits(tokens).float(), target, reduction="none")
        return (each * weight).sum(), each.detach()

    chunks = zip(tokens.split(CHUNK), target.split(CHUNK), weight.split(CHUNK), strict=True)
    parts = [checkpoint(chunk, *part, use_reentrant=False) for part in chunks]
    return torch.stack([total for total, _ in parts]).sum(), torch.cat([each for _, each in parts])


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `scale * hidden @ matrix.T`, gradients computed along with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, target: Tensor, weight: Tensor, scale: float, grad: bool
    ) -> tuple[Tensor, Tensor]:
        """hidden [N, D], matrix [V, D], target [N], weight [N] -> weighted sum, each [N]; `grad`: gradients too"""
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype
        w, target, weight = matrix.to(low), target.to(hidden.device), weight.to(hidden.device)
        each = torch.empty(len(hidden), device=hidden.device)
        to_hidden = torch.empty_like(hidden) if grad and ctx.needs_input_grad[0] else None
        # Summed over chunks in float32: bfloat16 would lose the small ones.
        wanted = grad and ctx.needs_input_grad[1]
        to_matrix = torch.zeros_like(matrix, dtype=torch.float32) if wanted else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), CHUNK):
                part = slice(start, start + CHUNK)
                h, row = hidden[part].to(low), torch.arange(len(hidden[part]), device=hidden.device)
                z = (h @ w.T).float().mul_(scale)
                norm = z.logsumexp(-1)
                each[part] = norm - z[row, target[part]]
                if to_hidden is None and to_matrix is None:
                    continue
                z.sub_(norm[:, None]).exp_()  # the softmax, then its gradient
                z[row, target[part]] -= 1
                z = z.mul_((weight[part] * scale)[:, None]).to(low)
                if to_hidden is not None:
                    to_hidden[part] = z @ w
                if to_matrix is not None and low == torch.float32:
                    to_matrix.addmm_(z.T, h)
                elif to_matrix is not None:
                    to_matrix += z.T @ h
        ctx.save_for_backward(to_hidden, to_matrix)
        ctx.dtype = matrix.dtype
        ctx.mark_non_differentiable(each)
        return (each * weight).sum(), each

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        to_hidden, to_matrix = ctx.saved_tensors
        if to_hidden is not None:
            to_hidden = to_hidden * grad
        if to_matrix is not None:
            to_matrix = to_matrix.mul_(grad).to(ctx.dtype)
        return to_hidden, to_matrix, None, None, None, None


def decider_loss(
    continue_logits: Tensor,
    target: Tensor,
    asked: Tensor,
    weight: Tensor | None = None,
    pos_weight: float | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of "runs another pass", normalised once.

    Args:
        continue_logits: [B, T, M - 1]; nan where the policy was not asked.
        target: [B, T, M - 1] bool, whether the token should go on after that depth.
        asked: [B, T, M - 1] bool, the decisions that count: supervised tokens only, never prompt tokens.
        weight: [B, T, M - 1] float32, importance of each decision; 1 by default.
        pos_weight: weight of the decisions to go on; 1 by default.
        num_items_in_batch: divide by this; by default by the number of decisions that count.
    """
    asked = asked & ~continue_logits.isnan()
    positive = None if pos_weight is None else continue_logits.new_tensor(pos_weight)
    each = F.binary_cross_entropy_with_logits(
        continue_logits[asked], target[asked].to(continue_logits), pos_weight=positive, reduction="none"
    )
    if weight is not None:
        each = each * weight[asked]
    items: Any = asked.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return each.sum() / items
