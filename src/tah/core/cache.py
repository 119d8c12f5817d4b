"""The KV cache of all depths, and the view of it that the base uses in one pass.

Shapes: B rows of the cache, R rows in this pass, P packed columns, S visible slots, H key/value heads, K head width,
M (token, depth) pairs written by this pass, W slots of the deeper depths, n depth-1 slots.

`DuoCache` records which slot holds which (position, depth). Opening a pass reserves slots for its tokens and returns a
`PassCache`. The base's layers pass their keys and values to it and get back all keys and values to which they attend.
`kv_buffer.DuoLayer` holds the tensors; kv_buffer.py has a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .kv_buffer import DuoLayer, Log, room, writable
from .masks import NEVER, depth_masks
from .packing import Packed, unpack


class DuoCache(Cache):
    """Keys and values of every token at every depth that it ran.

    transformers uses this as a cache of depth 1: `get_seq_length` counts tokens. `generate` may reorder its rows
    (beams), repeat them, or crop the newest tokens (assisted decoding). The deeper depths change with them.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DuoLayer)
        self._clear()

    def _clear(self) -> None:
        self.order_keys = Log(NEVER)  # [B, n] order key of each depth-1 slot (masks.py); NEVER at padding
        self.depth_count = Log(1)  # [B, n] passes that each token took
        self.continue_logits: Log | None = None  # [B, n, max_depth - 1]
        self.has_padding = False
        self.has_documents = False  # rows hold several documents each, so nothing can be appended
        self.whole = True  # False while a call runs, and after a call that failed
        self.deep_order_keys: Tensor | None = None  # [B, W], slot w counted from the middle outwards
        self.deep_depths: Tensor | None = None  # [B, W]
        self.deep_length: Tensor | None = None  # [B] slots in use per row
        self.deep_width = 0  # slots in use in the longest row

    def reset(self) -> None:
        super().reset()
        self._clear()

    # -- passes --------------------------------------------------------------------------------------------------

    def open_pass(
        self, order_keys: Tensor, valid: Tensor, padded: bool, documents: bool = False, deeper: bool = False
    ) -> PassCache:
        """Open a pass at depth 1 over all rows.

        Args:
            order_keys: Order keys [B, N] int64 of the new tokens (masks.py).
            valid: Mask [B, N] bool, False at padding.
            padded: Whether any entry of `valid` is False. An argument, so that nothing waits for the device.
            documents: Whether a row holds several documents.
            deeper: Whether deeper passes may follow.

        Returns:
            The view of the cache for this pass.

        Raises:
            ValueError: The cache holds another number of rows or several documents per row, or an earlier call failed.
        """
        if self.order_keys.data is not None and self.order_keys.data.shape[0] != order_keys.shape[0]:
            raise ValueError(
                f"the cache holds {self.order_keys.data.shape[0]} rows but the input has {order_keys.shape[0]}; "
                "use the cache of the same batch, or none"
            )
        if self.has_documents:
            raise ValueError("this cache holds rows of several documents each; it cannot be continued")
        if not self.whole:
            raise ValueError("an earlier call on this cache failed halfway; start again with a new cache")
        self.whole = False
        start = self.order_keys.length
        self.order_keys.append(order_keys.masked_fill(~valid, NEVER) if padded else order_keys)
        self.has_padding |= padded
        self.has_documents = documents
        return PassCache(self, 1, start, deeper=deeper)

    def open_deeper_pass(self, depth: int, packed: Packed, order_keys: Tensor, alone: bool = False) -> PassCache:
        """Open a pass at `depth` >= 2 for M chosen tokens.

        Args:
            depth: Depth of the pass.
            packed: Layout of the tokens in the [R, P] input of the pass.
            order_keys: Order keys [M] of the tokens.
            alone: Whether each token attends to no other token of this pass, which leaves keys and values of the cache
                as they are. Open such a pass inside `forgetting`.

        Returns:
            The view of the cache for this pass.
        """
        batch, row = self.order_keys.view.shape[0], packed.batch_row
        if self.deep_length is None:
            self.deep_length = torch.zeros(batch, dtype=torch.long, device=row.device)
            self.deep_order_keys = order_keys.new_empty(batch, 0)
            self.deep_depths = order_keys.new_empty(batch, 0)
        assert self.deep_order_keys is not None and self.deep_depths is not None
        slots = self.deep_length[row] + packed.packed_column
        used = int(slots.max()) + 1
        width = max(self.deep_width, used)
        if width > self.deep_order_keys.shape[1]:
            grow = (0, room(width) - self.deep_order_keys.shape[1])
            self.deep_order_keys = torch.nn.functional.pad(self.deep_order_keys, grow, value=NEVER)
            self.deep_depths = torch.nn.functional.pad(self.deep_depths, grow)
        if not writable(self.deep_order_keys):
            self.deep_order_keys, self.deep_depths = self.deep_order_keys.clone(), self.deep_depths.clone()
        self.deep_order_keys[row, slots] = order_keys
        self.deep_depths[row, slots] = -depth if alone else depth  # see `masks.depth_masks`
        self.deep_length = self.deep_length.index_add(0, row, torch.ones_like(row))
        self.deep_width = width
        return PassCache(self, depth, self.order_keys.length, DeepWrite(slots, used, width, packed, alone))

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Forget on exit which slots the passes inside took. Their keys stay until others replace them, except those of
        passes whose tokens run alone, which are not kept."""
        before = (self.deep_order_keys, self.deep_depths, self.deep_length)
        copies, width = [None if x is None else x.clone() for x in before], self.deep_width
        yield
        self.deep_order_keys, self.deep_depths, self.deep_length = copies
        self.deep_width = width

    def drop_deep(self) -> None:
        """Drop all deeper keys and values."""
        self.deep_order_keys = self.deep_depths = self.deep_length = None
        self.deep_width = 0

    def commit(self, depth_count: Tensor, continue_logits: Tensor) -> None:
        """End a call: record `depth_count` [B, N] and `continue_logits` [B, N, max_depth - 1] of its tokens."""
        self.whole = True
        self.depth_count.append(depth_count)
        if self.continue_logits is None:
            self.continue_logits = Log(float("nan"))
        elif (seen := self.continue_logits.view.shape[2]) != continue_logits.shape[2]:
            depths = max(seen, continue_logits.shape[2])
            widen = torch.nn.functional.pad(self.continue_logits.view, (0, depths - seen), value=float("nan"))
            self.continue_logits = Log(float("nan"))
            self.continue_logits.append(widen)
            grow = (0, depths - continue_logits.shape[2])
            continue_logits = torch.nn.functional.pad(continue_logits, grow, value=float("nan"))
        self.continue_logits.append(continue_logits)

    # -- the interface of a cache in transformers ----------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.order_keys.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.order_keys.length + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.order_keys.data is None else self.order_keys.data.shape[0]

    def _map_batch(self, select: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.map_batch(select)
        for log in (self.order_keys, self.depth_count, self.continue_logits):
            if log is not None and log.data is not None:
                log.data = select(log.data)
        if self.deep_length is not None and self.deep_order_keys is not None and self.deep_depths is not None:
            self.deep_length = select(self.deep_length)
            self.deep_order_keys = select(self.deep_order_keys)
            self.deep_depths = select(self.deep_depths)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens of every row, at every depth.

        Args:
            tokens_to_remove: Minus the number of tokens, or 0.

        Raises:
            ValueError: The number is positive. In older versions of transformers that was the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        keep = self.order_keys.length + tokens_to_remove
        if tokens_to_remove == 0 or self.order_keys.data is None:
            return
        if self.deep_order_keys is not None and self.deep_length is not None:
            first_removed = self.order_keys.view[:, keep:].amin(dim=1, keepdim=True)
            gone = self.deep_order_keys >= first_removed
            self.deep_order_keys = self.deep_order_keys.masked_fill(gone, NEVER)
            index = torch.arange(1, gone.shape[1] + 1, device=gone.device)
            self.deep_length = (index * ~gone).amax(dim=1) if gone.shape[1] else self.deep_length
            self.deep_width = int(self.deep_length.max())
        for layer in self.layers:
            layer.length = keep
        for log in (self.order_keys, self.depth_count, self.continue_logits):
            if log is not None:
                log.length = min(log.length, keep)


@dataclass
class DeepWrite:
    """The slots of the M tokens of a pass at depth >= 2, and their layout in its input."""

    slots: Tensor  # [M] slot, counted from the middle outwards
    used: int  # slots in use in the longest row of this pass
    width: int  # slots in use in the longest row of the cache
    packed: Packed
    alone: bool = False  # whether each token attends to no other token of this pass, whose keys are not kept


class PassCache(Cache):
    """The base's cache during one pass. It stores keys of this depth and returns keys of depths up to it.

    With gradients, nothing is written in place and a layer may be replayed (activation checkpointing). A replay starts
    from the state in which the pass was opened and does not change the cache. A pass whose tokens run alone does not
    change the keys and values of the cache either: it has no gradients, but later calls may need those of the cache.

    Args:
        cache: The cache of all depths.
        depth: Depth of the pass.
        start: Depth-1 tokens in the cache before the new tokens of this pass.
        write: Slots of a pass at depth >= 2; None at depth 1.
        deeper: Whether deeper passes may follow.
    """

    def __init__(
        self,
        cache: DuoCache,
        depth: int,
        start: int,
        write: DeepWrite | None = None,
        deeper: bool = False,
    ) -> None:
        super().__init__(layers=cache.layers)
        self.cache, self.depth, self.start, self.write, self.deeper = cache, depth, start, write, deeper
        self.only_row = int(write.packed.rows) if write is not None and len(write.packed.rows) == 1 else None
        self.before = [(layer.keys, layer.values, layer.middle, layer.length) for layer in cache.layers]
        self.written: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [R, H, P, K] of a layer; return all to which the pass attends, [R, H, S, K]."""
        alone = self.write is not None and self.write.alone
        in_place = not torch.is_grad_enabled() and not alone  # backwards of earlier passes need their keys as they were
        layers = self.cache.layers
        while len(layers) <= layer_idx:
            layers.append(DuoLayer())
        layer = layers[layer_idx]
        if alone or layer_idx in self.written:  # the latter is a replay; both leave the layer of the cache as it is
            layer = DuoLayer()
            if layer_idx < len(self.before):
                layer.keys, layer.values, layer.middle, layer.length = self.before[layer_idx]
        self.written.add(layer_idx)
        if self.write is None:
            layer.append(key_states, value_states, in_place, self.deeper)
            if self.start == 0:  # the base attends to its own tensors: bit for bit the same as without a cache
                return key_states, value_states
        else:
            k = unpack(key_states, self.write.packed)
            v = unpack(value_states, self.write.packed)
            layer.insert(k, v, self.write.packed.batch_row, self.write.slots, self.write.width, in_place)
        return self._visible(layer)

    def _visible(self, layer: DuoLayer) -> tuple[Tensor, Tensor]:
        assert layer.keys is not None and layer.values is not None
        end = layer.middle + layer.length
        if self.write is None:
            return layer.keys[:, :, layer.middle : end], layer.values[:, :, layer.middle : end]
        span = slice(layer.middle - self.write.used, end)
        keys, values, rows = layer.keys[:, :, span], layer.values[:, :, span], self.write.packed.rows
        if len(rows) == keys.shape[0]:
            return keys, values
        if self.only_row is not None:  # a view; the usual case in decoding
            return keys[self.only_row : self.only_row + 1], values[self.only_row : self.only_row + 1]
        rows = rows.to(keys.device)
        return keys.index_select(0, rows), values.index_select(0, rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.start + query_length, 0

    # -- masks ---------------------------------------------------------------------------------------------------

    def padding_mask(self) -> Tensor | None:
        """Return the mask [B, n] bool for the base's own mask code at depth 1, or None without padding."""
        return self.cache.order_keys.view != NEVER if self.cache.has_padding else None

    def masks(self, config: PreTrainedConfig, order_keys: Tensor, attention: str, dtype: torch.dtype) -> Any:
        """Return ready masks of a pass at depth >= 2, in the form of the base's attention implementation.

        Args:
            config: Text configuration of the base.
            order_keys: Order keys [R, N] of the queries.
            attention: `duo`, `own` or `blind`.
            dtype: Type of the activations.

        Returns:
            A mask [R, 1, N, S] (or a `BlockMask`), or a dict of masks by layer type where the base's layers differ.
        """
        assert self.write is not None and self.cache.deep_order_keys is not None and self.cache.deep_depths is not None
        rows, newest_first = self.write.packed.rows, slice(0, self.write.used)
        deep = self.cache.deep_order_keys[rows, newest_first].flip(1)  # in memory order, left of the middle
        depths = self.cache.deep_depths[rows, newest_first].flip(1)
        base = self.cache.order_keys.view[rows]
        documents = self.cache.has_documents
        alone = self.write.alone
        return depth_masks(config, self.depth, order_keys, deep, depths, base, attention, dtype, documents, alone)
