"""Faster ways to compute the same results, most of them for float32 on a CPU without gradients.

They are optional: every function here has a plain path in the module that calls it, and `ENABLED = False` takes the
plain paths everywhere. No pass at depth 1 takes a fast path, so the results of the base's layers and the returned
logits stay the same bit for bit. docs/results/benchmarks.md has the savings.

Shapes: n rows, I input width, O output width, D width, V vocabulary, k best tokens, r rank of a LoRA.
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

from ..names import MIXTURES
from .compat import is_watched
from .head import Head
from .logits import CHUNK, Found, RunningOutput, best_of, joined
from .mixture import Mixture
from .quantised import PLAIN

ENABLED = True
SDPA = nn.functional.scaled_dot_product_attention
FEW_ROWS = 48  # up to here, float32 kernels of a CPU are slower for x W^T than for (W x^T)^T
QUERIES, BLOCKS = 128, 8  # fewest queries in a block of attention, most blocks in one call
# Most bytes of logits that a call keeps. A policy that reads logits has a chunk of them in memory with its softmax, in
# float32 2 * 78 MB for 152k tokens. So this adds no more than that, and is enough for 440 rows of bfloat16.
MEMO = 2**27
PIECE = 16  # logits per block of which the maximum is taken
# A product with a whole matrix of up to DENSE * k rows is faster than gathering k rows per token. This was measured
# with 290 rows and k = 100, where a look-ahead step took a fifth less time; larger sizes are estimated. All rows must
# be finite.
DENSE = 12


def allowed(*modules: nn.Module) -> bool:
    """Return whether code may use the weights of these modules without calling them.

    It may without gradients, without hooks, and if the weights are plain numbers and not quantised ones.
    """
    if not ENABLED or torch.is_grad_enabled() or any(map(is_watched, modules)):
        return False
    # Through `_parameters`, because an attribute of a module costs a microsecond.
    return all(type(module._parameters.get("weight")) in PLAIN for module in modules)


def float32_cpu(x: Tensor) -> bool:
    """Return whether x is float32 on a CPU, for which the CPU's fast paths were measured."""
    return ENABLED and x.dtype == torch.float32 and x.device.type == "cpu"


# -- passes ------------------------------------------------------------------------------------------------------------


def attention_in_blocks(masks: Any, dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes the context of a deeper pass, in which SDPA with its masks runs in blocks.

    The SDPA of a CPU skips masked keys only if the mask is the plain triangle. The mask of a deeper pass consists of
    two triangles side by side, with the early keys in the middle (`kv_buffer.py`). In blocks of queries, each with the
    range of keys to which its queries attend, a long pass takes a quarter less time. Only calls of this thread with
    these masks change.

    Args:
        masks: Ready masks of the pass: one, or a dict by layer type. None at depth 1.
        dtype: Type of the activations.
    """
    found = {}
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        if ENABLED and isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.device.type == "cpu":
            if mask.shape[2] >= 2 * QUERIES:
                found[mask.data_ptr()] = (mask, _blocks(mask[:, 0], dtype))
    return partial(_InBlocks, found) if found else nullcontext


def _blocks(visible: Tensor, dtype: torch.dtype) -> list[tuple[slice, slice, Tensor]]:
    """Return blocks of queries, each with the range of its keys and its float mask [R, 1, n, s].

    All masks together are at most as large as the mask that SDPA makes of `visible` in every layer.

    Args:
        visible: Mask [R, N, S] bool.
        dtype: Type of the activations.
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
    """Mode that computes SDPA with known masks in blocks."""

    def __init__(self, blocks: dict[int, tuple[Tensor, list[tuple[slice, slice, Tensor]]]]) -> None:
        super().__init__()
        self.blocks = blocks  # by the address of the mask, because a base may pass a view of it

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
    """Return the output of a linear layer with LoRA for x [..., I], or None where the plain path is needed."""
    A, B, scale = layer.lora_A.weight, layer.lora_B.weight, layer.lora_scale
    if layer.training or not allowed(layer, layer.lora_A, layer.lora_B) or not x.dtype == A.dtype == B.dtype:
        return None
    if torch.is_autocast_enabled(x.device.type):  # autocast changes the types of separate calls
        return None
    if layer.stock is nn.Linear and float32_cpu(x) and _is_few(x):
        return product(x, layer, A, B, scale)
    y = layer.stock_forward(x)
    # In place, because a separate product and sum cost a tenth of the layer.
    low = nn.functional.linear(x, A)
    y.view(-1, y.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), B.t(), alpha=scale)
    return y


