"""LoRA by depth, method.md (6): a low-rank update of the base's linear layers that is active from depth 2 on.

Shapes: ... any leading dimensions, I input width, O output width, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import fast
from .compat import mark_initialized, renew_hooked_forward
from .depth import current_depth
from .quantised import check_gradient, compute_dtype, is_quantised_layer


class Factor(nn.Module):
    """Matrix A or B of a low-rank update, [..., I] -> [..., O].

    It is no `nn.Linear`, because libraries that search a model for linear layers (PEFT's `all-linear`, quantisers)
    would take it for a layer of the base. It draws the random numbers that an `nn.Linear` draws.
    """

    weight: Tensor  # [O, I]

    def __init__(self, inputs: int, outputs: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, **factory))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class DepthLoRA(nn.Module):
    """Mixin over a linear layer that adds `scale * B(A(dropout(x)))` at depth >= 2 and nothing at depth 1.

    The layer keeps its parameters and their names. `lora_A.weight` [r, I] and `lora_B.weight` [O, r] have PEFT's names.
    A starts Kaiming-uniform and B at zero, so an untrained LoRA changes nothing.
    """

    stock: type[nn.Module]  # the layer's class before LoRA was added
    lora_A: Factor
    lora_B: Factor
    lora_dropout: nn.Dropout
    lora_scale: float

    def stock_forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer without LoRA, [..., I] -> [..., O]."""
        return self.stock.forward(self, x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer, [..., I] -> [..., O]."""
        if current_depth() == 1:
            return self.stock_forward(x)
        if (y := fast.adapted(x, self)) is not None:
            return y
        y = self.stock_forward(x)
        if self.training:
            check_gradient(self, x, y)
        x = x.to(self.lora_A.weight.dtype)  # LoRA may be float32 beside a half-precision base, as in PEFT
        low = self.lora_B(self.lora_A(self.lora_dropout(x) if self.training else x))
        return torch.add(y, low.to(y.dtype), alpha=self.lora_scale)


class LoRALinear(DepthLoRA, nn.Linear):
    """`nn.Linear` with LoRA by depth."""

    stock = nn.Linear


class LoRAConv1D(DepthLoRA, Conv1D):
    """GPT-2's transposed linear layer with LoRA by depth."""

    stock = Conv1D


_KINDS: dict[type, type] = {nn.Linear: LoRALinear, Conv1D: LoRAConv1D}


@cache
def _over(stock: Any) -> type:
    """Return the class of a quantised layer with LoRA by depth.

    Its first base is the layer's class, since Python lets an object change to a class of the same layout only.
    """
    own = {"stock": stock, "forward": DepthLoRA.forward, "__module__": __name__}
    return type(f"LoRA{stock.__name__}", (stock, DepthLoRA), own)


def is_target(name: str, targets: Iterable[str] | None) -> bool:
    """Return whether a layer of the base is among `targets`.

    Args:
        name: Name of the layer in the base.
        targets: Whole names, or the ends of names after a dot, as in PEFT. None: every layer is a target.
    """
    if targets is None:
        return True
    parts = name.split(".")
    return not {".".join(parts[at:]) for at in range(len(parts))}.isdisjoint(targets)


def widths(linear: nn.Module) -> tuple[int, int]:
    """Return (I, O) of an `nn.Linear`, a `Conv1D` or a quantised layer."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features  # type: ignore[return-value]


def add_lora(
    decoder: nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    prefix: str = "",
) -> list[str]:
    """Add LoRA to linear layers below `decoder`, in place, and return their names.

    Quantised layers are linear layers, too. LoRA has the dtype of its layer's weight, and beside integers that in which
    the decoder computes.

    Args:
        decoder: The base without its output head.
        rank: Rank r > 0.
        alpha: Numerator of the scale alpha / rank.
        dropout: Dropout on the input of A, in training only.
        targets: Names of the layers, or the ends of names (`is_target`). None: every linear layer.
        prefix: Prefix of names below `decoder` in the base, for targets that are whole names.

    Raises:
        ValueError: No linear layer has the name of a target, or the decoder has no linear layers.
    """
    adapted: list[str] = []
    for name, module in list(decoder.named_modules()):
        # Exact types, or quantised: any other subclass, such as a router, has another forward.
        stock: Any = type(module)
        kind = _KINDS.get(stock) or (_over(stock) if is_quantised_layer(module) else None)
        if kind is None or not is_target(prefix + name, targets):
            continue
        inputs, outputs = widths(module)
        tensor = next(its for its in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        floats = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        factory: Any = {"device": tensor.device, "dtype": tensor.dtype if floats else compute_dtype(decoder)}
        lora = {
            "lora_A": Factor(inputs, rank, **factory),
            "lora_B": Factor(rank, outputs, **factory),
            "lora_dropout": nn.Dropout(dropout),
        }
        module.__class__ = kind
        renew_hooked_forward(module)
        for child, layer in lora.items():
            mark_initialized(layer)  # otherwise the base initialises B like any linear layer
            module.add_module(child, layer)
        module.lora_scale = alpha / rank
        reset_lora(module)
        adapted.append(name)
    missing = [target for target in targets or () if not any(is_target(prefix + name, [target]) for name in adapted)]
    if missing:
        raise ValueError(f"lora_targets {sorted(set(missing))}: the base has no linear layer of that name")
    if not adapted:
        raise ValueError("the base has no nn.Linear or Conv1D layer to adapt; use lora_rank=0")
    return adapted


@torch.no_grad()
def reset_lora(module: nn.Module) -> None:
    """Initialise the LoRA of one layer as PEFT does: A Kaiming-uniform, B zero."""
    if not module.lora_A.weight.is_meta:  # type: ignore[union-attr]
        nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))  # type: ignore[union-attr,arg-type]
        nn.init.zeros_(module.lora_B.weight)  # type: ignore[union-attr,arg-type]
