"""The logits of a step's tokens, for all who ask: the policy, the next input of hard tokens, and vLLM's sampler.

Shapes: T tokens of the step, N tokens asked for, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..outputs import CHUNK

Head = Callable[[Tensor], Tensor]


class StepLogits:
    """Logits made when somebody asks, and kept where the sampler will ask for all of them anyway.

    While decoding, the head is a large part of what a step reads, and reading it for two hard tokens costs about as
    much as for all of them.

    Args:
        head: hidden states [n, D] to logits [n, V].
        hidden: [T, D] final hidden states.
        keep: every token is the one that the sampler draws for, so [T, V] exists in any case.
    """

    def __init__(self, head: Head, hidden: Tensor, keep: bool) -> None:
        self.head, self.hidden, self.keep = head, hidden, keep
        self.kept: Tensor | None = None  # [T, V]

    def map(self, index: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """`f`: [n, V] -> [n, ...] of the logits of the tokens `index` [N], `CHUNK` of them at a time."""
        if not self.keep:
            return torch.cat([f(self.head(part)) for part in self.hidden[index].split(CHUNK)])
        if self.kept is None:
            self.kept = self.head(self.hidden)
        return torch.cat([f(self.kept[part]) for part in index.split(CHUNK)])

    def update(self, index: Tensor, hidden: Tensor) -> None:
        """The tokens `index` [N] have other final hidden states [N, D] since their second pass."""
        if self.kept is not None:
            self.kept[index] = self.head(hidden)
