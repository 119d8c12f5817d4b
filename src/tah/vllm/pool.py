"""Pool of the keys and values of depth 2: one entry per iterated token, indexed by the token's depth-1 slot.

vLLM's paged KV cache holds depth 1. The pool frees the entry of an iterated token when vLLM writes another token to the
same physical slot. So a prefix-cache hit returns the keys of both depths, and preemption, chunked prefill and the reuse
of blocks need no additional bookkeeping.

The host decides which entry belongs to which slot. The device has a copy of that table. Needs no vLLM.

Shapes: L layers, C entries, H key/value heads, K head width, M tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .transfer import indices


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
        shared: Whether host and device have the same table; by default on CPUs only. Tests on a CPU set it to false, so
            that there are two tables as on a GPU.

    Attributes:
        spare: Entry behind the others, which no slot has; rows that are no tokens write their keys there.
        entries: Entry of each slot [slots] int64, or -1; on the host.
        entry_of_slot: The same on the device. After `release` and `take` it is out of date until `flush`.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        heads: int,
        width: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: bool | None = None,
    ) -> None:
        self.capacity = self.spare = capacity
        self.keys = torch.zeros(layers, capacity + 1, heads, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.entries = np.full(slots, -1, dtype=np.int64)
        self.unused = np.arange(capacity, dtype=np.int64)  # stack, of which the first `free` entries are free
        self.free = capacity
        self.changed: list[np.ndarray] = []  # slots whose entry the device does not know yet
        self.shared = torch.device(device).type == "cpu" if shared is None else shared
        if self.shared:
            self.entry_of_slot = torch.from_numpy(self.entries)
        else:
            self.entry_of_slot = torch.full((slots,), -1, dtype=torch.long, device=device)

    def release(self, slots: np.ndarray) -> np.ndarray:
        """Free the entries of `slots`, which are distinct, and return those of the slots that had an entry."""
        entries = self.entries[slots]
        held = entries >= 0
        slots, entries = slots[held], entries[held]
        self.unused[self.free : self.free + len(entries)] = entries
        self.free += len(entries)
        self._assign(slots, -1)
        return slots

    def take(self, slots: np.ndarray) -> np.ndarray:
        """Assign free entries to `slots` [M], which have none, and return them, [M].

        Raises:
            RuntimeError: Fewer than M entries are free; the scheduler prevents this.
        """
        M = len(slots)
        if M > self.free:
            raise RuntimeError(f"{M} tokens iterate, but only {self.free} of {self.capacity} pool entries are free")
        self.free -= M
        entries = self.unused[self.free : self.free + M].copy()
        self._assign(slots, entries)
        return entries

    def _assign(self, slots: np.ndarray, entries: np.ndarray | int) -> None:
        self.entries[slots] = entries
        if not self.shared and len(slots):
            self.changed.append(slots)

    def flush(self) -> None:
        """Bring the device's table up to date; the host does not wait."""
        if self.changed:
            slots = np.unique(np.concatenate(self.changed))  # a slot may have changed twice; its last entry counts
            self.changed.clear()
            at, entries = indices(self.entry_of_slot.device, slots, self.entries[slots])
            self.entry_of_slot.index_copy_(0, at, entries)
