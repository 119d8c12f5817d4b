"""Logits of a step's tokens, for the policy, for the next input of hard tokens, and for vLLM's sampler.

Shapes: T tokens of the step, R requests, N requested tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..core.logits import CHUNK
from .transfer import indices


class StepLogits:
    """Logits, computed on demand; those of each request's last token are kept, since the sampler needs them.

    In decoding, the head is a large part of the weights that a step reads. To run it for two hard tokens costs about as
    much as for the last tokens of all requests.

    Tokens are named by arrays of the host, so that no choice waits for the device.

    Args:
        head: Function from hidden states [n, D] to logits [n, V].
        hidden: Final hidden states [T, D].
        last: Index of each request's last token in the step, [R], rising.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], hidden: Tensor, last: np.ndarray) -> None:
        self.head, self.hidden, self.last = head, hidden, last
        self.request = np.full(len(hidden), -1)  # [T] request of a last token, else -1
        self.request[last] = np.arange(len(last))
        self.kept: Tensor | None = None  # [R, V]

    def rows(self, x: Tensor, index: np.ndarray) -> Tensor:
        """Return the rows `index` [N], distinct and rising, of `x` [n, ...]; `x` itself if these are all rows."""
        return x if len(index) == len(x) else x[indices(x.device, index)[0]]

    def map(self, index: np.ndarray, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """Return `f` of the accumulated logits of the tokens `index` [N], which are those of depth 1.

        Args:
            index: Tokens, [N], distinct and rising.
            f: Function [n, V] -> [n, ...].
            ahead: Hint of a policy (`DepthState.map_logits`), which has no effect here.
        """
        return self.map_pass(index, f)

    def map_pass(self, index: np.ndarray, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `f` of the logits of depth 1 of the tokens `index` [N], computed for `CHUNK` tokens at a time.

        Args:
            index: Tokens, [N], distinct and rising.
            f: Function [n, V] -> [n, ...].
        """
        request = self.request[index]
        is_last = request >= 0
        parts = []  # results of the last tokens, then of the others
        if is_last.any():
            if self.kept is None:
                self.kept = self.head(self.rows(self.hidden, self.last))
            parts += [f(part) for part in self.rows(self.kept, request[is_last]).split(CHUNK)]
        if not is_last.all():
            others = self.rows(self.hidden, index[~is_last])
            parts += [f(self.head(part)) for part in others.split(CHUNK)]
        found = torch.cat(parts) if len(parts) > 1 else parts[0]
        if is_last.all() or not is_last.any():
            return found
        back = (~is_last).argsort(kind="stable").argsort()  # restores the order of `index`
        return found[indices(found.device, back)[0]]

    def add(self, index: np.ndarray, second: Tensor, probability: Tensor) -> None:
        """Add the pass at depth 2 of some tokens, which no policy and no next input of this step reads.

        Args:
            index: Tokens, [M], distinct and rising.
            second: Their contributions to the final hidden states, [M, D].
            probability: Their continue probabilities [M] float32, by which a mixture weighs.
        """
        (at,) = indices(self.hidden.device, index)
        self.hidden = self.hidden.index_add(0, at, second)  # a new tensor: the old may be a buffer of a CUDA graph
        request = self.request[index]
        is_last = request >= 0
        if self.kept is not None and is_last.any():
            at, rows = indices(self.kept.device, request[is_last], index[is_last])
            self.kept[at] = self.head(self.hidden[rows])

    def of_last(self) -> Tensor | None:
        """Return the logits [R, V] of the last tokens, if they are known."""
        return self.kept

    def output(self, for_prompts: bool) -> Tensor:
        """Return the rows from which vLLM chooses those whose logits it requests: the final hidden states [T, D].

        Args:
            for_prompts: Whether it requests logits of other tokens than the last ones.
        """
        return self.hidden
