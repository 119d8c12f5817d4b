"""Duo-causal attention of depth 2 (method.md (7)) over vLLM's paged depth-1 keys and the pool's depth-2 keys.

Shapes: T tokens of the step, M tokens at depth 2, R rows of a group with P queries each, N blocks of S slots, E pool
entries, H key/value heads, G query heads per key/value head, K head width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.attention import Attention

from .compat import read_blocks
from .pool import DeepPool

QUERIES = 256  # maximum queries of one request per group, which bounds the memory for scores
SHORT = 7  # below 2^7 tokens, padding costs less than the operations of one more group


@dataclass
class DeepTokens:
    """The tokens of a pass at depth 2. Each has an entry in the pool."""

    owners: list[int]  # [M] row of `tables` of each token's request; tokens of one request are in order
    positions: Tensor  # [M]
    slots: Tensor  # [M] physical slots of the depth-1 keys
    tables: Tensor  # [requests, most blocks] physical blocks


@dataclass
class Group:
    """Queries of one attention call: one query of each of R requests, or P queries of one request."""

    tokens: Tensor  # [R, P] index among the M tokens of the pass
    blocks: Tensor  # [R, N] physical blocks
    entries: Tensor  # [R, E] entries of the pool; arbitrary where masked
    mask: Tensor  # [R, 1, 1, P, N * S + E] 0 where the query attends to the key, else -inf


@dataclass
class DeepPass:
    """Data of one pass at depth 2 that all layers share."""

    pool: DeepPool
    entries: Tensor  # [M] pool entry of each token
    groups: list[Group]
    rows: Tensor | None = None  # [M] rows of the tokens in a mixed pass: T rows of the step, then added rows of depth 2
    step: int = 0  # T of a mixed pass


@dataclass
class Current:
    """Holder of the running pass, shared by the twins of all layers."""

    deep: DeepPass | None = None


def plan(tokens: DeepTokens, pool: DeepPool, block_size: int, own: bool) -> DeepPass:
    """Group the tokens of a pass by request and find the keys that they attend to; called once per pass.

    Args:
        tokens: Tokens of the pass.
        pool: Pool that has an entry for each token.
        block_size: Slots per block, S.
        own: Whether a query attends to no depth-2 key except its own (`attention="own"`).
    """
    by_request: dict[int, list[int]] = defaultdict(list)
    for token, owner in enumerate(tokens.owners):
        by_request[owner].append(token)
    together: dict[int, list[list[int]]] = defaultdict(list)
    groups: list[list[list[int]]] = []
    last = tokens.positions.tolist()
    for mine in by_request.values():
        if len(mine) == 1:  # requests of similar length are padded to the same length
            together[max(SHORT, last[mine[0]].bit_length())].append(mine)
        else:
            groups += [[mine[at : at + QUERIES]] for at in range(0, len(mine), QUERIES)]
    groups += together.values()
    made = [_group(tokens, torch.tensor(group), pool, block_size, own) for group in groups]
    entries = pool.entry_of_slot[tokens.slots]
    assert bool((entries >= 0).all()), "a token at depth 2 has no entry"  # -1 would overwrite another token's keys
    return DeepPass(pool, entries, made)


def _group(tokens: DeepTokens, group: Tensor, pool: DeepPool, block_size: int, own: bool) -> Group:
    """Return the group of the tokens `group` [R, P]."""
    query = tokens.positions[group]  # [R, P]
    N = int(query.max()) // block_size + 1
    blocks = tokens.tables[[tokens.owners[token] for token in group[:, 0].tolist()], :N].long()
    place = torch.arange(N * block_size, device=query.device)
    slots = (blocks[:, :, None] * block_size + place[:block_size]).flatten(1)  # [R, N * S]
    entry = pool.entry_of_slot[slots].masked_fill(place > query.amax(1, keepdim=True), -1)
    where, at = (entry >= 0).nonzero(as_tuple=True)
    count = torch.bincount(where, minlength=len(blocks))
    column = torch.arange(len(where), device=where.device) - (count.cumsum(0) - count)[where]
    E = int(count.max())
    entries, deep = slots.new_zeros(len(blocks), E), slots.new_full((len(blocks), E), N * block_size)
    entries[where, column], deep[where, column] = entry[where, at], at
    query = query[:, :, None]
    deep_visible = deep[:, None] == query if own else deep[:, None] <= query
    visible = torch.cat([(place <= query), deep_visible], dim=-1)
    mask = torch.zeros(visible.shape, device=query.device).masked_fill_(~visible, float("-inf"))
    return Group(group, blocks, entries, mask[:, None, None])


class DuoAttention(nn.Module):
    """Attention layer of a pass at depth 2, in place of a stock attention layer.

    Args:
        stock: Stock layer, whose KV cache holds the depth-1 keys.
        layer: Number of the layer.
        current: Holder of the running pass.
    """

    stock: Attention

    def __init__(self, stock: Attention, layer: int, current: Current) -> None:
        super().__init__()
        self.__dict__["stock"] = stock  # not registered as a submodule, since the stock model owns it
        self.layer, self.current = layer, current

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention output [M, G * H * K] of queries [M, G * H * K] and keys and values [M, H * K].

        A mixed pass also has the T tokens of the step at depth 1.
        """
        deep = self.current.deep
        assert deep is not None
        if deep.rows is None:
            return self._duo(query, key, value, deep)
        T, more = deep.step, len(query) - deep.step
        out = self.stock(query[:T], key[:T], value[:T])
        if more:  # rows that are not in vLLM's batch
            out = functional.pad(out, (0, 0, 0, more))
        out[deep.rows] = self._duo(query[deep.rows], key[deep.rows], value[deep.rows], deep)
        return out

    def _duo(self, query: Tensor, key: Tensor, value: Tensor, deep: DeepPass) -> Tensor:
        pool, (M, H, K) = deep.pool, (len(query), self.stock.num_kv_heads, self.stock.head_size)
        pool.keys[self.layer, deep.entries] = key.view(M, H, K)
        pool.values[self.layer, deep.entries] = value.view(M, H, K)
        query = query.view(M, H, -1, K)
        if len(deep.groups) == 1:  # one group has all tokens in order
            (group,) = deep.groups
            return self._attend(query.view(*group.tokens.shape, *query.shape[1:]), group, pool).reshape(M, -1)
        out = torch.empty_like(query)
        for group in deep.groups:
            out[group.tokens] = self._attend(query[group.tokens], group, pool)
        return out.view(M, -1)

    def _attend(self, query: Tensor, group: Group, pool: DeepPool) -> Tensor:
        """Return the attention output [R, P, H, G, K] of a group's queries [R, P, H, G, K]."""
        R, P, H, G, K = query.shape
        query = query.permute(0, 2, 3, 1, 4).reshape(R, H, G * P, K)
        keys, values = read_blocks(self.stock, group.blocks)  # [R, N, H, K, S], [R, N, H, S, K]
        N, S = values.shape[1], values.shape[3]
        deep_keys = pool.keys[self.layer, group.entries].permute(0, 2, 3, 1)  # [R, H, K, E]
        deep_values = pool.values[self.layer, group.entries].transpose(1, 2)  # [R, H, E, K]
        base = torch.matmul(query[:, None], keys).permute(0, 2, 3, 1, 4).reshape(R, H, G * P, N * S)
        scores = torch.cat([base, torch.matmul(query, deep_keys)], dim=-1).float() * self.stock.impl.scale
        weights = (scores.view(R, H, G, P, -1) + group.mask).softmax(-1).to(query.dtype).view(R, H, G * P, -1)
        over_blocks = weights[..., : N * S].reshape(R, H, G * P, N, S).permute(0, 3, 1, 2, 4)
        out = torch.matmul(over_blocks, values).sum(1) + torch.matmul(weights[..., N * S :], deep_values)
        return out.view(R, H, G, P, K).permute(0, 3, 1, 2, 4)
