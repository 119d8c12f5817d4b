"""Two computations of the same tokens: how far apart they may be, and where they differ.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.quantised import is_quantised
from ..model import TaHForCausalLM


@dataclass(frozen=True)
class Tolerance:
    """How far apart two computations of the same tokens may be, because sums are rounded in another order.

    Args:
        logits: Largest norm of the difference of a token's logits, without their mean, divided by their norm.
        decision: Largest distance of a continue probability from the threshold, and from the other computation, at
            which a decision may differ.
        lead: Largest lead of a best token over another, divided by the largest logit without the mean, at which that
            one may be best.
    """

    logits: float
    decision: float
    lead: float


# Logits are as far apart as in the probe of `core/families.py`: rounding in a deep bfloat16 model reaches a tenth of
# the norm, and a wrong mask reaches the norm. docs/how-to/doctor.md has this table.
TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-3, 1e-4),
    torch.float16: Tolerance(0.05, 0.05, 0.01),
    torch.bfloat16: Tolerance(0.3, 0.05, 0.05),
}


def tolerance_of(model: TaHForCausalLM) -> Tolerance:
    """Return the tolerance for the data type of a model. A base with 8- or 4-bit layers has that of bfloat16."""
    if is_quantised(model.base):
        return TOLERANCES[torch.bfloat16]
    return TOLERANCES.get(model.dtype, TOLERANCES[torch.float32])


@dataclass(frozen=True)
class Tokens:
    """What a model computed for tokens.

    Args:
        logits: Logits [B, T, V].
        depths: Passes [B, T] that each token took.
        probability: Continue probabilities [B, T, max_depth - 1], nan where there was no decision.
    """

    logits: Tensor
    depths: Tensor
    probability: Tensor

    @classmethod
    def of(cls, out: Any, columns: slice = slice(None)) -> Tokens:
        """Return the tokens of an output of the model, without the columns of padding."""
        probability = out.continue_logits.float().sigmoid()
        return cls(out.logits[:, columns].float(), out.depth_count[:, columns], probability[:, columns])

    @classmethod
    def joined(cls, parts: list[Tokens], dim: int) -> Tokens:
        """Return the tokens of several outputs as those of one: further rows (0) or further tokens (1)."""
        logits, depths, probability = zip(
            *((part.logits, part.depths, part.probability) for part in parts), strict=True
        )
        return cls(torch.cat(logits, dim), torch.cat(depths, dim), torch.cat(probability, dim))


@dataclass
class Comparison:
    """The differences of two computations of the same tokens.

    Args:
        tokens: Number of tokens.
        iterated: Number of tokens of the second computation that took more than one pass.
        compared: Number of tokens whose logits were compared. Those from a close decision on are not, because their
            keys differ.
        difference: Largest difference of a token's logits, without their mean, relative to their norm.
        close: Number of decisions that differ within the tolerance.
        wrong_depths: Number of tokens whose depth differs for another reason.
        wrong_best: Number of tokens whose most probable next token differs by more than rounding.
    """

    tokens: int = 0
    iterated: int = 0
    compared: int = 0
    difference: float = 0.0
    close: int = 0
    wrong_depths: int = 0
    wrong_best: int = 0

    def add(self, got: Tokens, want: Tokens, tolerance: Tolerance, threshold: float | None) -> None:
        """Compare two computations of the same tokens.

        Args:
            got: One computation.
            want: The other one.
            tolerance: How far apart they may be.
            threshold: Threshold of the decisions, or None if they are drawn or certain.
        """
        self.tokens += want.depths.numel()
        self.iterated += int((want.depths > 1).sum())
        differs = (got.depths != want.depths).tolist()
        for row, its in enumerate(differs):
            first = its.index(True) if True in its else len(its)
            if first < len(its):
                if _is_close(got, want, row, first, tolerance, threshold):
                    self.close += 1
                else:
                    self.wrong_depths += sum(its)
            self._add_logits(got.logits[row, :first], want.logits[row, :first], tolerance)

    def _add_logits(self, got: Tensor, want: Tensor, tolerance: Tolerance) -> None:
        """Compare logits [n, V] of the same n tokens.

        Each token's mean is subtracted, because it changes no probability. Log-probabilities, the logits of a mixture,
        have a mean of about -log V, beside which their differences would look small.
        """
        if not len(want):
            return
        self.compared += len(want)
        got, want = (logits - logits.mean(-1, keepdim=True) for logits in (got, want))
        apart = ((got - want).norm(dim=-1) / want.norm(dim=-1)).nan_to_num(torch.inf)
        self.difference = max(self.difference, float(apart.max()))
        best, other = want.argmax(-1, keepdim=True), got.argmax(-1, keepdim=True)
        lead = (want.gather(-1, best) - want.gather(-1, other)).squeeze(-1) / want.abs().amax(-1)
        self.wrong_best += int((lead > tolerance.lead).sum())

    def right(self, tolerance: Tolerance) -> bool:
        """Return whether the two computations agree."""
        return self.difference <= tolerance.logits and not self.wrong_depths and not self.wrong_best

    def text(self, tolerance: Tolerance) -> str:
        """Return the comparison in words."""
        parts = [
            f"{self.tokens} tokens, {self.iterated} iterated",
            f"logits differ by {self.difference:.1e} (at most {tolerance.logits:.0e})",
        ]
        if self.wrong_depths:
            parts.append(f"{self.wrong_depths} other depths")
        if self.wrong_best:
            parts.append(f"{self.wrong_best} other best tokens")
        if self.close:
            left = self.tokens - self.compared
            parts.append(f"{self.close} decisions within {tolerance.decision}, {left} tokens after them not compared")
        return "; ".join(parts)

    def values(self, tolerance: Tolerance) -> dict[str, Any]:
        """Return the numbers of the comparison, for JSON."""
        return {**asdict(self), "tolerance": asdict(tolerance)}


def _is_close(got: Tokens, want: Tokens, row: int, token: int, tolerance: Tolerance, threshold: float | None) -> bool:
    """Return whether rounding explains that the depths of a token differ.

    The two continue probabilities of its last common pass are then close to each other and to the threshold. They are
    not equal, because equal probabilities give equal decisions.
    """
    depth = int(min(got.depths[row, token], want.depths[row, token]))
    a, b = (float(each.probability[row, token, depth - 1]) for each in (got, want))
    near = threshold is None or max(abs(a - threshold), abs(b - threshold)) <= tolerance.decision
    return near and 0 < abs(a - b) <= tolerance.decision
