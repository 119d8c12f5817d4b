"""The layers of a pass at depth 2: the base's weights with LoRA (method.md (6)) and duo-causal attention.

Each stock layer has a twin: a second module object with the same submodules, except that LoRA wraps the adapted linear
layers and `DuoAttention` replaces the attention. Depth 1 runs the unchanged stock layers, compiled or not.

Shapes: M tokens, I input width, O output width, r rank, n linear layers that vLLM fused into one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear

from ..core.lora import is_target
from .attention import Current, DuoAttention
from .names import Family


class Share(NamedTuple):
    """The part of a weight that one process has under tensor parallelism: part `number` of `of` equal parts."""

    number: int
    of: int

    def __call__(self, weight: Tensor, dim: int) -> Tensor:
        size = weight.shape[dim] // self.of
        return weight.narrow(dim, self.number * size, size)


Pieces = list[tuple[int, Share]]  # output width in this process and share of the outputs, of what a layer fuses


class Adapter(nn.Module):
    """LoRA of one linear layer of vLLM, which may fuse several layers of the checkpoint; the part of this process.

    Args:
        parts: Pieces of the outputs, by name in the checkpoint, of each of the n fused layers. A layer that is fused in
            the checkpoint, too, has several.
        inputs: Input width I of this process.
        share: Share of the inputs.
        rank: Rank r.
        scale: Scale of the update, alpha / r; `load` multiplies B by it.
    """

    def __init__(self, parts: dict[str, Pieces], inputs: int, share: Share, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, self.share, self.ranges, start = scale, share, {}, 0
        self.pieces = parts
        for number, (name, pieces) in enumerate(parts.items()):
            width = sum(width for width, _ in pieces)
            self.ranges[name] = (slice(number * rank, (number + 1) * rank), slice(start, start + width))
            start += width
        self.A = nn.Parameter(torch.zeros(len(parts) * rank, inputs), requires_grad=False)
        self.B = nn.Parameter(torch.zeros(rank, start), requires_grad=False)  # transposed: faster for few tokens

    def load(self, part: str, matrix: str, weight: Tensor) -> None:
        """Copy this process's part of `lora_A` [r, I] or `lora_B` [O, r] of one fused layer.

        Args:
            part: Name of the fused layer in the checkpoint.
            matrix: `lora_A` or `lora_B`.
            weight: Whole matrix.
        """
        low, out = self.ranges[part]
        if matrix == "lora_A":
            self.A.data[low].copy_(self.share(weight, 1))
        else:
            pieces = self.pieces[part]
            whole = weight.split([width * share.of for width, share in pieces])
            mine = torch.cat([share(piece, 0) for piece, (_, share) in zip(whole, pieces, strict=True)])
            self.B.data[:, out].copy_((mine * self.scale).t())

    def forward(self, x: Tensor) -> Tensor:
        """Return the update [M, O] of the outputs for inputs [M, I]."""
        y = x @ self.A.t()  # one product for all parts, which have the same input
        if self.share.of > 1:
            y = tensor_model_parallel_all_reduce(y)
        parts = [y[:, low] @ self.B[:, out] for low, out in self.ranges.values()]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class Adapted(nn.Module):
    """A linear layer of vLLM with LoRA; the calling convention is that of vLLM's linear layers."""

    def __init__(self, linear: LinearBase, adapter: Adapter, current: Current) -> None:
        super().__init__()
        self.linear, self.adapter, self.current = linear, adapter, current

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out, bias = self.linear(x)
        rows = self.current.deep.rows if self.current.deep is not None else None
        if rows is None:
            return out.add_(self.adapter(x)), bias
        return out.index_add_(0, rows, self.adapter(x[rows])), bias


def adapters_of(
    layer: nn.Module, fused: dict[str, list[str]], rank: int, scale: float, targets: list[str] | None, prefix: str = ""
) -> Iterator[tuple[str, Adapter]]:
    """Yield name and adapter of every linear layer in `layer` of which `targets` contains a part.

    Routers of experts, which every process has whole, are no linear layers for LoRA (`lora.add_lora`).

    Args:
        layer: Stock decoder layer.
        fused: Names in the checkpoint, by name of the fused layer in vLLM.
        rank: Rank r.
        scale: Scale of the update.
        targets: Target names, as in `lora.is_target`.
        prefix: Prefix of the names of `layer` in the checkpoint's base.
    """
    for name, module in layer.named_modules():
        if not isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            continue
        parent, _, leaf = name.rpartition(".")
        path = f"{prefix}{parent}." if parent else prefix
        names, mine = fused.get(leaf, [leaf]), Share(module.tp_rank, module.tp_size)
        if not any(is_target(path + part, targets) for part in names):
            continue
        whole = Share(0, 1)
        if isinstance(module, RowParallelLinear):
            parts = {names[0]: [(module.output_size, whole)]}
            yield name, Adapter(parts, module.input_size_per_partition, mine, rank, scale)
            continue
        copies = getattr(module, "num_kv_head_replicas", 1)  # number of processes with the same key/value heads
        sizes = module.output_partition_sizes
        shares = [mine, *[Share(mine.number // copies, mine.of // copies)] * (len(sizes) - 1)]
        pieces = list(zip(sizes, shares, strict=True))
        each = len(pieces) // len(names)
        parts = {part: pieces[k * each : (k + 1) * each] for k, part in enumerate(names)}
        yield name, Adapter(parts, module.input_size, whole, rank, scale)


def twin(
    module: nn.Module,
    adapters: dict[str, Adapter],
    layer: int,
    current: Current,
    prefix: str = "",
    attention: Callable[[Attention, int, Current], nn.Module] = DuoAttention,
) -> nn.Module:
    """Return a copy of `module` with adapters and with other attention; all other submodules are shared.

    Args:
        module: Stock layer, or a part of it.
        adapters: Adapters by name in the layer.
        layer: Number of the layer.
        current: Holder of the running pass.
        prefix: Prefix of the names in `module`.
        attention: What makes an attention layer of a stock one, of the layer's number and of `current`.
    """
    other = copy.copy(module)
    other._modules = dict(module._modules)
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path in adapters:
            other._modules[name] = Adapted(child, adapters[path], current)
        elif isinstance(child, Attention):
            other._modules[name] = attention(child, layer, current)
        elif next(child.children(), None) is not None:
            other._modules[name] = twin(child, adapters, layer, current, f"{path}.", attention)
    return other


def run_layers(
    layers: list[nn.Module],
    norm: nn.Module,
    family: Family,
    positions: Tensor,
    x: Tensor,
    wanted: Collection[int] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run layers of one depth, which the stock model runs in the same way.

    Args:
        layers: Layers.
        norm: Final norm of the stock model.
        family: Family of the base.
        positions: Positions [M].
        x: Input of the first layer [M, D]; layers may write into it.
        wanted: Numbers of layers, above 0, whose inputs are returned.

    Returns:
        Normed hidden states [M, D], and by number the inputs [M, D] of the layers in `wanted`.
    """
    residual: Any = None
    seen = {}
    for number, layer in enumerate(layers):
        if number in wanted:
            seen[number] = x + residual if family.residual else x
        if family.residual:
            x, residual = layer(positions, x, residual)
        else:
            x = layer(positions, x)
    return norm(x, residual)[0] if family.residual else norm(x), seen
