"""The paper's next input: embeddings weighted by the probabilities of the best tokens so far (spec A.3).

Shapes: M tokens that run the next pass, k = mix_topk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .outputs import CHUNK, RunningOutput


def mixed_embedding(total: RunningOutput, tokens: Tensor, embed: nn.Module, k: int) -> Tensor:
    """Softmax over the `k` highest accumulated logits of each token, times their embedding rows: [M] -> [M, D].

    While training, the gradient of a head that is one matrix and of a plain embedding touches those k rows only;
    autograd would make several dense [V, D] of it.

    Args:
        total: what the passes of the tokens add up to so far.
        tokens: [M] flat indices.
        embed: the base's input embedding.
        k: how many tokens take part; at most V.
    """
    if not (torch.is_grad_enabled() and total.head.is_single_matrix and _is_plain(embed)):

        def mix(logits: Tensor) -> Tensor:  # [n, V] -> [n, D]
            weights, ids = best(logits, k)
            return weighted(weights, embed(ids))

        return total.map_logits(tokens, mix)
    with torch.no_grad():
        found = [best(total.logits(chunk, exact=False), k) for chunk in tokens.split(CHUNK)]
    weights, ids = (torch.cat(part) for part in zip(*found, strict=True))
    scale = total.head.scale / total.head.divide
    matrix, padding = total.head.linear.weight, embed.padding_idx
    return _Mix.apply(total.total[tokens], matrix, embed.weight, weights, ids, scale, padding)


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[n, V] -> probabilities [n, k] float32 and token ids [n, k]"""
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return top.float().softmax(-1), ids


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """[n, k], [n, k, D] -> [n, D]"""
    return torch.einsum("nk,nkd->nd", weights.to(rows.device), rows.float()).to(rows.dtype)


def _is_plain(embed: nn.Module) -> bool:
    """Whether a call is a look-up in one matrix that is here (not sharded, not offloaded) and nothing else."""
    here = type(embed.weight) is nn.Parameter and not hasattr(embed, "_hf_hook")
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
        return torch.cat([weighted(weights[part], table[ids[part]]) for part in _parts(len(ids))])

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
            to_w = torch.einsum("nkd,nd->nk", table[best].float(), g)
            to_z = w * (to_w - (w * to_w).sum(-1, keepdim=True)) * ctx.scale
            if to_hidden is not None:
                to_hidden[part] = torch.einsum("nk,nkd->nd", to_z, matrix[best].float()).to(hidden.dtype)
            if to_matrix is not None:
                to_matrix.index_add_(0, best.flatten(), (to_z[..., None] * h[:, None]).flatten(0, 1))
            if to_table is not None:
                w = w if ctx.padding is None else w.masked_fill(best == ctx.padding, 0)  # as nn.Embedding has it
                to_table.index_add_(0, best.flatten(), (w[..., None] * g[:, None]).flatten(0, 1))
        if ctx.tied:
            to_matrix = None
        matrix_grad = None if to_matrix is None else to_matrix.to(matrix.dtype)
        table_grad = None if to_table is None else to_table.to(table.dtype)
        return to_hidden, matrix_grad, table_grad, None, None, None, None


def _zeros(like: Tensor) -> Tensor:
    """For sums in float32: bfloat16 would lose the small ones."""
    return torch.zeros_like(like, dtype=torch.float32)


def _parts(count: int) -> list[slice]:
    """`CHUNK` tokens at a time: their rows are [CHUNK, k, D]."""
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]
