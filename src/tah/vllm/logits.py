"""Logits of a step's tokens, for the policy, for the next input of hard tokens, and for vLLM's sampler.

Shapes: T tokens of the step, R requests, N requested tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.logits import CHUNK


class StepLogits:
    """Logits, computed on demand; those of each request's last token are kept, since the sampler needs them.

    In decoding, the head is a large part of the weights that a step reads. To run it for two hard tokens costs about as
    much as for the last tokens of all requests.

    Args:
        head: Function from hidden states [n, D] to logits [n, V].
        hidden: Final hidden states [T, D].
        last: Index of each request's last token in the step, [R].
    """

    def __init__(self, head: Callable[[Tensor], Tensor], hidden: Tensor, last: Tensor) -> None:
        self.head, self.hidden, self.last = head, hidden, last
        self.request = torch.full((len(hidden),), -1, device=last.device)  # [T] request of a last token, else -1
        self.request[last] = torch.arange(len(last), device=last.device)
        self.kept: Tensor | None = None  # [R, V]

    def map(self, index: Tensor, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """Return `f` of the logits of the tokens `index` [N], computed for `CHUNK` tokens at a time.

        Args:
            index: Tokens, [N].
            f: Function [n, V] -> [n, ...].
            ahead: Hint of a policy (`DepthState.map_logits`), which has no effect here.
        """
        request = self.request[index]
        is_last = request >= 0
        parts = []  # results of the last tokens, then of the others
        if is_last.any():
            if self.kept is None:
                self.kept = self.head(self.hidden[self.last])
            parts += [f(self.kept[part]) for part in request[is_last].split(CHUNK)]
        if not is_last.all():
            parts += [f(self.head(part)) for part in self.hidden[index[~is_last]].split(CHUNK)]
        found = torch.cat(parts)
        back = (~is_last).long().argsort(stable=True).argsort()  # restores the order of `index`
        return found[back]

    def update(self, index: Tensor, hidden: Tensor) -> None:
        """Replace the kept logits of the tokens `index` [N], given their hidden states [N, D] after the second pass."""
        request = self.request[index]
        is_last = request >= 0
        if self.kept is not None and is_last.any():
            self.kept[request[is_last]] = self.head(hidden[is_last])
