"""The output of TaH2 in a step: log-probabilities of the mixture of each token's passes, method.md (15).

vLLM selects rows of the hidden states of a step and asks the model for their logits. A token with two passes has two
hidden states and a weight. For the sampler the step computes its output itself, since the host knows which tokens have
a second pass. For the log-probabilities of a prompt, the rows carry all three.

Shapes: T tokens of the step, R requests, M tokens with a second pass, n rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..core.logits import CHUNK
from ..core.mixture import SMALLEST
from .logits import StepLogits
from .transfer import indices

Head = Callable[[Tensor], Tensor]


class StepMixture(StepLogits):
    """Log-probabilities of a step's tokens, where `StepLogits` has sums of logits.

    Args:
        head: Function from hidden states [n, D] to logits [n, V].
        hidden: Final hidden states [T, D] of depth 1.
        last: Index of each request's last token in the step, [R], rising.
        even: Whether both passes of a token have the same weight, instead of weights by continue probability.
    """

    def __init__(self, head: Head, hidden: Tensor, last: np.ndarray, even: bool) -> None:
        super().__init__(head, hidden, last)
        self.even = even
        self.second: list[tuple[np.ndarray, Tensor, Tensor]] = []  # tokens [M], hidden states [M, D], weights [M]

    def map(self, index: np.ndarray, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """Return `f` of the log-probabilities after depth 1 of the tokens `index`, as `map_pass` does of logits."""
        return self.map_pass(index, lambda logits: f(_log_softmax(logits)))

    def add(self, index: np.ndarray, second: Tensor, probability: Tensor) -> None:
        weight = torch.full_like(probability, 0.5) if self.even else probability
        self.second.append((index, second, weight))

    def of_last(self) -> Tensor:
        """Return log-probabilities [R, V] float32 of the last tokens, as a new tensor; the host does not wait.

        The head runs a second time for those of them that have a second pass.
        """
        found = _log_softmax(self.head(self.rows(self.hidden, self.last)) if self.kept is None else self.kept)
        for index, second, weight in self.second:
            request = self.request[index]
            own = np.flatnonzero(request >= 0)
            for start in range(0, len(own), CHUNK):
                part = own[start : start + CHUNK]
                at, rows = indices(found.device, request[part], part)
                found[at] = mixed(found[at], self.head(second[rows]), weight[rows])
        return found

    def output(self, for_prompts: bool) -> Tensor:
        """Return the rows from which vLLM chooses, [T, D]; or, for prompts, [T, 2 D + 2] or [T, 2 D + 1].

        The latter have the hidden states of depth 1 and of depth 2 and the weight of depth 2, as the bytes of a float32
        number. In a row without a second pass, the latter two are 0. (No second pass has the weight 0: a token iterates
        if its continue probability is larger than a number that is at least 0.)
        """
        if not for_prompts or not self.second:
            return self.hidden
        deeper, weights = torch.zeros_like(self.hidden), self.hidden.new_zeros(len(self.hidden), 1, dtype=torch.float32)
        for index, second, weight in self.second:
            (at,) = indices(deeper.device, index)
            deeper[at], weights[at, 0] = second.to(deeper.dtype), weight
        return torch.cat([self.hidden, deeper, weights.view(deeper.dtype)], dim=1)


def log_probabilities(head: Head, rows: Tensor, width: int) -> Tensor:
    """Return log-probabilities [n, V] float32 of rows that `StepMixture.output` returned, without much more in memory.

    The head runs a second time for the rows that have a second pass. The host waits to learn which these are, unless
    the rows have depth 1 only.

    Args:
        head: Function from hidden states [n, D] to logits [n, V].
        rows: Rows of one of the widths.
        width: Width D.
    """
    found: Tensor | None = None
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        logp = _log_softmax(head(part[:, :width].contiguous()))
        if part.shape[1] > width:
            weight = part[:, 2 * width :].contiguous().view(torch.float32).squeeze(1)
            hit = weight.nonzero().squeeze(1)
            if len(hit):
                logp[hit] = mixed(logp[hit], head(part[hit, width : 2 * width]), weight[hit])
        if len(part) == len(rows):
            return logp
        found = logp.new_empty(len(rows), logp.shape[1]) if found is None else found
        found[start : start + CHUNK] = logp
    assert found is not None
    return found


def mixed(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Return log-probabilities [n, V] float32 of mixtures of two passes.

    Args:
        first: Log-probabilities [n, V] float32 of depth 1.
        second: Logits [n, V] of depth 2.
        weight: Weight [n] float32 of depth 2.
    """
    one, two = torch.stack([1 - weight, weight]).clamp(min=SMALLEST).log()[..., None]
    return torch.logaddexp(first + one, _log_softmax(second) + two)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.float32)
