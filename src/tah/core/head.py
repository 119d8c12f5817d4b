"""The base's output head: final hidden states to logits.

Shapes: ... any leading dimensions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Head:
    """Final hidden states [..., D] -> logits [..., V], exactly as the base's own forward computes them.

    That is its output embedding, then a scale, then a soft-cap: `softcap * tanh(scale * (W h + b) / softcap)`.
    """

    linear: nn.Module
    scale: float = 1.0
    divide: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]"""
        return self.finish(self.linear(hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """What the base does to the product with its output embedding, [..., V]."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.divide != 1.0:
            logits = logits / self.divide
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def is_linear(self) -> bool:
        """Whether the head of a sum is the sum of heads, so that summed logits can be carried as summed states."""
        return self.softcap is None and getattr(self.linear, "bias", None) is None

    @property
    def is_single_matrix(self) -> bool:
        """Whether logits are one matrix times a hidden state and nothing else."""
        return self.is_linear and type(self.linear) is nn.Linear
