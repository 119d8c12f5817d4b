"""Pool of the keys and values of depth 2: one entry per iterated token, indexed by the token's depth-1 slot.

vLLM's paged KV cache holds depth 1. The pool frees the entry of an iterated token when vLLM writes another token to the
same physical slot. So a prefix-cache hit returns the keys of both depths, and preemption, chunked prefill and the reuse
of blocks need no additional bookkeeping.

Shapes: L layers, C entries, H key/value heads, K head width, M tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def capacity(slots: int, share: float, longest: int) -> int:
    """Return the number of pool entries for a number of depth-1 slots; at least `longest`, so any request can finish.

    Args:
        slots: Number of depth-1 slots.
        share: Number of entries per slot.
        longest: Maximum tokens of a request.
    """
    return min(slots, max(longest, math.ceil(share * slots)))


class DeepPool:
    """Keys and values of depth 2 of all layers.

    Args:
        layers: Number of layers, L.
        capacity: Number of entries, C.
        heads: Key/value heads of this process, H.
        width: Head width, K.
        slots: Number of physical depth-1 slots.
        dtype: Data type of keys and values.
        device: Device of keys and values.
    """

    def __init__(
        self, layers: int, capacity: int, heads: int, width: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.keys = torch.zeros(layers, capacity, heads, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.entry_of_slot = torch.full((slots,), -1, dtype=torch.long, device=device)
        self.unused = torch.arange(capacity, device=device)  # stack, of which the first `free` entries are free
        self.free = capacity

    def release(self, slots: Tensor) -> Tensor:
        """Free the entries of `slots` and return those of the slots that had an entry."""
        entries = self.entry_of_slot[slots]
        held = entries >= 0
        slots, entries = slots[held], entries[held]
        self.unused[self.free : self.free + len(entries)] = entries
        self.free += len(entries)
        self.entry_of_slot[slots] = -1
        return slots

    def take(self, slots: Tensor) -> Tensor:
        """Assign free entries to `slots` [M], which have none, and return them, [M].

        Raises:
            RuntimeError: Fewer than M entries are free; the scheduler prevents this.
        """
        M = len(slots)
        if M > self.free:
            raise RuntimeError(f"{M} tokens iterate, but only {self.free} of {self.capacity} pool entries are free")
        self.free -= M
        entries = self.unused[self.free : self.free + M].clone()
        self.entry_of_slot[slots] = entries
        return entries
