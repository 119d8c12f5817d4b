"""Where the keys and values of depth 2 lie: one entry per iterated token, found by the token's depth-1 slot.

vLLM pages depth 1. A token that iterates has an entry here, which lives as long as its depth-1 keys: it is freed when
another token is written to that physical slot. So prefix caching, preemption, chunked prefill and the reuse of blocks
need no bookkeeping: whoever finds a depth-1 key finds its depth-2 key.

Shapes: L layers, C entries, H key/value heads, K head width, M tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def capacity(slots: int, share: float, longest: int) -> int:
    """Entries of a pool beside so many depth-1 slots; enough for the `longest` request alone, so that it can finish."""
    return min(slots, max(longest, math.ceil(share * slots)))


class DeepPool:
    """Keys and values of depth 2 of all layers.

    Args:
        layers: L.
        capacity: C.
        heads: H of this process.
        width: K.
        slots: physical slots of depth 1.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self, layers: int, capacity: int, heads: int, width: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.keys = torch.zeros(layers, capacity, heads, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.entry_of_slot = torch.full((slots,), -1, dtype=torch.long, device=device)
        self.unused = torch.arange(capacity, device=device)  # a stack; the first `free` of it count
        self.free = capacity

    def release(self, slots: Tensor) -> Tensor:
        """Free the entries of `slots`, which are written anew or given up; returns the slots that had one."""
        entries = self.entry_of_slot[slots]
        held = entries >= 0
        slots, entries = slots[held], entries[held]
        self.unused[self.free : self.free + len(entries)] = entries
        self.free += len(entries)
        self.entry_of_slot[slots] = -1
        return slots

    def take(self, slots: Tensor) -> Tensor:
        """Entries [M] for `slots` [M], which have none.

        Raises:
            RuntimeError: fewer are free. The scheduler keeps this from happening.
        """
        M = len(slots)
        if M > self.free:
            raise RuntimeError(f"{M} tokens iterate but only {self.free} of {self.capacity} deep entries are free")
        self.free -= M
        entries = self.unused[self.free : self.free + M].clone()
        self.entry_of_slot[slots] = entries
        return entries
