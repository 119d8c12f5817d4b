"""Deferred tokens of `batching="mixed"`: hard tokens that run at depth 2 in the next step, beside depth 1 of that step.

A deferred token inside a prompt's chunk is a row that the model adds to the next step. A deferred last token of a
request is a row of vLLM's step: the scheduler schedules it a second time, and the request emits its next token then.

Shapes: M tokens, N physical blocks, D width, T tokens of the step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .attention import DeepTokens


@dataclass
class Waiting:
    """Deferred tokens of one request. Each has an entry in the pool, which is still empty."""

    places: np.ndarray  # [M] positions
    slots: np.ndarray  # [M] physical slots of their depth-1 keys
    embeds: Tensor  # [M, D] next inputs, for depth 2
    blocks: np.ndarray  # [N] physical blocks of the request, up to the last of the tokens
    shared: int  # number of the request's tokens in full blocks, which the prefix cache may share
    hidden: Tensor | None  # [D] final hidden state of depth 1 of the last token, if that predicts the next token
    probability: Tensor | None  # [] continue probability of that token

    def part(self, tokens: slice, hidden: Tensor | None) -> Waiting:
        """Return a part of the tokens, with another `hidden`. It does not keep the other inputs in memory."""
        places, slots, embeds = self.places[tokens], self.slots[tokens], self.embeds[tokens].clone()
        return replace(self, places=places, slots=slots, embeds=embeds, hidden=hidden)


class WaitingTokens:
    """Deferred tokens of all requests.

    If a request ends, its deferred tokens in full blocks still run: a request that finds these blocks in the prefix
    cache attends to their depth-2 keys.
    """

    def __init__(self) -> None:
        self.by_request: dict[str, Waiting] = {}
        self.left: list[Waiting] = []

    def __bool__(self) -> bool:
        """Return whether any token waits."""
        return bool(self.by_request or self.left)

    def deferred(self) -> list[str]:
        """Return the requests whose last token is deferred."""
        return list(self.hidden())

    def hidden(self) -> dict[str, Tensor]:
        """Return, by request, the final hidden state [D] of depth 1 of the deferred last tokens."""
        return {request: one.hidden for request, one in self.by_request.items() if one.hidden is not None}

    def probability(self, requests: Collection[str]) -> Tensor:
        """Return the continue probabilities [requests] float32 of the deferred last tokens of `requests`."""
        found = [self.by_request[request].probability for request in requests]
        return torch.stack([one for one in found if one is not None])

    def leave(self, request: str) -> None:
        """Remove a request that has ended or was preempted; its tokens in full blocks move to `left`."""
        one = self.by_request.pop(request, None)
        if one is not None and (count := int((one.places < one.shared).sum())):
            self.left.append(one.part(slice(count), None))

    def all(self) -> tuple[DeepTokens, Tensor]:
        """Return all tokens for one pass, those of removed requests first, and their next inputs [M, D]."""
        waiting: Sequence[Waiting] = [*self.left, *self.by_request.values()]
        owners = np.repeat(np.arange(len(waiting)), [len(one.places) for one in waiting])
        tables = np.zeros((len(waiting), max(len(one.blocks) for one in waiting)), np.int32)
        for table, one in zip(tables, waiting, strict=True):
            table[: len(one.blocks)] = one.blocks
        places, slots = np.concatenate([one.places for one in waiting]), np.concatenate([one.slots for one in waiting])
        return DeepTokens(owners, places, slots, tables), torch.cat([one.embeds for one in waiting])

    def rows(self, due: dict[str, int], step: int) -> np.ndarray:
        """Return the rows of the tokens of `all` in a mixed pass; `left` must be empty.

        Args:
            due: Row of the step of each request's deferred last token, if that is scheduled.
            step: Number of rows of the step, T; all other tokens get the rows after them.
        """
        assert not self.left
        rows: list[int] = []
        more = step
        for request, one in self.by_request.items():
            new = len(one.places) - (request in due)
            rows += range(more, more + new)
            more += new
            if request in due:
                rows.append(due[request])
        return np.array(rows)

    def ran(self, emitted: Collection[str] = ()) -> None:
        """Remove the tokens, which have run; but keep a deferred last token of a request that is not in `emitted`.

        Such a token runs again when vLLM schedules it.

        Args:
            emitted: Requests whose deferred last token was a row of the step.
        """
        self.left.clear()
        self.by_request = {
            request: one.part(slice(-1, None), one.hidden)
            for request, one in self.by_request.items()
            if one.hidden is not None and request not in emitted
        }
