"""Hard tokens that wait for the next step, where they run at depth 2 beside others' depth 1 (`batching="mixed"`).

Those of a prompt's chunk run as rows that are added to the step. The one that decides what a request says next is a row
of the step itself: the scheduler has it computed once more, and the request says nothing before.

Shapes: M tokens, N physical blocks, D width, T tokens of the step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .attention import DeepTokens


@dataclass
class Waiting:
    """Tokens of one request. They have their entries in the pool already, and no keys there yet."""

    positions: Tensor  # [M]
    slots: Tensor  # [M] where their depth-1 keys are
    embeds: Tensor  # [M, D] their inputs at depth 2
    blocks: Tensor  # [N] the request's, up to the last of the tokens
    shared: int  # tokens of the request in full blocks, which others may find in the prefix cache
    hidden: Tensor | None  # [D] what depth 1 ended in at the last token, if that decides what the request says next

    def part(self, tokens: slice, hidden: Tensor | None) -> Waiting:
        positions, slots, embeds = self.positions[tokens], self.slots[tokens], self.embeds[tokens]
        return replace(self, positions=positions, slots=slots, embeds=embeds, hidden=hidden)


class WaitingTokens:
    """Of all requests.

    Requests that are gone leave theirs in full blocks, which have to run nevertheless: who finds a depth-1 key in the
    prefix cache relies on the depth-2 key.
    """

    def __init__(self) -> None:
        self.by_request: dict[str, Waiting] = {}
        self.left: list[Waiting] = []

    def deferred(self) -> list[str]:
        """Requests that say nothing before their newest token has run again."""
        return list(self.hidden())

    def hidden(self) -> dict[str, Tensor]:
        """What depth 1 ended in [D] at those tokens."""
        return {request: one.hidden for request, one in self.by_request.items() if one.hidden is not None}

    def leave(self, request: str) -> None:
        """It ended, or will run from the start."""
        one = self.by_request.pop(request, None)
        if one is not None and (count := int((one.positions < one.shared).sum())):
            self.left.append(one.part(slice(count), None))

    def all(self) -> tuple[DeepTokens, Tensor]:
        """For one pass, those of requests that are gone first, and their inputs [M, D]."""
        waiting: Sequence[Waiting] = [*self.left, *self.by_request.values()]
        owners = [number for number, one in enumerate(waiting) for _ in range(len(one.positions))]
        positions, slots = torch.cat([one.positions for one in waiting]), torch.cat([one.slots for one in waiting])
        tables = pad_sequence([one.blocks for one in waiting], batch_first=True)
        return DeepTokens(owners, positions, slots, tables), torch.cat([one.embeds for one in waiting])

    def rows(self, due: dict[str, int], step: int) -> list[int]:
        """Where the tokens of `all` go in a mixed pass; none are left of requests that are gone.

        Args:
            due: the row of the step that a request's newest token has.
            step: T; all others come behind its rows.
        """
        assert not self.left
        rows: list[int] = []
        more = step
        for request, one in self.by_request.items():
            new = len(one.positions) - (request in due)
            rows += range(more, more + new)
            more += new
            if request in due:
                rows.append(due[request])
        return rows

    def ran(self, said: Collection[str] = ()) -> None:
        """All have; but a token that a request hangs on runs again, as a row of its step, unless that is in `said`."""
        self.left.clear()
        self.by_request = {
            request: one.part(slice(-1, None), one.hidden)
            for request, one in self.by_request.items()
            if one.hidden is not None and request not in said
        }
