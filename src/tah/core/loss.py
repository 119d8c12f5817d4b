"""Next-token loss without [B, T, V], method.md (10) and (12), and the decider's loss (11).

Shapes: B batch, T tokens, N chosen tokens, n supervised ones of them, D width, V vocabulary, M = max_depth.

Position t predicts token t + 1, so labels are shifted here, once. A position is supervised if its shifted label is not
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
from .logits import Found, RunningOutput

IGNORE = -100
CHUNK = 256  # tokens whose logits [CHUNK, V] are in memory at the same time


def shift(labels: Tensor) -> Tensor:
    """Return the label [B, T] that each position should predict, from `labels` [B, T]; `IGNORE` at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def targets_of(labels: Tensor, valid: Tensor | None, shifted: bool = False) -> Tensor:
    """Return the token id [B, T] that each position should predict, `IGNORE` where it predicts nothing.

    Padding predicts nothing. So the first token behind padding, or the first of a padded document, has no loss, also if
    it has a label.

    Args:
        labels: Token ids [B, T], `IGNORE` where not supervised.
        valid: Mask [B, >= T] with 0 at padding, of which the last T columns are read; None if there is no padding.
        shifted: Whether each label belongs to the position that predicts it (`shift_labels`).
    """
    targets = labels if shifted else shift(labels)
    if valid is None:
        return targets
    return targets.masked_fill(~valid[:, -labels.shape[1] :].to(labels.device).bool(), IGNORE)


class DepthLoss:
    """Weighted cross-entropy of each supervised token after each pass, method.md (12), collected during the forward.

    The output of a token that stops at depth c stands for the deeper depths too. Its loss is
    sum_d weights[d] * CE[min(d, c)]. Call `add` after each pass and `value` once, at the end.

    Args:
        targets: Token id [B, T] that each position should predict, `IGNORE` where not supervised (see `shift`).
        max_depth: Most passes M of this call.
        weights: Weight of the output after each depth 1..M. None: 1 for the final output and 0 for the others, (10).

    Raises:
        ValueError: The number of weights is not M.
    """

    def __init__(self, targets: Tensor, max_depth: int, weights: Sequence[float] | None) -> None:
        if weights is not None and len(weights) != max_depth:
            raise ValueError(f"{len(weights)} loss_weights for a max_depth of {max_depth}; give one per depth")
        weights = [0.0] * (max_depth - 1) + [1.0] if weights is None else weights
        self.weights, self.max_depth = torch.tensor(weights, dtype=torch.float32), max_depth
        self.target = targets.flatten()  # [B*T]
        self.count = (self.target != IGNORE).sum()
        self.total: Tensor = torch.zeros((), device=targets.device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []  # hidden states for one call of the head
        self.by_depth = torch.full((len(self.target), max_depth), math.nan, device=targets.device)

    def add(self, output: RunningOutput, depth: int, tokens: Tensor, go: Tensor | None = None) -> None:
        """Add the loss after pass `depth`.

        Args:
            output: Sum of the passes so far.
            depth: Depth of the pass.
            tokens: Flat indices [N] of the tokens that ran it.
            go: Whether each token [N] takes another pass. None: no token does.
        """
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
        """Add a scalar zero whose gradient reaches the parameters of an idle pass."""
        self.total = self.total + zero

    def _note(self, each: Tensor, tokens: Tensor, stops: Tensor, depth: int) -> None:
        each = each.to(self.by_depth)
        self.by_depth[tokens, depth - 1] = each
        self.by_depth[tokens[stops], depth:] = each[stops, None]

    def value(self, output: RunningOutput, num_items_in_batch: int | Tensor | None) -> Tensor:
        """Return the loss. The head runs here once, on the tokens of all depths, so its gradient [V, D] is made once.

        Args:
            output: Sum of all passes.
            num_items_in_batch: Divisor. None: the number of supervised tokens of this call.
        """
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
    """Return whether logits are one matrix times a hidden state, so that `cross_entropy` applies.

    Raises:
        ValueError: Training runs under ZeRO-3, where no process holds the whole matrix and all processes would have to
            call the head equally often.
    """
    if hasattr(output.head.linear.weight, "ds_id"):
        raise ValueError("training under ZeRO-3 is not supported; use FSDP2 or ZeRO-2")
    return output.is_single_matrix


def cross_entropy(head: Head, hidden: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum (float32, differentiable) and the cross-entropy [N] of each token (float32, detached).

    The forward computes logits, their softmax and the gradients for `CHUNK` tokens at a time. So the head runs once and
    no [N, V] is kept.

    Args:
        head: A head that is one matrix.
        hidden: Hidden states [N, D], summed over the passes so far.
        target: Token ids [N].
        weight: Weights [N] float32.
    """
    grad, scale = torch.is_grad_enabled(), head.scale / head.divide
    return _LinearCrossEntropy.apply(hidden, head.linear.weight, target, weight, scale, grad)


def replayed_cross_entropy(
    output: RunningOutput, tokens: Tensor, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same as `cross_entropy`, for any head. The backward runs the head again, `CHUNK` tokens at a time.

    Args:
        output: Sum of the passes so far.
        tokens: Flat indices [N].
        target: Token ids [N].
        weight: Weights [N] float32.
    """
    now = output.so_far()  # the backward must not include later passes

    def chunk(part: tuple[Tensor, Found], target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        each = F.cross_entropy(now.logits(*part).float(), target, reduction="none")
        return (each * weight).sum(), each.detach()

    chunks = zip(now.chunks(tokens, CHUNK), target.split(CHUNK), weight.split(CHUNK), strict=True)
    parts = [checkpoint(chunk, *part, use_reentrant=False) for part in chunks]
    return torch.stack([total for total, _ in parts]).sum(), torch.cat([each for _, each in parts])


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `scale * hidden @ matrix.T`, with its gradients computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, target: Tensor, weight: Tensor, scale: float, grad: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum and each cross-entropy [N] of hidden [N, D], matrix [V, D], target and weight [N]."""
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype
        w, target, weight = matrix.to(low), target.to(hidden.device), weight.to(hidden.device)
        each = torch.empty(len(hidden), device=hidden.device)
        to_hidden = torch.empty_like(hidden) if grad and ctx.needs_input_grad[0] else None
        # Summed over chunks in float32, because bfloat16 loses small terms.
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
    """Return the binary cross-entropy of the decisions, method.md (11), divided once.

    Args:
        continue_logits: Continue logits [B, T, M - 1]; nan where the policy did not decide.
        target: Whether [B, T, M - 1] bool the token should take another pass after that depth.
        asked: Decisions [B, T, M - 1] bool that count: those of supervised tokens, never of prompt tokens.
        weight: Weight [B, T, M - 1] float32 of each decision; 1 by default.
        pos_weight: Weight of the decisions whose target is True; 1 by default.
        num_items_in_batch: Divisor. None: the number of decisions that count.
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