def product(
    x: Tensor, layer: nn.Module, A: Tensor | None = None, B: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Return x W^T + b of an `nn.Linear` for few rows x [..., I], plus scale * x A^T B^T if A and B are given.

    Args:
        x: Input [..., I].
        layer: Layer with W [O, I].
        A: Matrix [r, I] of a LoRA.
        B: Matrix [O, r] of a LoRA.
        scale: Factor of the LoRA.
    """
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


def running_output(
    output: str,
    head: Head,
    hidden: Tensor,
    output_map: nn.Module | None,
    num_best: int,
    logits_to_keep: int | Tensor | None,
) -> RunningOutput:
    """Return the running output of a call for the configured `output`.

    Without gradients, it is one that keeps logits for later use: those of all tokens, if the caller asks for all of
    them, as in decoding.
    """
    if not ENABLED or torch.is_grad_enabled():
        if output in MIXTURES:
            return Mixture(head, hidden, output == "even", num_best)
        return RunningOutput(head, hidden, output_map, num_best)
    # `logits_to_keep` is that of `forward`; a tensor of indices is not compared with all tokens.
    every = not isinstance(logits_to_keep, Tensor) and not 0 < (logits_to_keep or 0) < hidden.shape[1]
    room = MEMO // (head.size * hidden.element_size()) if every else 0
    if output in MIXTURES:
        return RememberingMixture(head, hidden, output == "even", num_best, room)
    return RememberingOutput(head, hidden, output_map, num_best, room)


class RememberingOutput(RunningOutput):
    """A running output that computes no logits twice.

    It keeps the logits that a policy read for the output, and the best tokens of them for the next input.

    Args:
        head, hidden, output_map, num_best: As in `RunningOutput`.
        room: Most rows of logits to keep for the output.
    """

    def __init__(self, head: Head, hidden: Tensor, output_map: nn.Module | None, num_best: int, room: int) -> None:
        super().__init__(head, hidden, output_map, num_best)
        self.keeps = len(self.total) <= room
        self.memo: Tensor | None = None  # logits [B*T, V] that a policy read
        self.stale: Tensor | None = None  # [B*T] whether the logits of a token in `memo` lack a pass; None: of no token
        self.prepared: tuple[Tensor, Tensor, Tensor] | None = None  # tokens [N] and their `best`, until the next pass

    def add(self, tokens: Tensor, hidden: Tensor, continue_logits: Tensor) -> None:
        super().add(tokens, hidden, continue_logits)
        if self.memo is not None:
            if self.stale is None:
                self.stale = torch.zeros(len(self.total), dtype=torch.bool, device=tokens.device)
            self.stale[tokens] = True
        self.prepared = None

    def so_far(self) -> RunningOutput:
        now = copy.copy(self)
        now.deeper, now.memo, now.prepared = list(self.deeper), None, None
        return now

    def logits(self, tokens: Tensor, found: Found | None = None) -> Tensor:
        if self.memo is None or torch.is_grad_enabled():
            return super().logits(tokens, found)
        if self.stale is not None and len(again := tokens[self.stale[tokens]]):
            self.memo[again.to(self.memo.device)] = super().logits(again)  # the head may be on another device
            self.stale[again] = False
        return self.memo[tokens.to(self.memo.device)]

    def _glance(self, tokens: Tensor) -> Tensor:
        """Return logits [n, V] of some tokens, equal to the base's up to rounding."""
        return self.through(self._head, tokens) if self.memo is None else self.logits(tokens)

    def _head(self, hidden: Tensor) -> Tensor:
        linear = self.head.linear
        if type(linear) is nn.Linear and not linear.training and allowed(linear):
            if float32_cpu(hidden) and _is_few(hidden):
                return self.head.finish(product(hidden, linear))
        return self.head(hidden)

    def map_logits(self, tokens: Tensor, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        if self.memo is None and self.keeps and len(tokens) == len(self.total) and not torch.is_grad_enabled():
            self.memo = super().logits(tokens)
        if not ahead or not self.num_best or torch.is_grad_enabled():
            return torch.cat([f(self._glance(chunk)) for chunk in tokens.split(CHUNK)])
        mapped, found = [], []
        for chunk in tokens.split(CHUNK):
            logits = self._glance(chunk)
            found.append(best_of(logits, self.num_best, topk))
            mapped.append(f(logits))  # last, because f may overwrite the logits
        self.prepared = (tokens, *joined(found))
        return torch.cat(mapped)

    def best(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.prepared is None or torch.is_grad_enabled():  # `prepared` has no gradient
            chunks = tokens.split(CHUNK)
            return joined([best_of(self._glance(chunk), self.num_best, topk) for chunk in chunks])
        seen, weights, ids = self.prepared
        at = torch.searchsorted(seen, tokens).to(ids.device)  # `tokens` is a sorted subset of `seen`
        return weights[at], ids[at]


class RememberingMixture(Mixture):
    """A mixture that keeps the logits of the passes that a policy read, for next input and output.

    Args:
        head, hidden, even, num_best: As in `Mixture`.
        room: Most rows of logits to keep.
    """

    def __init__(self, head: Head, hidden: Tensor, even: bool, num_best: int, room: int) -> None:
        super().__init__(head, hidden, even, num_best)
        self.room = room  # further rows that may be kept
        self.known: dict[int, Tensor] = {}  # logits [n, V] of all tokens of a pass, by depth

    def so_far(self) -> RememberingMixture:
        now = super().so_far()
        assert isinstance(now, RememberingMixture)
        now.known = dict(self.known)
        return now

    def _last_pass(self, read: int) -> Tensor | None:
        """Return the logits [n, V] of the last pass, of which a policy reads `read` tokens; None if they are not kept.

        They are kept if the policy reads all of them and there is room.
        """
        depth, hidden = 1 + len(self.deeper), self.deeper[-1][1] if self.deeper else self.total
        if torch.is_grad_enabled() or read != len(hidden):
            return None
        if depth not in self.known and read <= self.room:
            self.known[depth] = self.head(hidden)
            self.room -= read
        return self.known.get(depth)

    def map_logits(self, tokens: Tensor, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        self._last_pass(len(tokens))
        return super().map_logits(tokens, f, ahead)

    def map_pass_logits(self, hidden: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        logits = self._last_pass(len(hidden))
        if logits is None:
            return super().map_pass_logits(hidden, f)
        return torch.cat([f(chunk.clone()) for chunk in logits.split(CHUNK)])  # f may overwrite the logits

    def pass_logits(self, head: Callable[[Tensor], Tensor], depth: int, at: Tensor) -> Tensor:
        if depth not in self.known or torch.is_grad_enabled():
            return super().pass_logits(head, depth, at)
        known = self.known[depth]
        return known[at.to(known.device)]  # the head may be on another device than the tokens


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `x.topk(k)` of x [n, V]: values and ids [n, k], largest first. Of equal values it may return others.

    For a large V this takes half the time of torch's on a CPU. The k largest values lie in the k blocks with the
    largest maxima. A block has every (V // PIECE)-th value, so that all maxima are computed side by side.
    """
    n, V = x.shape
    blocks = V // PIECE
    if blocks <= k or x.device.type != "cpu" or not ENABLED:  # measured on CPUs only
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
    """Return whether `sum_of_rows` is used. In half precision it rounds the weights; it was measured on CPUs only."""
    return float32_cpu(table)


def sum_of_rows(weights: Tensor, table: Any, ids: Tensor) -> Tensor:
    """Return the sums [n, D] of the rows `ids` [n, k] of table [V, D], weighted [n, k], without gathering the rows."""
    return nn.functional.embedding_bag(ids, table, per_sample_weights=weights, mode="sum")


def is_small(table: Tensor, ids: Tensor) -> bool:
    """Return whether a product with all of table [V, D] is faster than gathering its rows `ids` [n, k]."""
    return ENABLED and len(table) <= DENSE * ids.shape[1]


def spread(weights: Tensor, ids: Tensor, size: int) -> Tensor:
    """Return `weights` [n, k] at the columns `ids` [n, k], distinct in each row, of a zero tensor [n, size]."""
    return weights.new_zeros(len(ids), size).scatter_(1, ids, weights)
