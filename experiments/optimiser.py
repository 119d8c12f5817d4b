"""Provide Muon for the matrices of the base and AdamW for the other parameters, the adapter among them.

`torch.optim.Muon` orthogonalises in bfloat16. Processors without bfloat16 instructions emulate it, far slower than
float32. From width 128 on, this took most of a training. `Muon` below makes the same update in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tah import TaHForCausalLM

OPTIMISER = "Muon in float32 for the base, AdamW"  # entry in the settings of a run
MUON = 0.02  # peak learning rate of the matrices of the base
A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5  # coefficients and steps of the iteration, as in torch.optim.Muon


class Muon(torch.optim.Optimizer):
    """Make the update of `torch.optim.Muon`, with its momentum, in the precision of the parameters."""

    def __init__(self, parameters: Iterable[Parameter], rate: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonal(gradient.lerp(mean, group["momentum"]))
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix with orthonormal rows or columns (Newton-Schulz iteration of degree five)."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonAdamW(torch.optim.Optimizer):
    """Apply Muon to the matrices of the base and AdamW to the other parameters; one schedule scales both rates.

    AdamW trains embeddings, norms and the adapter: LoRA, linear maps U and Z, and decider. With LoRA's A and B in Muon
    the second pass learns nothing (`test_a_second_pass_with_lora_learns_a_second_hop`).

    Args:
        model: Model with the parameters to train.
        rate: Peak learning rate of AdamW.
    """

    def __init__(self, model: TaHForCausalLM, rate: float) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        inner = [
            p
            for name, p in model.base.named_parameters()
            if p.requires_grad and p.ndim == 2 and "embed_tokens" not in name and "lora_" not in name
        ]
        chosen = {id(p) for p in inner}
        rest = [p for p in trained if id(p) not in chosen]
        super().__init__(trained, {})
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, rate, (0.9, 0.98), weight_decay=0.01)]
        if inner:
            self.parts.append(Muon(inner, MUON, weight_decay=0.01))
        self.param_groups = self._inner()  # a schedule changes these; accelerate replaces them by copies

    def _inner(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group, inner in zip(self.param_groups, self._inner(), strict=True):
            inner["lr"] = group["lr"]
        for part in self.parts:
            part.step()
