"""Duo-causal attention of depth 2 (method.md (7)) over vLLM's paged depth-1 keys and the pool's depth-2 keys.

On a GPU a kernel (`kernel.py`) reads the keys where they are. On a CPU the keys are gathered for PyTorch's operations.
Both need the host for nothing that the device computes.

Shapes: T tokens of the step, M tokens at depth 2, R rows of a group with P queries each, N blocks of S slots, E pool
entries, H key/value heads, G query heads per key/value head, K head width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.attention import Attention

from .compat import by_rows, read_blocks
from .pool import DeepPool
from .transfer import indices

QUERIES = 256  # maximum queries of one request per group, which bounds the memory for scores
SHORT = 7  # below 2^7 tokens, padding costs less than the operations of one more group


@dataclass
class DeepTokens:
    """The tokens of a pass at depth 2, known on the host. Each has an entry in the pool."""

    owners: np.ndarray  # [M] row of `tables` of each token's request; tokens of one request are in order
    places: np.ndarray  # [M] positions
    slots: np.ndarray  # [M] physical slots of the depth-1 keys
    tables: np.ndarray  # [requests, N] physical blocks

    def part(self, index: np.ndarray) -> DeepTokens:
        """Return the tokens `index` [m]; those of one request have to be in order."""
        return DeepTokens(self.owners[index], self.places[index], self.slots[index], self.tables)


@dataclass
class Pages:
    """How vLLM's physical blocks and the pages of its kernels relate: a block has one page, or several in order."""

    block: int  # slots per block
    page: int  # slots per page, S

    def of(self, blocks: np.ndarray) -> np.ndarray:
        """Return the physical pages [R, N * block / page] of physical blocks [R, N]."""
        each = self.block // self.page
        return blocks if each == 1 else (blocks[:, :, None] * each + np.arange(each)).reshape(len(blocks), -1)

    def slots(self, blocks: np.ndarray) -> np.ndarray:
        """Return the physical slots [..., N * block] of physical blocks [..., N]."""
        first = blocks.astype(np.int64)[..., None] * self.block
        return (first + np.arange(self.block)).reshape(*blocks.shape[:-1], -1)


@dataclass
class Group:
    """Queries of one attention call: one query of each of R requests, or P queries of one request."""

    tokens: Tensor  # [R, P] index among the M tokens of the pass
    blocks: Tensor  # [R, N] physical pages
    entries: Tensor  # [R, E] entries of the pool; arbitrary where masked
    mask: Tensor  # [R, 1, 1, P, N * S + E] 0 where the query attends to the key, else -inf


@dataclass
class DeepPass:
    """Data of one pass at depth 2 that all layers share."""

    pool: DeepPool
    own: bool  # whether a query attends to no depth-2 key except its own (`attention="own"`)
    positions: Tensor  # [M]
    entries: Tensor  # [M] pool entry of each token
    groups: list[Group] = field(default_factory=list)  # empty if the kernel attends
    tables: Tensor | None = None  # [requests, N] physical pages, for the kernel
    owners: Tensor | None = None  # [M] row of `tables`, for the kernel
    rows: Tensor | None = None  # [M] rows of the tokens in a mixed pass: T rows of the step, then added rows of depth 2
    step: int = 0  # T of a mixed pass
    splits: int | None = None  # programs of the kernel per token and head; None: as many as fill the GPU


@dataclass
class Current:
    """Holder of the running pass, shared by the twins of all layers."""

    deep: DeepPass | None = None


def plan(tokens: DeepTokens, pool: DeepPool, pages: Pages, own: bool, kernel: bool) -> DeepPass:
    """Find the keys to which the tokens of a pass attend; called once per pass.

    Args:
        tokens: Tokens of the pass.
        pool: Pool that has an entry for each token.
        pages: Sizes of blocks and pages.
        own: Whether a query attends to no depth-2 key except its own.
        kernel: Whether the kernel attends. Else the tokens are grouped by request, and their keys gathered.
    """
    entries = pool.entries[tokens.slots]
    assert (entries >= 0).all(), "a token at depth 2 has no entry"  # -1 would overwrite another token's keys
    pool.flush()
    device = pool.keys.device
    if kernel:
        N = int(tokens.places.max()) // pages.block + 1
        rows, owners = np.unique(tokens.owners, return_inverse=True)
        found = indices(device, tokens.places, entries, owners, pages.of(tokens.tables[rows, :N]))
        return DeepPass(pool, own, found[0], found[1], owners=found[2], tables=found[3].int())
    groups = [_group(tokens, group, pool, pages, own) for group in _groups(tokens)]
    positions, at = indices(device, tokens.places, entries)
    return DeepPass(pool, own, positions, at, groups)


