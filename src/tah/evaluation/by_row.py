"""Generation in which the rows of a batch do not disturb each other: own random numbers, own ends.

Shapes: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import StopStringCriteria, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


class SampleByRow(LogitsProcessor):
    """Draws the next token of each row with that row's own random numbers: its neighbours do not matter.

    It leaves a single token possible, and `generate` takes that.

    Args:
        seeds: [B].
        prompt: tokens of the padded prompts.
        steps: most tokens to draw.
    """

    def __init__(
        self, seeds: Sequence[int], prompt: int, steps: int, *, temperature: float, top_p: float, top_k: int
    ) -> None:
        self.prompt = prompt
        rows = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.draws = torch.stack([torch.rand(steps, generator=row) for row in rows])  # [B, steps]
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mass = self.warpers(input_ids, scores).float().softmax(-1).cumsum(-1)  # [B, V]
        whole = mass[:, -1:].clone()
        draw = self.draws[:, input_ids.shape[1] - self.prompt, None].to(mass.device) * whole
        last = (mass < whole).sum(1, keepdim=True)  # the last token with any probability: rounding leads no further
        chosen = torch.searchsorted(mass, draw, right=True).minimum(last)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class RowEnds(StoppingCriteria):
    """Ends each row at an end token or a stop string, and remembers how long it was.

    Attributes:
        lengths: [B] tokens produced, the end included; 0 while a row goes on.
    """

    def __init__(self, rows: int, prompt: int, ends: Sequence[int], stop: StopStringCriteria | None) -> None:
        self.prompt, self.ends, self.stop = prompt, torch.tensor(ends), stop
        self.lengths = torch.zeros(rows, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        produced = input_ids[:, self.prompt :]
        over = torch.isin(produced[:, -1], self.ends.to(produced.device))
        if self.stop is not None:
            over |= self.stop(produced, scores)
        self.lengths[(over.cpu()) & (self.lengths == 0)] = produced.shape[1]
        return (self.lengths > 0).to(produced.device)
