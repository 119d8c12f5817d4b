"""The base's output head: final hidden states to logits.

Shapes: ... any leading dimensions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .quantised import is_packed


@dataclass
class Head:
    """Final hidden states [..., D] to logits [..., V], exactly as the base's own forward computes them.

    These are the output embedding, a scale and a soft-cap: `softcap * tanh(scale * (W h + b) / softcap)`.

    Args:
        linear: Output embedding of the base.
        scale: Factor of the logits.
        divide: Divisor of the logits.
        softcap: Soft-cap of the logits, or None.
    """

    linear: nn.Module
    scale: float = 1.0
    divide: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of final hidden states [..., D]."""
        return self.finish(self.linear(hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """Apply scale and soft-cap to the product with the output embedding, [..., V]."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.divide != 1.0:
            logits = logits / self.divide
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def size(self) -> int:
        """Return the number V of logits of a token."""
        linear: Any = self.linear  # an `nn.Linear`, or a layer that replaces one
        return int(linear.out_features)

    @property
    def is_linear(self) -> bool:
        """Return whether the head of a sum is the sum of heads, so that a sum of hidden states can hold (2)."""
        return self.softcap is None and getattr(self.linear, "bias", None) is None

    @property
    def is_single_matrix(self) -> bool:
        """Return whether logits are one plain matrix times a hidden state, without a bias or a soft-cap."""
        return self.is_linear and type(self.linear) is nn.Linear and not is_packed(self.linear.weight)