def _groups(tokens: DeepTokens) -> list[np.ndarray]:
    """Return which tokens [R, P] attend together: those of one request, or one each of requests of similar length."""
    by_request: dict[int, list[int]] = defaultdict(list)
    for token, owner in enumerate(tokens.owners.tolist()):
        by_request[owner].append(token)
    together: dict[int, list[list[int]]] = defaultdict(list)
    groups: list[list[list[int]]] = []
    last = tokens.places.tolist()
    for mine in by_request.values():
        if len(mine) == 1:  # requests of similar length are padded to the same length
            together[max(SHORT, last[mine[0]].bit_length())].append(mine)
        else:
            groups += [[mine[at : at + QUERIES]] for at in range(0, len(mine), QUERIES)]
    return [np.array(group) for group in (*groups, *together.values())]


def _group(tokens: DeepTokens, group: np.ndarray, pool: DeepPool, pages: Pages, own: bool) -> Group:
    """Return the group of the tokens `group` [R, P]."""
    query = tokens.places[group]  # [R, P]
    N = int(query.max()) // pages.block + 1
    blocks = tokens.tables[tokens.owners[group[:, 0]], :N]
    keys = N * pages.block
    place = np.arange(keys)
    entry = pool.entries[pages.slots(blocks)]  # [R, N * S]
    where, at = ((entry >= 0) & (place <= query.max(1, keepdims=True))).nonzero()
    count = np.bincount(where, minlength=len(blocks))
    column = np.arange(len(where)) - (count.cumsum() - count)[where]
    E = int(count.max())
    entries, deep = np.zeros((len(blocks), E), np.int64), np.full((len(blocks), E), keys)
    entries[where, column], deep[where, column] = entry[where, at], at
    found = indices(pool.keys.device, group, pages.of(blocks), entries, deep, query, place)
    index, physical, held, deep_place, queries, all_places = found
    queries = queries[:, :, None]
    deep_visible = deep_place[:, None] == queries if own else deep_place[:, None] <= queries
    visible = torch.cat([all_places <= queries, deep_visible], dim=-1)
    mask = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))
    return Group(index, physical, held, mask[:, None, None])


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
        """Write the keys of depth 2 and return the attention output [M, G * H * K], all rows at depth 2."""
        pool, (M, H, K) = deep.pool, (len(query), self.stock.num_kv_heads, self.stock.head_size)
        pool.keys[self.layer, deep.entries] = key.view(M, H, K)
        pool.values[self.layer, deep.entries] = value.view(M, H, K)
        if deep.tables is not None:
            return self._kernel(query.view(M, -1, K), deep).view(M, -1)
        query = query.view(M, H, -1, K)
        if len(deep.groups) == 1:  # one group has all tokens in order
            (group,) = deep.groups
            return self._attend(query.view(*group.tokens.shape, *query.shape[1:]), group, pool).reshape(M, -1)
        out = torch.empty_like(query)
        for group in deep.groups:
            out[group.tokens] = self._attend(query[group.tokens], group, pool)
        return out.view(M, -1)

    def _kernel(self, query: Tensor, deep: DeepPass) -> Tensor:
        """Return the attention output [M, H * G, K] of queries of the same shape, by the kernel."""
        from .kernel import duo_attention  # imports Triton

        assert deep.tables is not None and deep.owners is not None
        keys, values = deep.pool.keys[self.layer], deep.pool.values[self.layer]
        table, where = deep.pool.entry_of_slot, (deep.tables, deep.owners, deep.positions)
        scale, own, splits = self.stock.impl.scale, deep.own, deep.splits
        return duo_attention(query, by_rows(self.stock), keys, values, table, *where, scale, own, splits)

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
