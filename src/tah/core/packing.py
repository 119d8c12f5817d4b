"""Chosen tokens of a batch as rows packed left, and back.

Shapes: B batch, T tokens, M chosen tokens, R rows with at least one, P packed columns, H heads, K head width, D width.
A token is named by its flat index b * T + t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packed:
    """Chosen tokens of some rows, packed left: [R, P] columns, of which `valid` ones hold a token.

    The other entries repeat the first token of their row, so that their result is finite. It is not used.
    """

    rows: Tensor  # [R] batch rows with a chosen token
    columns: Tensor  # [R, P] column of each packed token in the [B, T] input
    valid: Tensor  # [R, P] bool
    full: bool  # whether every entry is valid
    batch_row: Tensor  # [M] batch row of each chosen token
    packed_column: Tensor  # [M] its column among the packed tokens of its row: 0, 1, ...


def pack(tokens: Tensor, length: int) -> Packed:
    """Return the layout of sorted flat indices [M] of a [B, T] input (T = `length`) as rows packed left."""
    batch_row, source = tokens // length, tokens % length
    rows, index, counts = torch.unique_consecutive(batch_row, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts  # [R] index of each row's first token
    packed_column = torch.arange(len(tokens), device=tokens.device) - first[index]
    width = int(counts.max())
    columns = source[first][:, None].repeat(1, width)  # padding repeats the row's first token
    columns[index, packed_column] = source
    valid = torch.arange(width, device=tokens.device) < counts[:, None]
    return Packed(rows, columns, valid, len(tokens) == valid.numel(), batch_row, packed_column)


def lay_out(x: Tensor, packed: Packed) -> Tensor:
    """Return x [M, D] as packed rows [R, P, D], zero at padding."""
    if packed.full:
        return x.view(*packed.valid.shape, -1)
    rows = x.new_zeros(*packed.valid.shape, x.shape[-1])
    rows[packed.valid] = x
    return rows


def unpack(x: Tensor, packed: Packed) -> Tensor:
    """Return the packed tokens of x [R, H, P, K] without the padding, [M, H, K]."""
    x = x.transpose(1, 2)  # [R, P, H, K]
    return x.flatten(0, 1) if packed.full else x[packed.valid.to(x.device)]
