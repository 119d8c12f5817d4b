"""Next inputs: the paper's mix of token embeddings, method.md (4), and the network of TaH2, (13).

Shapes: M tokens that run the next pass, k = mix_topk, n tokens of a part of them, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import fast
from .compat import is_offloaded
from .logits import RunningOutput

ROWS = 64  # tokens mixed at a time
EPS = 1e-6  # of the norms of TaH2, whatever that of the base


class Norm(nn.RMSNorm):
    """An RMS norm of TaH2's networks, [..., D] -> [..., D].

    In autocast its input may have half precision beside weights in float32. torch then has no fused kernel, and warns.

    Args:
        width: Width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class GatedMLP(nn.Module):
    """The MLP of TaH2's networks, [..., D] -> [..., D]: W_down (silu(W_gate x) * W_up x).

    Args:
        width: Width D.
        inner: Inner width.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class NextInputMLP(nn.Module):
    """The next input of TaH2, method.md (13): a network of the token embedding and the last hidden state.

    Its output is the whole next input, without a residual connection.

    Args:
        width: Width D of the base.
        inner: Inner width of the MLP.
        norms: Whether there is a norm before the MLP, and one at the end.
    """

    def __init__(self, width: int, inner: int, norms: Sequence[bool]) -> None:
        super().__init__()
        self.norm_embed, self.norm_hidden = Norm(width), Norm(width)
        self.proj = nn.Linear(2 * width, width, bias=False)
        self.norm_pre = Norm(width) if norms[0] else nn.Identity()
        self.mlp = GatedMLP(width, inner)
        self.norm_out = Norm(width) if norms[1] else nn.Identity()

    def forward(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """Return next inputs [M, D] from token embeddings and last hidden states [M, D]."""
        x = self.proj(torch.cat([self.norm_embed(embeds), self.norm_hidden(hidden)], dim=-1))
        return self.norm_out(self.mlp(self.norm_pre(x))).to(embeds.dtype)  # autocast computes in half precision

    def reset_parameters(self) -> None:
        """Initialise the weights as the authors' code does."""
        reset_parts(self)


def reset_parts(module: nn.Module) -> None:
    """Initialise the linear layers and norms inside `module` by PyTorch's defaults."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.RMSNorm):
            part.reset_parameters()


def mixed_embedding(total: RunningOutput, tokens: Tensor, embed: nn.Module) -> Tensor:
    """Return next inputs [M, D]: the softmax over the k largest logits so far, times the embeddings of these k tokens.

    With gradients, if the head is one matrix and the embedding is plain, the backward touches only the rows of the k
    tokens. Autograd would make several dense [V, D].

    Args:
        total: Sum of the passes so far.
        tokens: Flat indices [M].
        embed: Input embedding of the base.
    """
    sparse = torch.is_grad_enabled() and total.is_single_matrix and is_plain(embed)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not sparse):
        weights, ids = total.best(tokens)
    if not sparse:
        if is_plain(embed) and fast.allowed(embed) and fast.sums_rows(embed.weight):
            return fast.sum_of_rows(weights, embed.weight, ids)
        return torch.cat([weighted(weights[part], embed(ids[part])) for part in _parts(len(ids))])
    scale = total.head.scale / total.head.divide
    matrix, padding = total.head.linear.weight, embed.padding_idx
    return _Mix.apply(total.total[tokens], matrix, embed.weight, weights, ids, scale, padding)


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """Return the sums [n, D] of `rows` [n, k, D], weighted by `weights` [n, k]."""
    return torch.einsum("nk,nkd->nd", weights.to(rows.device), rows.float()).to(rows.dtype)


def is_plain(embed: nn.Module) -> bool:
    """Return whether `embed` only looks up rows of one matrix that is neither sharded nor offloaded."""
    here = type(embed.weight) is nn.Parameter and not is_offloaded(embed)
    return type(embed) is nn.Embedding and embed.max_norm is None and here


class _Mix(torch.autograd.Function):
    """The mix (4) with a sparse backward: softmax(scale * hidden @ matrix[ids].T) @ table[ids]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        table: Tensor,
        weights: Tensor,
        ids: Tensor,
        scale: float,
        padding: int | None,
    ) -> Tensor:
        """Return the mix [M, D] of hidden [M, D], matrix and table [V, D], weights and ids [M, k]."""
        ctx.save_for_backward(hidden, matrix, table, weights, ids)
        ctx.scale, ctx.padding, ctx.tied = scale, padding, matrix is table
        mixed = [_weighted_rows(weights[part], table, ids[part]) for part in _parts(len(ids))]
        return torch.cat(mixed).to(table.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, matrix, table, weights, ids = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_table = _zeros(table) if ctx.needs_input_grad[2] else None
        to_matrix = _zeros(matrix) if ctx.needs_input_grad[1] and not ctx.tied else None
        if ctx.tied and to_table is not None:
            to_matrix = to_table
        for part in _parts(len(ids)):
            w, best, g, h = weights[part], ids[part], grad[part].float(), hidden[part].float()
            to_w = _dots_with_rows(g, table, best)
            to_z = w * (to_w - (w * to_w).sum(-1, keepdim=True)) * ctx.scale
            if to_hidden is not None:
                to_hidden[part] = _weighted_rows(to_z, matrix, best).to(hidden.dtype)
            if to_matrix is not None:
                _add_to_rows(to_matrix, best, to_z, h)
            if to_table is not None:
                w = w if ctx.padding is None else w.masked_fill(best == ctx.padding, 0)  # as in nn.Embedding
                _add_to_rows(to_table, best, w, g)
        if ctx.tied:
            to_matrix = None
        matrix_grad = None if to_matrix is None else to_matrix.to(matrix.dtype)
        table_grad = None if to_table is None else to_table.to(table.dtype)
        return to_hidden, matrix_grad, table_grad, None, None, None, None


def _dots_with_rows(x: Tensor, matrix: Tensor, ids: Tensor) -> Tensor:
    """Return the products [n, k] float32 of x [n, D] with the rows `ids` [n, k] of matrix [V, D]."""
    if fast.is_small(matrix, ids):
        return (x @ matrix.float().T).gather(1, ids)
    return torch.einsum("nkd,nd->nk", matrix[ids].float(), x)


def _weighted_rows(weights: Tensor, matrix: Tensor, ids: Tensor) -> Tensor:
    """Return the sums [n, D] float32 of the rows `ids` [n, k] of matrix [V, D], weighted by `weights` [n, k]."""
    if fast.is_small(matrix, ids):
        return fast.spread(weights, ids, len(matrix)) @ matrix.float()
    if fast.sums_rows(matrix):
        return fast.sum_of_rows(weights, matrix, ids)
    return torch.einsum("nk,nkd->nd", weights, matrix[ids].float())


def _add_to_rows(total: Tensor, ids: Tensor, weights: Tensor, x: Tensor) -> None:
    """Add x [n, D], weighted by `weights` [n, k], to the rows `ids` [n, k] of total [V, D] float32."""
    if fast.is_small(total, ids):
        total.addmm_(fast.spread(weights, ids, len(total)).T, x)
    else:
        total.index_add_(0, ids.flatten(), (weights[..., None] * x[:, None]).flatten(0, 1))


def _zeros(like: Tensor) -> Tensor:
    """Return float32 zeros like `like` for a sum: bfloat16 loses small terms."""
    return torch.zeros_like(like, dtype=torch.float32)


def _parts(count: int) -> list[slice]:
    """Return slices of `ROWS` tokens, so that the gathered embeddings [ROWS, k, D] stay small."""
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]
