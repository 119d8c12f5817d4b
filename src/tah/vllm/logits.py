"""The logits of a step's tokens, for all who ask: the policy, the next input of hard tokens, and vLLM's sampler.

Shapes: T tokens of the step, R requests, N tokens asked for, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.logits import CHUNK


class StepLogits:
    """Logits made when somebody asks, and kept where the sampler will ask anyway: for each request's last token.

    While decoding, the head is a large part of what a step reads, and reading it for two hard tokens costs about as
    much as for all of them.

    Args:
        head: hidden states [n, D] to logits [n, V].
        hidden: [T, D] final hidden states.
        last: [R] each request's last token in the step.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], hidden: Tensor, last: Tensor) -> None:
        self.head, self.hidden, self.last = head, hidden, last
        self.request = torch.full((len(hidden),), -1, device=last.device)  # [T] whose last token it is, or -1
        self.request[last] = torch.arange(len(last), device=last.device)
        self.kept: Tensor | None = None  # [R, V]

    def map(self, index: Tensor, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """`f`: [n, V] -> [n, ...] of the logits of the tokens `index` [N], `CHUNK` of them at a time.

        `ahead`, a hint of a policy (`DepthState.map_logits`), changes nothing here.
        """
        request = self.request[index]
        is_last = request >= 0
        parts = []  # of the last tokens, of the others
        if is_last.any():
            if self.kept is None:
                self.kept = self.head(self.hidden[self.last])
            parts += [f(self.kept[part]) for part in request[is_last].split(CHUNK)]
        if not is_last.all():
            parts += [f(self.head(part)) for part in self.hidden[index[~is_last]].split(CHUNK)]
        found = torch.cat(parts)
        back = (~is_last).long().argsort(stable=True).argsort()  # from the two kinds apart to the order asked for
        return found[back]

    def update(self, index: Tensor, hidden: Tensor) -> None:
        """The tokens `index` [N] have other final hidden states [N, D] since their second pass."""
        request = self.request[index]
        is_last = request >= 0
        if self.kept is not None and is_last.any():
            self.kept[request[is_last]] = self.head(hidden[is_last])
