"""The paper's next input: embeddings weighted by the probabilities of the best tokens so far.

Shapes: M tokens that run the next pass, k = mix_topk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import fast
from .compat import is_offloaded
from .logits import RunningOutput

ROWS = 64  # tokens mixed at a time


def mixed_embedding(total: RunningOutput, tokens: Tensor, embed: nn.Module) -> Tensor:
    """Softmax over the highest accumulated logits of each token, times their embedding rows: [M] -> [M, D].

    While training, the gradient of a head that is one matrix and of a plain embedding touches those rows only;
    autograd would make several dense [V, D] of it.

    Args:
        total: what the passes of the tokens add up to so far.
        tokens: [M] flat indices.
        embed: the base's input embedding.
    """
    sparse = torch.is_grad_enabled() and total.head.is_single_matrix and is_plain(embed)
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
    """[n, k], [n, k, D] -> [n, D]"""
    return torch.einsum("nk,nkd->nd", weights.to(rows.device), rows.float()).to(rows.dtype)


def is_plain(embed: nn.Module) -> bool:
    """Whether a call is a look-up in one matrix that is here (not sharded, not offloaded) and nothing else."""
    here = type(embed.weight) is nn.Parameter and not is_offloaded(embed)
    return type(embed) is nn.Embedding and embed.max_norm is None and here


class _Mix(torch.autograd.Function):
    """`weights` = softmax of scale * hidden @ matrix[ids].T, output = weights @ table[ids]."""

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
        """hidden [M, D], matrix and table [V, D], weights and ids [M, k] -> [M, D]"""
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
                w = w if ctx.padding is None else w.masked_fill(best == ctx.padding, 0)  # as nn.Embedding has it
                _add_to_rows(to_table, best, w, g)
        if ctx.tied:
            to_matrix = None
        matrix_grad = None if to_matrix is None else to_matrix.to(matrix.dtype)
        table_grad = None if to_table is None else to_table.to(table.dtype)
        return to_hidden, matrix_grad, table_grad, None, None, None, None


def _dots_with_rows(x: Tensor, matrix: Tensor, ids: Tensor) -> Tensor:
    """Products of x [n, D] with the rows `ids` [n, k] of matrix [V, D]: [n, k] float32"""
    if fast.is_small(matrix, ids):
        return (x @ matrix.float().T).gather(1, ids)
    return torch.einsum("nkd,nd->nk", matrix[ids].float(), x)


def _weighted_rows(weights: Tensor, matrix: Tensor, ids: Tensor) -> Tensor:
    """Sums of the rows `ids` [n, k] of matrix [V, D], weighted [n, k]: [n, D] float32"""
    if fast.is_small(matrix, ids):
        return fast.spread(weights, ids, len(matrix)) @ matrix.float()
    if fast.sums_rows(matrix):
        return fast.sum_of_rows(weights, matrix, ids)
    return torch.einsum("nk,nkd->nd", weights, matrix[ids].float())


def _add_to_rows(total: Tensor, ids: Tensor, weights: Tensor, x: Tensor) -> None:
    """Add x [n, D], weighted [n, k], to the rows `ids` [n, k] of total [V, D] float32."""
    if fast.is_small(total, ids):
        total.addmm_(fast.spread(weights, ids, len(total)).T, x)
    else:
        total.index_add_(0, ids.flatten(), (weights[..., None] * x[:, None]).flatten(0, 1))


def _zeros(like: Tensor) -> Tensor:
    """For sums in float32: bfloat16 would lose the small ones."""
    return torch.zeros_like(like, dtype=torch.float32)


def _parts(count: int) -> list[slice]:
    """`ROWS` tokens at a time: the rows of their best are [ROWS, k, D]."""
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]
