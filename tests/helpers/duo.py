"""Random inputs of the kernel of duo-causal attention, and the plain reference: a loop over tokens, heads and keys.

Shapes are those of `tah.vllm.kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """Inputs of one call of the kernel, in the order of its arguments."""

    query: Tensor
    kv_cache: Tensor
    deep_keys: Tensor
    deep_values: Tensor
    entry_of_slot: Tensor
    tables: Tensor
    owners: Tensor
    positions: Tensor
    scale: float
    own: bool

    @property
    def arguments(self) -> tuple:
        return tuple(vars(self).values())

    def to(self, device: str) -> Case:
        """Move the inputs; strides are kept."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})


def draw(
    M: int,
    R: int = 3,
    H: int = 2,
    G: int = 2,
    K: int = 32,
    S: int = 16,
    N: int = 4,
    share: float = 0.3,
    own: bool = False,
    layout: str = "NHD",
    dtype: torch.dtype = torch.float32,
    numbers: torch.dtype = torch.int32,
    holes: bool = False,
    seed: int = 0,
) -> Case:
    """Draw a case with a share of hard slots; each token of the call has an entry, unless the share is 0.

    What no token may read is NaN: slots and entries of no request, and slots behind the last token of a request.
    """
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    B = R * N + 3
    tables = (torch.randperm(B - 1, generator=rng)[: R * N] + 1).view(R, N)
    longest = torch.randint(1, N * S + 1, (R,), generator=rng)
    owners = torch.randint(R, (M,), generator=rng).sort().values
    positions = (torch.rand(M, generator=rng) * longest[owners]).long()
    positions[-1] = longest[owners[-1]] - 1
    read = torch.zeros(B * S, dtype=torch.bool)
    for request in range(R):
        place = torch.arange(int(longest[request]))
        read[tables[request, place // S] * S + place % S] = True
    hard = read & (torch.rand(B * S, generator=rng) < share)
    if share:
        hard[tables[owners, positions // S] * S + positions % S] = True
    slots = hard.nonzero().squeeze(1)
    E = len(slots) + 2 if share else 0
    entries = torch.randperm(E, generator=rng)[: len(slots)]
    entry_of_slot = torch.full((B * S,), -1).index_put_((slots,), entries)
    taken = torch.zeros(E, dtype=torch.bool).index_fill_(0, entries, True)
    deep_keys, deep_values = (randn(E, H, K).masked_fill_(~taken[:, None, None], torch.nan) for _ in range(2))
    written = read.view(B, S)[:, None, :, None]
    kv_cache = randn(B, S, H, 2 * K).transpose(1, 2) if layout == "NHD" else randn(B, H, S, 2 * K)
    kv_cache.masked_fill_(~written, torch.nan)
    if holes:
        tables[torch.rand(R, N, generator=rng) < 0.3] = -1
    query, (tables, owners, positions) = randn(M, H * G, K), (x.to(numbers) for x in (tables, owners, positions))
    scale = K**-0.5
    return Case(
        query, kv_cache, deep_keys, deep_values, entry_of_slot.to(numbers), tables, owners, positions, scale, own
    )


def plain(case: Case) -> Tensor:
    """Return what the kernel has to return, [M, H * G, K] in float64; a token without any key gets zeros."""
    _, H, S, both = case.kv_cache.shape
    K = both // 2
    out = torch.zeros(case.query.shape, dtype=torch.float64)
    for token, (owner, last) in enumerate(zip(case.owners.tolist(), case.positions.tolist(), strict=True)):
        keys, values = [], []
        for place in range(last + 1):
            block = int(case.tables[owner, place // S])
            if block < 0:
                continue
            page = case.kv_cache[block, :, place % S]
            keys.append(page[:, :K])
            values.append(page[:, K:])
            entry = int(case.entry_of_slot[block * S + place % S])
            if entry >= 0 and (place == last or not case.own):
                keys.append(case.deep_keys[entry])
                values.append(case.deep_values[entry])
        if not keys:
            continue
        key, value = torch.stack(keys).double(), torch.stack(values).double()  # [n, H, K]
        query = case.query[token].double().view(H, -1, K)
        weights = (torch.einsum("hgk,nhk->hgn", query, key) * case.scale).softmax(-1)
        out[token] = torch.einsum("hgn,nhk->hgk", weights, value).reshape(-1, K)
    return out


def same(case: Case, found: Tensor, want: Tensor | None = None) -> None:
    """Assert that a result of the kernel has the right shape and type and is near the reference."""
    assert found.shape == case.query.shape and found.dtype == case.query.dtype and found.is_contiguous()
    difference = (found.cpu().double() - (plain(case) if want is None else want)).abs()
    assert difference.isfinite().all(), "a number that no token may read was read"
    assert not difference.numel() or difference.max() < TOLERANCE[case.query.dtype]
