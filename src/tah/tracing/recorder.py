"""A policy that captures what every pass predicts for the true next token, and which tokens another policy iterates.

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

from ..core.logits import highest
from ..policy import BoundRule, DepthState, Policy

ROWS = 16  # measured at a time, so that they stay in a CPU's cache over the dozen operations on each


class Recorder(Policy):
    """Captures a forward: asks a rule, and measures what every pass predicts.

    The forward must be given max_depth M + 1: all tokens stop at M, and only there is pass M seen.

    Args:
        rule: the rule to ask.
        target: [N] true next tokens of the real tokens, in order.
        most: M.
        top_k: most probable tokens to keep.
        decider: asked as well.
        follow: tokens iterate as the rule decides, and depth 1 is not captured; by default all run all passes.
    """

    def __init__(
        self, rule: BoundRule, target: Tensor, most: int, top_k: int, decider: Any = None, follow: bool = False
    ) -> None:
        self.rule, self.target, self.most, self.top_k = rule, target, most, top_k
        self.decider, self.follow = decider, follow
        self.layers = tuple(sorted({*getattr(rule.policy, "layers", ()), *getattr(decider, "layers", ())}))
        self.active = torch.arange(len(target), device=target.device)  # tokens that run the pass
        self.depth = torch.ones_like(target)  # [N] passes under the rule
        self.passes: list[tuple[Tensor, Tensor]] = []  # the active tokens, and `measure` of them
        self.go_prob: list[Tensor] = []  # [N] by depth: the decider's probability of going on
        self._chunks: list[Tensor] = []  # measured of this pass

    def __call__(self, state: DepthState) -> Tensor:
        """Whether the active tokens go on, [..] bool."""
        self._chunks, capture = [], not self.follow or state.depth > 1
        if capture:
            state = replace(state, map_logits=partial(self._map_and_capture, state))
        go = torch.zeros_like(self.active, dtype=torch.bool)
        if state.depth < self.most:
            go = self._ask(state)
        if capture:
            if not self._chunks:  # the rule did not read the logits
                state.map_logits(lambda logits: logits[:, 0])
            self.passes.append((self.active, torch.cat(self._chunks).to(self.target.device)))
        if not self.follow:
            self.depth += go & (self.depth == state.depth)
            return torch.full_like(go, state.depth < self.most)
        self.depth[self.active[go]] += 1
        self.active = self.active[go]
        return go

    def _ask(self, state: DepthState) -> Tensor:
        logits, go = self.rule.decide(state, row=torch.zeros_like(self.active))
        if self.decider is not None:
            decided = logits if self.rule.policy is self.decider else self.decider(state)
            self.go_prob.append(decided.sigmoid().float().to(self.target.device))  # as the rule compares it
        return go

    def _map_and_capture(self, state: DepthState, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """`map_logits(f)`; the first time it also measures the same logits, so that the head runs once."""
        if self._chunks:
            return state.map_logits(f, ahead=ahead)

        def both(logits: Tensor) -> Tensor:
            found = f(logits).clone()  # measuring overwrites them
            start = sum(map(len, self._chunks))
            target = self.target[self.active[start : start + len(logits)]]
            parts = zip(logits.split(ROWS), target.split(ROWS), strict=True)
            self._chunks.append(torch.cat([measure(its, wanted, self.top_k) for its, wanted in parts]))
            return found

        all_go_on = not self.follow and state.depth < self.most
        return state.map_logits(both, ahead=ahead or all_go_on)


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
    top, ids = highest(z, k)
    ids, order = ids.sort()
    top, order = top.gather(1, order).sort(descending=True, stable=True)
    return top, ids.gather(1, order)
