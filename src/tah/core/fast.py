"""Faster ways to compute the same, most of them for float32 on a CPU without gradients. Optional: every function here
has a plain path in the module that calls it, and `ENABLED = False` takes the plain paths everywhere.

No pass at depth 1 takes one: the layers of the base keep their own products, bit for bit, and so do the logits that a
call returns. docs/results/benchmarks.md has what they save.

Shapes: n rows, I input width, O output width, D width, V vocabulary, k best tokens, r rank of an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .compat import is_watched
from .head import Head
from .logits import CHUNK, RunningOutput, best_of, joined

ENABLED = True
SDPA = nn.functional.scaled_dot_product_attention
FEW_ROWS = 48  # a CPU's float32 kernels take longer for x W^T than for (W x^T)^T up to here
QUERIES, BLOCKS = 128, 8  # of a block of attention, at least; of one call, at most
MEMO = 64  # tokens of a call whose logits are kept, at most
PIECE = 16  # logits of which one maximum is taken
# Times k: a product with a whole matrix of up to that many rows costs less than picking k rows a token (measured with
# 290 and k = 100, where a look-ahead step took a fifth less; estimated beyond). All rows must be finite for it.
DENSE = 12


def allowed(*modules: nn.Module) -> bool:
    """Whether a call may go around these modules: no gradients, and no hook that has to see the call."""
    return ENABLED and not torch.is_grad_enabled() and not any(map(is_watched, modules))


def float32_cpu(x: Tensor) -> bool:
    """Whether x is of the kind that the CPU's paths were measured for."""
    return ENABLED and x.dtype == torch.float32 and x.device.type == "cpu"


# -- passes ------------------------------------------------------------------------------------------------------------


