"""Keys and values of one layer at every depth, in one buffer.

        deeper depths, newest first  |  depth 1, oldest first
        [ ....... free | d d d d d d | 1 1 1 1 1 1 1 1 1 1 1 1 | free ....... ]
                                     ^ middle

Depth 1 reads the slice right of the middle. This is an ordinary cache, so the base runs its stock kernels on it. A
deeper pass reads one slice across the middle: all keys to which it attends, in one view, without concatenation. Each
row fills its deeper slots from the middle outwards, so a row that does not iterate stores and reads nothing there. Both
sides grow geometrically, so appending one token copies one token.

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
    """Return the slots to allocate for `length` used ones. One in 16 is spare: O(1) copies per appended token."""
    return length + max(32, length // 16)


def writable(buffer: Tensor | None) -> bool:
    """Return whether `buffer` can be written: one made under `torch.inference_mode` is read-only outside of it."""
    return buffer is None or torch.is_inference_mode_enabled() or not buffer.is_inference()


class DuoLayer(CacheLayerMixin):
    """Keys and values [B, H, C, K] of one layer at all depths."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.middle = 0  # slots left of depth 1
        self.length = 0  # depth-1 tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("use PassCache.update")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("use PassCache.update")

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
        """Append depth-1 keys and values [B, H, N, K].

        Args:
            k: Keys.
            v: Values.
            in_place: Whether to write into the buffer.
            deeper: Whether deeper passes may follow. A new buffer then has deeper slots for one token in 16 and some
                more, because adding them later copies the whole buffer.
        """
        end = self.length + k.shape[2]
        in_place = in_place and writable(self.keys)
        if self.keys is None or self.values is None:
            self.is_initialized = True
            if not in_place:  # nothing is written into the buffer, so k and v can be the buffer
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
        """Write deeper keys and values [M, H, K].

        Args:
            k: Keys.
            v: Values.
            rows: Row [M] of each token.
            slots: Slot [M] of each token, counted from the middle outwards.
            width: Slots left of the middle that are then in use in the longest row.
            in_place: Whether to write into the buffer.
        """
        fresh = self._reserve(width, self.length)
        in_place = in_place and writable(self.keys)
        assert self.keys is not None and self.values is not None
        if not in_place and not fresh:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        at = (rows.to(k.device), slice(None), self.middle - 1 - slots.to(k.device))
        self.keys[at], self.values[at] = k, v

    def _reserve(self, deep: int, length: int) -> bool:
        """Make room for `deep` slots left and `length` slots right of the middle; return whether the buffer is new."""
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
        """Replace the rows of the buffer. `select` maps [B, ...] to [B', ...]."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = select(self.keys), select(self.values)


class Log:
    """A tensor [B, n] that grows along its second dimension without a full copy each time.

    Args:
        fill: Value of the spare entries.
    """

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
