"""Bookkeeping between two depths: which tokens run again, packed how, and what their passes add up to.

Shapes: B batch, T tokens, N tokens in question, M chosen tokens, R rows that have one, D width, V vocabulary.
A token is named by its flat index b * T + t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cache import DuoCache, DuoStep, Packed
from .families import Head
from .masks import NEVER

CHUNK = 128  # tokens whose logits exist at the same time; 128 * V floats


@dataclass
class Tokens:
    """The checked input of one forward call."""

    ids: Tensor | None  # [B, T]
    embeds: Tensor | None  # [B, T, D], instead of ids
    valid: Tensor  # [B, T] bool, False at padding
    positions: Tensor  # [B, T] int64
    padded: bool  # any padding in this call
    explicit: bool  # positions were given by the caller

    @classmethod
    def check(
        cls,
        ids: Tensor | None,
        embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> Tokens:
        """Raises `ValueError` for inputs that do not fit each other."""
        if (ids is None) == (embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        B, T = (ids if ids is not None else embeds).shape[:2]  # type: ignore[union-attr]
        if B == 0 or T == 0:
            raise ValueError(f"the input is empty (shape [{B}, {T}]); give at least one token")
        if cache is not None and not isinstance(cache, DuoCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; a TaH model needs a tah.DuoCache, or none")
        device = (ids if ids is not None else embeds).device  # type: ignore[union-attr]
        valid, padded = torch.ones(B, T, dtype=torch.bool, device=device), False
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
                raise ValueError(
                    f"attention_mask of shape {list(attention_mask.shape)} does not cover an input of shape [{B}, {T}]; "
                    "give 0/1 per token, [B, T] or [B, cached + T]"
                )
            valid = attention_mask[:, -T:].bool().to(device)
            padded = not bool(valid.all())
        if position_ids is None:
            positions = _count(valid, padded, cache)
        else:
            if position_ids.shape[-1] != T or position_ids.dim() != 2:
                raise ValueError(f"position_ids of shape {list(position_ids.shape)} do not fit [{B}, {T}]")
            positions = position_ids.to(device).expand(B, T)
        return cls(ids, embeds, valid, positions, padded, position_ids is not None)

    def stock_inputs(self, step: DuoStep | None) -> dict[str, Any]:
        """Arguments of the depth-1 pass: what a user of the plain base would give it."""
        mask = step.padding_mask() if step is not None else self.valid if self.padded else None
        # Without a cache, positions that merely count are left to the base: it treats given ones as a sign of packing.
        count = step is None and not self.padded and not self.explicit
        inputs = {"attention_mask": None if mask is None else mask.long()}
        inputs["position_ids"] = None if count else self.positions
        inputs["input_ids" if self.ids is not None else "inputs_embeds"] = self.ids if self.ids is not None else self.embeds
        return inputs

    def select(self, x: Tensor | None, tokens: Tensor) -> Tensor | None:
        """[B, T] -> [N], or None for None."""
        return None if x is None else x.flatten()[tokens]


def _count(valid: Tensor, padded: bool, cache: DuoCache | None) -> Tensor:
    """Positions [B, T] of tokens that nobody gave positions for: the number of real tokens before each, >= 0."""
    B, T = valid.shape
    seen: int | Tensor = cache.get_seq_length() if cache is not None else 0
    if cache is not None and cache.has_padding:
        seen = (cache.positions.view != NEVER).sum(1, keepdim=True)
    if padded:
        return (valid.cumsum(1) - 1 + seen).clamp(min=0)
    return (torch.arange(T, device=valid.device) + seen).expand(B, T)


def pack(tokens: Tensor, length: int) -> tuple[Packed, Tensor, Tensor]:
    """Lay sorted flat indices [M] of a [B, T] input (T = `length`) out as rows packed left.

    Returns:
        packed: the [R, N] layout.
        row: [M] batch row of each token.
        column: [M] its column among its row's packed tokens.
    """
    row, source = tokens // length, tokens % length
    rows, index, counts = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts  # [R] where each row's tokens begin
    column = torch.arange(len(tokens), device=tokens.device) - first[index]
    width = int(counts.max())
    columns = source[first][:, None].repeat(1, width)  # padding repeats the row's first token
    columns[index, column] = source
    valid = torch.arange(width, device=tokens.device) < counts[:, None]
    return Packed(rows, columns, valid, full=len(tokens) == valid.numel()), row, column


def lay_out(x: Tensor, packed: Packed) -> Tensor:
    """[M, D] -> [R, N, D], zero at padding."""
    if packed.full:
        return x.view(*packed.valid.shape, -1)
    rows = x.new_zeros(*packed.valid.shape, x.shape[-1])
    rows[packed.valid] = x
    return rows


class RunningOutput:
    """What the passes of each token add up to (spec A.1 step 5), carried as hidden states, never as [B, T, V].

    The head of a sum is the sum of heads where the head is linear, so one [B, T, D] holds the sum of logits. Under a
    soft-cap or a head bias that fails, and the passes' hidden states are kept apart until logits are asked for. With
    `zero_init` the output is the head of h1 + Z h2, which is a sum of hidden states for any head.

    Args:
        head: hidden states to logits.
        hidden: [B, T, D] final hidden states of depth 1.
        zero_init: the map Z for `combine="zero_init"`, None for `combine="sum"`.
    """

    def __init__(self, head: Head, hidden: Tensor, zero_init: nn.Module | None) -> None:
        self.head, self.zero_init = head, zero_init
        self.total = hidden.flatten(0, 1)  # [B*T, D]
        self.deeper: list[tuple[Tensor, Tensor]] = []  # (tokens [M], hidden [M, D]) where sums are not allowed
        self.memo: Tensor | None = None  # [B*T, V] while decoding, so that no token's head runs twice
        self.stale: list[Tensor] = []

    def add(self, tokens: Tensor, hidden: Tensor) -> None:
        """Add a deeper pass of `tokens` [M] with final hidden states [M, D]."""
        if self.zero_init is not None:
            self.total = self.total.index_add(0, tokens, self.zero_init(hidden))
        elif self.head.is_linear:
            self.total = self.total.index_add(0, tokens, hidden)
        else:
            self.deeper.append((tokens, hidden))
        self.stale.append(tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        """Accumulated logits [N, V] of `tokens` [N]."""
        if torch.is_grad_enabled() or len(self.total) > CHUNK:
            return self._logits(tokens)
        if self.memo is None:
            if len(tokens) < len(self.total):
                return self._logits(tokens)
            self.memo = self._logits(torch.arange(len(self.total), device=tokens.device))
        else:
            for stale in self.stale:
                self.memo[stale] = self._logits(stale)
        self.stale = []
        return self.memo[tokens]

    def _logits(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.total[tokens])
        for ran, hidden in self.deeper:
            place = tokens.new_full((len(self.total),), -1)
            place[ran] = torch.arange(len(ran), device=ran.device)
            place = place[tokens]  # [N], -1 where the token did not run this pass
            hit = (place >= 0).nonzero().squeeze(1)
            logits = logits.index_add(0, hit, self.head(hidden[place[hit]]))
        return logits

    def map_logits(self, tokens: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f applied to the accumulated logits of `tokens`, `CHUNK` of them at a time: [n, V] -> [n, ...]."""
        return torch.cat([f(self.logits(chunk)) for chunk in tokens.split(CHUNK)])


@contextmanager
def record(layers: nn.ModuleList, wanted: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Keep the hidden states `wanted` of the pass that runs inside: 0 is the input of the first layer, k the output of
    layer k. (transformers' own `output_hidden_states` keeps all of them alive.)"""
    seen: dict[int, Tensor] = {}

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[0] = args[0] if args else kwargs["hidden_states"]

    def keep_output(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[k] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[k - 1].register_forward_hook(keep_output(k)) for k in wanted if 0 < k < len(layers)]
    if 0 in wanted:
        handles.append(layers[0].register_forward_pre_hook(keep_input, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