def attention_in_blocks(masks: Any, dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context for a deeper pass with these ready masks (one, or a dict by layer type).

    A CPU's SDPA skips what is masked only where the mask is the plain triangle. A deeper pass has two, side by side
    with their early keys in the middle (`kv_buffer.py`): block by block, each with the range of keys that its queries
    see, a long pass needs a quarter less time. Only this thread's calls with these masks change.
    """
    found = {}
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        if ENABLED and isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.device.type == "cpu":
            if mask.shape[2] >= 2 * QUERIES:
                found[mask.data_ptr()] = (mask, _blocks(mask[:, 0], dtype))
    return partial(_InBlocks, found) if found else nullcontext


def _blocks(visible: Tensor, dtype: torch.dtype) -> list[tuple[slice, slice, Tensor]]:
    """Queries, the range from their first key to their last, and its float mask [R, 1, n, s], block by block.

    All masks together are as large as the one that SDPA would make of `visible` in every layer, or smaller.
    """
    found, N = [], visible.shape[1]
    size = max(QUERIES, -(-N // BLOCKS))
    for start in range(0, N, size):
        queries = slice(start, min(start + size, N))
        part = visible[:, queries]
        seen = part.any(dim=1).any(dim=0).nonzero().squeeze(1).tolist() or [0]
        keys = slice(seen[0], seen[-1] + 1)
        part = part[:, None, :, keys]
        found.append((queries, keys, torch.zeros_like(part, dtype=dtype).masked_fill_(~part, -torch.inf)))
    return found


class _InBlocks(TorchFunctionMode):
    def __init__(self, blocks: dict[int, tuple[Tensor, list[tuple[slice, slice, Tensor]]]]) -> None:
        super().__init__()
        self.blocks = blocks  # by where the mask lies in memory, since a base may hand on a view of it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is not SDPA or len(args) != 3 or mask is None or mask.data_ptr() not in self.blocks:
            return func(*args, **kwargs)
        whole, blocks = self.blocks[mask.data_ptr()]
        query, key, value = args
        if mask.shape[-2:] != whole.shape[-2:] or mask.shape[-2:] != (query.shape[2], key.shape[2]):
            return func(*args, **kwargs)
        rest = {name: its for name, its in kwargs.items() if name != "attn_mask"}
        parts = [
            func(query[:, :, rows], key[:, :, its], value[:, :, its], attn_mask=part.to(query.dtype), **rest)
            for rows, its, part in blocks
        ]
        return torch.cat(parts, dim=2)


# -- linear layers -------------------------------------------------------------------------------------------------


def adapted(x: Tensor, layer: Any) -> Tensor | None:
    """A linear layer with its adapter on [..., I]; None where the plain path has to do it."""
    A, B, scale = layer.lora_A.weight, layer.lora_B.weight, layer.lora_scale
    if layer.training or not allowed(layer, layer.lora_A, layer.lora_B) or not x.dtype == A.dtype == B.dtype:
        return None
    if torch.is_autocast_enabled(x.device.type):  # it must see the calls
        return None
    if layer.stock is nn.Linear and float32_cpu(x) and _is_few(x):
        return product(x, layer, A, B, scale)
    y = layer.stock_forward(x)
    # In place: a product of its own and a sum cost a tenth of the layer.
    low = nn.functional.linear(x, A)
    y.view(-1, y.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), B.t(), alpha=scale)
    return y


def product(
    x: Tensor, layer: nn.Module, A: Tensor | None = None, B: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """x W^T + b of an `nn.Linear` on a few rows [..., I], plus scale * x A^T B^T where A [r, I] and B [O, r] are
    given: [..., O]."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    rows = x.flatten(0, -2).t()
    y = torch.mm(weight, rows)
    if A is not None and B is not None:
        y = torch.addmm(y, B, torch.mm(A, rows), alpha=scale)
    y = y.t().contiguous().view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _is_few(x: Tensor) -> bool:
    return 1 < x.numel() // x.shape[-1] <= FEW_ROWS


# -- logits ----------------------------------------------------------------------------------------------------------


def running_output(head: Head, hidden: Tensor, output_map: nn.Module | None, num_best: int) -> RunningOutput:
    """The sum of the passes, with a memory for logits where there are no gradients."""
    kind = RememberingOutput if ENABLED and not torch.is_grad_enabled() else RunningOutput
    return kind(head, hidden, output_map, num_best)


class RememberingOutput(RunningOutput):
    """A running output that computes no logits twice: those of a few tokens are kept, and those that a policy looks at
    can give the next input too."""

    def __init__(self, head: Head, hidden: Tensor, output_map: nn.Module | None, num_best: int) -> None:
        super().__init__(head, hidden, output_map, num_best)
        self.memo: Tensor | None = None  # [B*T, V], of calls of up to `MEMO` tokens: decoding, mostly
        self.stale: list[Tensor] = []  # tokens whose logits in the memo lack a pass
        self.prepared: tuple[Tensor, Tensor, Tensor] | None = None  # tokens [N] and their `best`, till a pass adds

    def add(self, tokens: Tensor, hidden: Tensor) -> None:
        super().add(tokens, hidden)
        self.stale.append(tokens)
        self.prepared = None

    def so_far(self) -> RunningOutput:
        now = copy.copy(self)
        now.deeper, now.memo, now.stale, now.prepared = list(self.deeper), None, [], None
        return now

    def logits(self, tokens: Tensor) -> Tensor:
        everyone = len(self.total)
        if torch.is_grad_enabled() or everyone > MEMO or (self.memo is None and len(tokens) < everyone):
            return super().logits(tokens)
        if self.memo is None:
            self.memo = super().logits(torch.arange(everyone, device=tokens.device))
        else:
            for stale in self.stale:
                self.memo[stale] = super().logits(stale)
        self.stale = []
        return self.memo[tokens]

    def _glance(self, tokens: Tensor) -> Tensor:
        """Logits [n, V] of some tokens, equal to the base's up to rounding."""
        if self.memo is not None or len(tokens) == len(self.total) <= MEMO:
            return self.logits(tokens)
        return self.through(self._head, tokens)

    def _head(self, hidden: Tensor) -> Tensor:
        linear = self.head.linear
        if type(linear) is nn.Linear and not linear.training and allowed(linear):
            if float32_cpu(hidden) and _is_few(hidden):
                return self.head.finish(product(hidden, linear))
        return self.head(hidden)

    def map_logits(self, tokens: Tensor, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        if not ahead or not self.num_best or torch.is_grad_enabled():
            return torch.cat([f(self._glance(chunk)) for chunk in tokens.split(CHUNK)])
        mapped, found = [], []
        for chunk in tokens.split(CHUNK):
            logits = self._glance(chunk)
            found.append(best_of(logits, self.num_best, topk))
            mapped.append(f(logits))  # which may overwrite them
        self.prepared = (tokens, *joined(found))
        return torch.cat(mapped)

    def best(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.prepared is None or torch.is_grad_enabled():  # what was prepared has no gradient
            chunks = tokens.split(CHUNK)
            return joined([best_of(self._glance(chunk), self.num_best, topk) for chunk in chunks])
        seen, weights, ids = self.prepared
        at = torch.searchsorted(seen, tokens).to(ids.device)  # of the tokens seen, in order, some go on
        return weights[at], ids[at]


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x.topk(k)` of x [n, V], for a large V at half the price on a CPU: values and ids [n, k], falling. Of equal
    values it may take others.

    They lie in the k blocks with the largest maxima. A block takes every (V // PIECE)-th value, so that the maxima
    of all are taken side by side.
    """
    n, V = x.shape
    blocks = V // PIECE
    if blocks <= k or x.device.type != "cpu" or not ENABLED:  # elsewhere it is not measured
        return x.topk(k)
    whole = blocks * PIECE
    best = x[:, :whole].view(n, PIECE, blocks).amax(1).topk(k, sorted=False).indices  # [n, k]
    starts = torch.arange(0, whole, blocks, device=x.device)
    candidates = (starts[:, None] + best[:, None]).flatten(1)  # [n, PIECE * k]
    rest = torch.arange(whole, V, device=x.device).expand(n, -1)
    candidates = torch.cat([candidates, rest], dim=1)
    top, at = x.gather(1, candidates).topk(k)
    return top, candidates.gather(1, at)


# -- next inputs -------------------------------------------------------------------------------------------------------


def sums_rows(table: Any) -> bool:
    """Whether `sum_of_rows` is used: in half precision it would round the weights; elsewhere it is not measured."""
    return float32_cpu(table)


def sum_of_rows(weights: Tensor, table: Any, ids: Tensor) -> Tensor:
    """Sums of the rows `ids` [n, k] of table [V, D], weighted [n, k], without picking them first: [n, D]"""
    return nn.functional.embedding_bag(ids, table, per_sample_weights=weights, mode="sum")


def is_small(table: Tensor, ids: Tensor) -> bool:
    """Whether a product with all of table [V, D] is faster than picking rows `ids` [n, k] of it."""
    return ENABLED and len(table) <= DENSE * ids.shape[1]


def spread(weights: Tensor, ids: Tensor, size: int) -> Tensor:
    """[n, k] -> [n, size], zero but at `ids` [n, k], which differ within a token."""
    return weights.new_zeros(len(ids), size).scatter_(1, ids, weights)
