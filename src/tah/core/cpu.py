"""Linear layers on a few rows, faster: what a deeper pass has while decoding a batch.

A CPU's float32 kernels take longer for x W^T than for (W x^T)^T when x has few rows (docs/benchmarks.md). Only
deeper passes use this: depth 1 keeps the base's own products, bit for bit.

Shapes: n rows, I input width, O output width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEW_ROWS = 48


def applies_to(x: Tensor, linear: nn.Module) -> bool:
    """Whether `linear` of `x` [..., I] is a case for `product`."""
    if linear.training or is_watched(linear):
        return False
    few = 1 < x.numel() // x.shape[-1] <= FEW_ROWS
    return few and x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()


def is_watched(module: nn.Module) -> bool:
    """Whether hooks of the module must see a call (offloading, sharding), so that its weights may not be used without
    one. Hooks of all modules, as counters of operations have them, are not asked for."""
    return hasattr(module, "_hf_hook") or bool(module._forward_hooks or module._forward_pre_hooks)


def product(x: Tensor, weight: Tensor, A: Tensor | None = None, B: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """x W^T, plus scale * x A^T B^T where given: [..., I], [O, I], [r, I], [O, r] -> [..., O]."""
    rows = x.flatten(0, -2).t()
    y = torch.mm(weight, rows)
    if A is not None and B is not None:
        y = torch.addmm(y, B, torch.mm(A, rows), alpha=scale)
    return y.t().contiguous().view(*x.shape[:-1], -1)
