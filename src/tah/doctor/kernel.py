"""The check of the Triton kernel that serving uses for depth 2 on GPUs, against a plain computation.

Shapes: M tokens, B blocks of S slots, E entries of the pool, H key/value heads, G query heads per key/value head, K
head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from ..device import Machine
from .lines import Found, Line, Skip, line_of
from .machine import is_native

KERNEL = "tah.vllm.kernel"
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # largest norm of the difference, relative
S, H, G, K = 16, 2, 4, 64
SCALE = K**-0.5
LENGTHS = (5, 40, 131)  # tokens of each request
EVERY = 3  # every third slot has an entry in the pool

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """Queries of a step, and the keys and values of its requests, in pages and in the pool.

    Args:
        query: Queries [M, H * G, K] of the last two tokens of each request.
        pages: Depth-1 keys, then values, [B, H, S, 2 * K].
        deep_keys: Keys [E, H, K] of depth 2.
        deep_values: Values [E, H, K] of depth 2.
        entry_of_slot: Entry of each slot, or -1, [B * S].
        tables: Blocks of each request, [R, N].
        owners: Request of each token, [M].
        positions: Position of each token, [M].
    """

    query: Tensor
    pages: Tensor
    deep_keys: Tensor
    deep_values: Tensor
    entry_of_slot: Tensor
    tables: Tensor
    owners: Tensor
    positions: Tensor

    @classmethod
    def random(cls, dtype: torch.dtype) -> Problem:
        """Return a problem with blocks in random order, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        most = max(LENGTHS) // S + 1
        blocks = torch.randperm(len(LENGTHS) * most, generator=generator).view(len(LENGTHS), most)
        slots = blocks.numel() * S
        entries = torch.full((slots,), -1)
        entries[::EVERY] = torch.arange(len(entries[::EVERY]))
        owners = torch.arange(len(LENGTHS)).repeat_interleave(2)
        positions = torch.tensor([length - 1 - back for length in LENGTHS for back in (1, 0)])

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        deep = len(entries[::EVERY])
        pages = normal(blocks.numel(), H, S, 2 * K)
        keys = normal(len(owners), H * G, K), pages, normal(deep, H, K), normal(deep, H, K)
        return cls(*keys, entries, blocks, owners, positions)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tensors on a device, in the order of the arguments of the kernel."""
        return tuple(tensor.to(device) for tensor in vars(self).values())


def plain(problem: Problem, scale: float, own: bool) -> Tensor:
    """Return the attention [M, H * G, K] of every token in float64, from its list of keys."""
    out = []
    for query, owner, position in zip(problem.query.double(), problem.owners, problem.positions, strict=True):
        place = torch.arange(int(position) + 1)
        slot = problem.tables[owner][place // S] * S + place % S
        pages = problem.pages.double()[slot // S, :, slot % S]  # [T, H, 2 * K]
        entry = problem.entry_of_slot[slot]
        seen = (entry >= 0) & (place == position) if own else entry >= 0
        entry = entry[seen]
        keys = torch.cat([pages[..., :K], problem.deep_keys.double()[entry]])  # [keys, H, K]
        values = torch.cat([pages[..., K:], problem.deep_values.double()[entry]])
        scores = torch.einsum("hgk,nhk->hgn", query.view(H, G, K), keys) * scale
        out.append(torch.einsum("hgn,nhk->hgk", scores.softmax(-1), values).flatten(0, 1))
    return torch.stack(out)


def kernel_line(device: torch.device) -> Line:
    """Return the line of the kernel on a device."""
    return line_of("kernels", "Triton kernel = plain", partial(_check, device))


def _check(device: torch.device) -> Found:
    """Check the kernel, or skip it where it cannot run."""
    if find_spec("triton") is None:
        raise Skip("Triton is not installed; only serving on GPUs needs it")
    if find_spec(KERNEL) is None:
        raise Skip("this version of tah has no kernel for serving on GPUs")
    module = import_module(KERNEL)
    if device.type != "cuda" and not module.INTERPRETED:
        raise Skip("the kernel needs a GPU; only serving on GPUs uses it")
    return compare(module.duo_attention, device, types_of(device, Machine.here()))


def types_of(device: torch.device, machine: Machine) -> list[torch.dtype]:
    """Return the data types of the check: those that a GPU computes natively, and all in Triton's interpreter.

    Triton compiles no products in bfloat16 for GPUs that do not have them.
    """
    return [dtype for dtype in DTYPES if device.type != "cuda" or is_native(dtype, device, machine)]


def compare(attend: Attend, device: torch.device, dtypes: Iterable[torch.dtype] = tuple(DTYPES)) -> Found:
    """Compare a kernel with the plain computation, for both kinds of attention and every data type."""
    differ, right = {}, True
    for dtype in dtypes:
        problem, apart, most = Problem.random(dtype), 0.0, DTYPES[dtype]
        for own, splits in product((False, True), (1, 4)):
            got = attend(*problem.on(device), scale=SCALE, own=own, splits=splits).cpu().double()
            want = plain(problem, SCALE, own)
            apart = max(apart, float(((got - want).norm() / want.norm()).nan_to_num(torch.inf)))
        differ[str(dtype).removeprefix("torch.")] = apart
        right &= apart <= most
    text = ", ".join(f"{name} {apart:.1e}" for name, apart in differ.items())
    return Found(f"differs by {text}", right, {"difference": differ})
