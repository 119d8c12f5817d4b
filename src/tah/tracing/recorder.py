"""A policy that watches: what every pass makes of the true next token, and who would have gone on.

Shapes: N predictions of a batch (position t predicts token t + 1), n of them in a chunk, V vocabulary, M = max_depth,
k = top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.fast import topk
from ..policy import BoundRule, DepthState, Policy

ROWS = 16  # measured at a time, so that they stay in a CPU's cache over the dozen operations on each


class Recorder(Policy):
    """Watches a forward: asks a rule, and notes what every pass makes of the true next tokens.

    The forward must be given max_depth M + 1: everyone is stopped at M, and that is where pass M is seen.

    Args:
        rule: whom to ask, with its threshold.
        target: [N] true next tokens of the real tokens, in order.
        most: M.
        top_k: alternatives to keep.
        decider: is asked too.
        everyone: all go on, whatever the rule says; otherwise it is followed, and depth 1 is not noted.
    """

    def __init__(
        self, rule: BoundRule, target: Tensor, most: int, top_k: int, decider: Any = None, everyone: bool = True
    ) -> None:
        self.rule, self.target, self.most, self.top_k = rule, target, most, top_k
        self.decider, self.everyone = decider, everyone
        self.layers = tuple(sorted({*getattr(rule.policy, "layers", ()), *getattr(decider, "layers", ())}))
        self.active = torch.arange(len(target), device=target.device)  # those that run the pass
        self.depth = torch.ones_like(target)  # [N] passes under the rule
        self.passes: list[tuple[Tensor, Tensor]] = []  # who ran it; rank, probability, entropy, max, top ids, top probs
        self.said: list[Tensor] = []  # [N] the decider's probability of going on, by depth
        self._noted: list[Tensor] = []  # of this pass, by chunk

    def __call__(self, state: DepthState) -> Tensor:
        """Whether the active tokens go on, [..] bool."""
        self._noted, note = [], self.everyone or state.depth > 1
        if note:
            state = replace(state, map_logits=partial(self._map_and_note, state))
        go = torch.zeros_like(self.active, dtype=torch.bool)
        if state.depth < self.most:
            go = self._ask(state)
        if note:
            if not self._noted:  # nobody looked at the logits
                state.map_logits(lambda logits: logits[:, 0])
            self.passes.append((self.active, torch.cat(self._noted).to(self.target.device)))
        if self.everyone:
            self.depth += go & (self.depth == state.depth)
            return torch.full_like(go, state.depth < self.most)
        self.depth[self.active[go]] += 1
        self.active = self.active[go]
        return go

    def _ask(self, state: DepthState) -> Tensor:
        logits, go = self.rule.decide(state, row=torch.zeros_like(self.active))
        if self.decider is not None:
            said = logits if self.rule.policy is self.decider else self.decider(state)
            self.said.append(said.sigmoid().float().to(self.target.device))  # in its own precision, as it is judged
        return go

    def _map_and_note(self, state: DepthState, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """`map_logits(f)`, and note the same logits along with it the first time: the head need not run again."""
        if self._noted:
            return state.map_logits(f, ahead=ahead)

        def both(logits: Tensor) -> Tensor:
            found = f(logits).clone()  # measuring overwrites them
            self._noted.append(self._note(logits))
            return found

        all_go_on = self.everyone and state.depth < self.most
        return state.map_logits(both, ahead=ahead or all_go_on)

    def _note(self, logits: Tensor) -> Tensor:
        start = sum(map(len, self._noted))
        target = self.target[self.active[start : start + len(logits)]]
        parts = zip(logits.split(ROWS), target.split(ROWS), strict=True)
        return torch.cat([measure(its, wanted, self.top_k) for its, wanted in parts])


def measure(logits: Tensor, target: Tensor, k: int) -> Tensor:
    """What `logits` [n, V] make of `target` [n]; they get overwritten.

    Few passes over [n, V], since each costs as much as a tenth of the head: the most probable tokens tell the rank of
    a target that is among them.

    Returns:
        [n, 4 + 2k] float32 (ids are exact below 2^24): rank, of equal logits the lower id first; probability; entropy
        in nats; the highest probability; ids and probabilities of the k most probable tokens.

    Raises:
        ValueError: the logits hold NaN or infinity.
    """
    z, target = logits.float(), target.to(logits.device)[:, None]
    p = torch.empty_like(z)
    top, ids = most_probable(z, k)
    own = z.gather(1, target)
    rank = ((top > own) | ((top == own) & (ids < target))).sum(1)
    rest = (own <= top[:, -1:]).squeeze(1).nonzero().squeeze(1)  # others than the k may come before the target
    if len(rest):
        x, mine, each = z[rest], own[rest], p[: len(rest)]
        rank[rest] = torch.gt(x, mine, out=each).sum(1).long()  # as float32, which sums faster; exact below 2^24
        for at in (torch.eq(x, mine, out=each).sum(1) > 1).nonzero().squeeze(1).tolist():
            rank[rest[at]] += (x[at, : int(target[rest[at]])] == mine[at]).sum()
    peak = top[:, :1]
    mass = torch.exp(z.sub_(peak), out=p).sum(1, keepdim=True)
    # What is ruled out (-inf) adds nothing to the entropy, though 0 * -inf is not a number.
    entropy = (mass.log() - p.mul_(z).nansum(1, keepdim=True) / mass).clamp(min=0)
    chosen, mine = (top - peak).exp() / mass, (own - peak).exp() / mass
    found = torch.cat([rank[:, None].float(), mine, entropy, chosen[:, :1], ids.float(), chosen], dim=1)
    if not found.isfinite().all():
        raise ValueError("the model computes NaN or infinity; load it in float32 or bfloat16")
    return found


def most_probable(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `z` [n, V] and their ids, [n, k], falling; of equal ones the lower id first."""
    top, ids = topk(z, k)
    ids, order = ids.sort()
    top, order = top.gather(1, order).sort(descending=True, stable=True)
    return top, ids.gather(1, order)
