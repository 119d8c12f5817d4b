"""Triton kernel of duo-causal attention of depth 2 (method.md (7)) over vLLM's paged keys and the pool, in one pass.

A program has one token and one key/value head. It walks the token's block table. For each tile of slots it reads the
depth-1 keys and values from the pages and, where `entry_of_slot` has an entry, those of depth 2 from the pool. One
online softmax covers both. Nothing is gathered, and the host reads no tensor: the number of programs follows from
shapes. For few tokens, several programs share the keys of one token and head, and a second kernel joins their parts by
the logarithms of their sums.

The module needs neither vLLM nor, to be imported, Triton. It uses nothing that Triton 3.6 lacks. On a CPU it runs in
Triton's interpreter (`TRITON_INTERPRET=1`, set before the first import of Triton), for tests.

Shapes: M tokens, R requests, N blocks of S slots per request, B physical blocks, E entries of the pool, H key/value
heads, G query heads per key/value head, K head width. A tile has TILE slots. `GROUP` and `WIDTH` are G and K, padded to
powers of two of at least 16, which matrix products of Triton need.
"""

# Without `from __future__ import annotations`: the interpreter of Triton finds `tl.constexpr` by the annotation itself.

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LEAST = 16  # smallest side of a matrix product on a GPU
MOST_SPLITS = 64
KEYS_PER_SPLIT = 256  # fewer slots per program cost more for the join than they save
PROGRAMS_PER_PROCESSOR = 2  # programs that a multiprocessor runs at a time
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if triton is not None:

    @triton.jit
    def _add_keys(
        top: tl.tensor,
        total: tl.tensor,
        out: tl.tensor,
        query: tl.tensor,
        keys: tl.tensor,
        values: tl.tensor,
        seen: tl.tensor,
        scale: tl.tensor,
        WIDE: tl.constexpr,
    ) -> Any:
        """Add keys and values [TILE, WIDTH] where `seen` [TILE] to the online softmax of queries [GROUP, WIDTH].

        The state is the largest score and the sum of the weights, [GROUP], and the weighted values [GROUP, WIDTH].
        """
        if WIDE:  # the interpreter cannot multiply bfloat16
            query, keys = query.to(tl.float32), keys.to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -1e30)  # finite: a difference of infinities is no number
        highest = tl.maximum(top, tl.max(scores, 1))
        kept = tl.exp2(top - highest)
        weights = tl.where(seen[None, :], tl.exp2(scores - highest[:, None]), 0.0)
        total = total * kept + tl.sum(weights, 1)
        weights = weights.to(values.dtype)
        if WIDE:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        return highest, total, out * kept[:, None] + tl.dot(weights, values, input_precision="ieee")

    @triton.jit(do_not_specialize=["table_row"])
    def _attend(
        query: tl.tensor,
        cache: tl.tensor,
        deep_keys: tl.tensor,
        deep_values: tl.tensor,
        entry_of_slot: tl.tensor,
        tables: tl.tensor,
        owners: tl.tensor,
        positions: tl.tensor,
        out: tl.tensor,
        sums: tl.tensor,
        scale: tl.tensor,
        query_row: tl.tensor,
        query_head: tl.tensor,
        query_column: tl.tensor,
        cache_block: tl.tensor,
        cache_head: tl.tensor,
        cache_slot: tl.tensor,
        cache_column: tl.tensor,
        key_row: tl.tensor,
        key_head: tl.tensor,
        key_column: tl.tensor,
        value_row: tl.tensor,
        value_head: tl.tensor,
        value_column: tl.tensor,
        table_row: tl.tensor,
        table_column: tl.tensor,
        S: tl.constexpr,
        K: tl.constexpr,
        G: tl.constexpr,
        WIDTH: tl.constexpr,
        GROUP: tl.constexpr,
        TILE: tl.constexpr,
        OWN: tl.constexpr,
        JOIN: tl.constexpr,
        WIDE: tl.constexpr,
    ) -> None:
        """Attend with G query heads of one token to one part of its keys.

        With `JOIN`, `out` [M, H * G, splits, K] and `sums` [M, H * G, splits] are float32; `sums` has the logarithm to
        base 2 of the sum of the weights. Without, `out` is the result [M, H * G, K]. Both are contiguous.
        """
        token, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
        heads, splits = tl.num_programs(1), tl.num_programs(2)
        column, member, offset = tl.arange(0, WIDTH), tl.arange(0, GROUP), tl.arange(0, TILE)
        inside = column < K
        filled = (member < G)[:, None] & inside[None, :]
        number = head * G + member
        at = token * query_row + number[:, None] * query_head + column[None, :] * query_column
        q = tl.load(query + at, mask=filled, other=0.0)
        last, table = tl.load(positions + token), tables + tl.load(owners + token).to(tl.int64) * table_row
        pages = cache + head * cache_head
        first_keys, first_values = pages + column * cache_column, pages + (column + K) * cache_column
        own_keys = deep_keys + head * key_head + column * key_column
        own_values = deep_values + head * value_head + column * value_column
        top, total = tl.full([GROUP], -1e30, tl.float32), tl.zeros([GROUP], tl.float32)
        mixed = tl.zeros([GROUP, WIDTH], tl.float32)

        if OWN:  # the only key of depth 2 is that of the token itself, and the first part has it
            its_block = tl.load(table + last // S * table_column, mask=last >= 0, other=-1).to(tl.int64)
            its_entry = tl.load(entry_of_slot + its_block * S + last % S, mask=its_block >= 0, other=-1).to(tl.int64)
            has = (its_entry >= 0) & (split == 0)
            readable = column < tl.where(has, K, 0)  # the interpreter takes no `inside & has`
            its_key = tl.load(own_keys + its_entry * key_row, mask=readable, other=0.0)
            its_value = tl.load(own_values + its_entry * value_row, mask=readable, other=0.0)
            score = tl.sum(q.to(tl.float32) * its_key.to(tl.float32)[None, :], 1) * scale
            top, total = tl.where(has, score, top), tl.where(has, total + 1.0, total)
            mixed = tl.where(has, mixed + its_value.to(tl.float32)[None, :], mixed)

        part = tl.cdiv(tl.cdiv(last + 1, TILE), splits) * TILE  # slots of a part: whole tiles
        for start in range(split * part, tl.minimum(last + 1, (split + 1) * part), TILE):
            place = start + offset
            block = tl.load(table + place // S * table_column, mask=place <= last, other=-1).to(tl.int64)
            seen = block >= 0  # a hole of the table has no keys
            slot = block * cache_block + (place % S) * cache_slot
            filled_slots = seen[:, None] & inside[None, :]
            keys = tl.load(first_keys[None, :] + slot[:, None], mask=filled_slots, other=0.0)
            values = tl.load(first_values[None, :] + slot[:, None], mask=filled_slots, other=0.0)
            top, total, mixed = _add_keys(top, total, mixed, q, keys, values, seen, scale, WIDE)
            if not OWN:
                entry = tl.load(entry_of_slot + block * S + place % S, mask=seen, other=-1).to(tl.int64)
                deep = entry >= 0
                filled_slots = deep[:, None] & inside[None, :]
                keys = tl.load(own_keys[None, :] + (entry * key_row)[:, None], mask=filled_slots, other=0.0)
                values = tl.load(own_values[None, :] + (entry * value_row)[:, None], mask=filled_slots, other=0.0)
                top, total, mixed = _add_keys(top, total, mixed, q, keys, values, deep, scale, WIDE)

        any_key = total > 0  # none in a padded row, whose position is -1, or in a part behind the last key
        mixed = mixed / tl.where(any_key, total, 1.0)[:, None]
        row = token * heads * G + number
        if JOIN:
            row = row * splits + split
            sums_of = tl.where(any_key, top + tl.log2(tl.where(any_key, total, 1.0)), -1e30)
            tl.store(sums + row, sums_of, mask=member < G)
        tl.store(out + row[:, None] * K + column[None, :], mixed.to(out.dtype.element_ty), mask=filled)

    @triton.jit
    def _join(
        parts: tl.tensor,
        sums: tl.tensor,
        out: tl.tensor,
        splits: tl.tensor,
        K: tl.constexpr,
        WIDTH: tl.constexpr,
        SPLITS: tl.constexpr,
    ) -> None:
        """Join the parts [splits, K] of one query head: the average with the sums of their weights."""
        row = tl.program_id(0).to(tl.int64)
        column, split = tl.arange(0, WIDTH), tl.arange(0, SPLITS)
        each = tl.load(sums + row * splits + split, mask=split < splits, other=-1e30)
        highest = tl.max(each, 0)
        weights = tl.where(each > -1e30, tl.exp2(each - highest), 0.0)
        total = tl.sum(weights, 0)
        at = (row * splits + split)[:, None] * K + column[None, :]
        part = tl.load(parts + at, mask=(split < splits)[:, None] & (column < K)[None, :], other=0.0)
        joined = tl.sum(part * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
        tl.store(out + row * K + column, joined.to(out.dtype.element_ty), mask=column < K)


def duo_attention(
    query: Tensor,
    kv_cache: Tensor,
    deep_keys: Tensor,
    deep_values: Tensor,
    entry_of_slot: Tensor,
    tables: Tensor,
    owners: Tensor,
    positions: Tensor,
    scale: float,
    own: bool,
    splits: int | None = None,
) -> Tensor:
    """Return the attention output [M, H * G, K] of tokens at depth 2, in the data type of the queries.

    A token attends to the depth-1 keys of its request up to its position, and to their depth-2 keys where the slots
    have entries; with `own`, to the depth-2 key of its own slot only. Sums are in float32. The call can be captured in
    a CUDA graph, after one call with the same shapes.

    Args:
        query: Queries [M, H * G, K]; float32, bfloat16 or float16.
        kv_cache: Depth-1 keys, then values, [B, H, S, 2 * K], with any strides (NHD, HND); in the type of the queries.
        deep_keys: Keys [E, H, K] of the entries of one layer; E may be 0.
        deep_values: Values [E, H, K] of the entries.
        entry_of_slot: Entry of each physical slot, or -1, [B * S]; int32 or int64.
        tables: Physical blocks of each request, [R, N]; int32 or int64. A negative number is a hole, without keys.
        owners: Request of each token, [M]; int32 or int64.
        positions: Position of each token, [M]; int32 or int64. The output of a padded row, with position -1, is zero.
        scale: Factor of the scores.
        own: Whether the own entry is the only one that a token attends to (`attention="own"`).
        splits: Number of programs that share the keys of a token and head; by default `choose_splits`.

    Raises:
        RuntimeError: Triton is not installed, or the tensors are on a CPU and kernels are not interpreted.
        ValueError: Shapes or data types do not fit.
    """
    if triton is None:
        raise RuntimeError("attention of depth 2 on a GPU needs Triton, which is not installed: pip install triton")
    if query.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError("the Triton kernel of depth 2 needs a GPU, or TRITON_INTERPRET=1 from the start for tests")
    _check(query, kv_cache, deep_keys, deep_values, entry_of_slot)
    (M, heads, K), (_, H, S, _) = query.shape, kv_cache.shape
    out = torch.empty(M, heads, K, dtype=query.dtype, device=query.device)
    if not M:
        return out
    if splits is None:
        splits = choose_splits(M, H, tables.shape[1] * S, processors(query.device))
    elif splits < 1:
        raise ValueError(f"splits is {splits}; it must be at least 1")
    width = max(LEAST, triton.next_power_of_2(K))
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(M, heads, splits, K, dtype=torch.float32, device=query.device)
        sums = torch.empty(M, heads, splits, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        _attend[(M, H, splits)](
            query,
            kv_cache,
            deep_keys,
            deep_values,
            entry_of_slot.contiguous(),
            tables,
            owners.contiguous(),
            positions.contiguous(),
            parts,
            sums,
            scale * 1.4426950408889634,  # powers of 2 are faster than those of e
            *query.stride(),
            *kv_cache.stride(),
            *deep_keys.stride(),
            *deep_values.stride(),
            *tables.stride(),
            S=S,
            K=K,
            G=heads // H,
            WIDTH=width,
            GROUP=max(LEAST, triton.next_power_of_2(heads // H)),
            TILE=tile(width, query.element_size()),
            OWN=own,
            JOIN=splits > 1,
            WIDE=INTERPRETED,
            num_warps=4 if query.element_size() == 2 else 8,
            num_stages=2,
        )
        if splits > 1:
            _join[(M * heads,)](
                parts, sums, out, splits, K=K, WIDTH=width, SPLITS=triton.next_power_of_2(splits), num_warps=4
            )
    return out


def choose_splits(tokens: int, heads: int, longest: int, processors: int) -> int:
    """Return the number of programs that share the keys of one token and key/value head, a power of two.

    Each number has a variant of the second kernel, so there should be few.

    Args:
        tokens: Number of tokens, M.
        heads: Number of key/value heads, H.
        longest: Slots that a block table has room for, N * S.
        processors: Multiprocessors of the GPU, each of which runs several programs at a time.
    """
    needed = PROGRAMS_PER_PROCESSOR * processors // max(1, tokens * heads)
    most = max(1, min(needed, longest // KEYS_PER_SPLIT, MOST_SPLITS))
    return 1 << most.bit_length() - 1


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tile(width: int, size: int) -> int:
    """Return the number of slots of a tile for a padded head width and bytes per number.

    Products of float32 run without matrix units and hold more in registers, so they get smaller tiles.
    """
    return max(LEAST, min(64, (16384 if size == 2 else 8192) // (width * size)))


def _check(query: Tensor, kv_cache: Tensor, deep_keys: Tensor, deep_values: Tensor, entry_of_slot: Tensor) -> None:
    """Raise an error if shapes or data types do not fit; nothing waits for the device."""
    (_, heads, K), (B, H, S, both) = query.shape, kv_cache.shape
    if both != 2 * K or heads % H:
        raise ValueError(f"queries {tuple(query.shape)} do not fit a cache {tuple(kv_cache.shape)}")
    if deep_keys.shape[1:] != (H, K) or deep_values.shape != deep_keys.shape:
        found = f"{tuple(deep_keys.shape)} and {tuple(deep_values.shape)}"
        raise ValueError(f"keys and values of depth 2 {found} do not fit {H} heads of width {K}")
    if len(entry_of_slot) != B * S:
        raise ValueError(f"{len(entry_of_slot)} entries of slots do not fit {B} blocks of {S} slots")
    types = {x.dtype for x in (query, kv_cache, deep_keys, deep_values)}
    if len(types) > 1 or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"queries and keys are {', '.join(sorted(map(str, types)))}; all must be of one float type")
