"""One layer's keys and values at every depth, in one buffer.

        deeper depths, newest first  |  depth 1, oldest first
        [ ....... free | d d d d d d | 1 1 1 1 1 1 1 1 1 1 1 1 | free ....... ]
                                     ^ middle

Depth 1 sees the slice right of the middle: an ordinary cache, so the base runs its stock kernels on it. A deeper
pass sees one slice across the middle: all keys it may attend to, in one view, with nothing concatenated. Deeper
slots are filled per row, from the middle outwards, so a row that does not iterate neither stores nor reads anything.
Both sides grow geometrically; an appended token is a copy of one token.

Shapes: B rows, N new tokens, M (token, depth) pairs, C slots of the buffer, H key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin


def room(length: int) -> int:
    """Slots to allocate for `length` used ones: one in sixteen spare, so growth costs O(1) copies per token."""
    return length + max(32, length // 16)


def writable(buffer: Tensor | None) -> bool:
    """Whether torch lets us write: a buffer made under `torch.inference_mode` is read-only outside of it."""
    return buffer is None or torch.is_inference_mode_enabled() or not buffer.is_inference()


class DuoLayer(CacheLayerMixin):
    """Keys and values [B, H, C, K] of one layer, all depths."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.middle = 0  # slots left of depth 1
        self.length = 0  # depth-1 tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("DuoLayer is filled through PassCache.update")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("DuoLayer is filled through PassCache.update")

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.20

    def reset(self) -> None:
        self.keys = self.values = None
        self.middle = self.length = 0
        self.is_initialized = False

    def append(self, k: Tensor, v: Tensor, in_place: bool, deeper: bool = False) -> None:
        """Add depth-1 keys and values [B, H, N, K] behind the ones there are.

        Args:
            deeper: whether deeper passes may follow; a new buffer then has room for one token in sixteen and some
                more, since making it later copies all there is.
        """
        end = self.length + k.shape[2]
        in_place = in_place and writable(self.keys)
        if self.keys is None or self.values is None:
            self.is_initialized = True
            if not in_place:  # nothing will be written into it, so the states themselves can be the buffer
                self.keys, self.values, self.length = k, v, end
                return
            self.keys, self.values = k[:, :, :0], v[:, :, :0]
            self._reserve(end // 16 if deeper else 0, end)
        if in_place:
            self._reserve(self.middle, end)
            at = slice(self.middle + self.length, self.middle + end)
            self.keys[:, :, at], self.values[:, :, at] = k, v
        else:
            used = slice(0, self.middle + self.length)
            self.keys = torch.cat([self.keys[:, :, used], k], dim=2)
            self.values = torch.cat([self.values[:, :, used], v], dim=2)
        self.length = end

    def insert(self, k: Tensor, v: Tensor, rows: Tensor, slots: Tensor, width: int, in_place: bool) -> None:
        """Write deeper keys and values [M, H, K] at `slots` [M] (counted from the middle outwards) of `rows` [M].

        Args:
            width: slots left of the middle that are in use afterwards, in the longest row.
        """
        fresh = self._reserve(width, self.length)
        in_place = in_place and writable(self.keys)
        assert self.keys is not None and self.values is not None
        if not in_place and not fresh:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        at = (rows.to(k.device), slice(None), self.middle - 1 - slots.to(k.device))
        self.keys[at], self.values[at] = k, v

    def _reserve(self, deep: int, length: int) -> bool:
        """Make room for `deep` slots left of the middle and `length` right of it; True if that took a new buffer."""
        assert self.keys is not None and self.values is not None
        capacity = self.keys.shape[2] - self.middle
        if deep <= self.middle and length <= capacity:
            return False
        left = self.middle if deep <= self.middle else room(deep)
        right = capacity if length <= capacity else room(length)
        used = slice(0, self.middle + self.length)
        pads = (0, 0, left - self.middle, right - self.length)
        self.keys = F.pad(self.keys[:, :, used], pads)
        self.values = F.pad(self.values[:, :, used], pads)
        self.middle = left
        return True

    def map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows of the buffer: `select` maps [B, ...] to [B', ...]."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = select(self.keys), select(self.values)


class Log:
    """A [B, n] tensor that grows along its second dimension without copying what is there each time."""

    def __init__(self, fill: float) -> None:
        self.fill = fill
        self.data: Tensor | None = None
        self.length = 0

    def append(self, x: Tensor) -> None:
        end = self.length + x.shape[1]
        if self.data is None:
            self.data = x.clone()
        else:
            if end > self.data.shape[1] or not writable(self.data):
                grown = self.data.new_full((self.data.shape[0], room(end), *self.data.shape[2:]), self.fill)
                grown[:, : self.length] = self.data[:, : self.length]
                self.data = grown
            self.data[:, self.length : end] = x
        self.length = end

    @property
    def view(self) -> Tensor:
        assert self.data is not None
        return self.data[:, : self.length]
