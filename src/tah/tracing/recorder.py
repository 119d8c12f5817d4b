"""A policy that captures what every pass predicts for the true next token, and which tokens a rule iterates.

Shapes: N predictions of a batch (position t predicts token t + 1), n of them active or in a chunk, V vocabulary,
M = max_depth, k = top_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.scoring import score_targets
from ..policy import BoundRule, DepthState, Policy


class Recorder(Policy):
    """Evaluates a rule during a forward, and scores what every pass predicts.

    Call the model with max_depth M + 1. A policy is called after every pass but the last, so this is the way to capture
    pass M. The recorder stops all tokens at M.

    Args:
        rule: Rule that decides which tokens iterate.
        target: True next token of each token that is not padding, in order, `[N]`.
        most: M.
        top_k: Number of most probable tokens to keep.
        decider: Decider whose probabilities are captured too.
        follow: Whether tokens iterate as the rule decides. Depth 1 is then not captured. By default every token runs
            all passes.
    """

    def __init__(
        self, rule: BoundRule, target: Tensor, most: int, top_k: int, decider: Any = None, follow: bool = False
    ) -> None:
        self.rule, self.target, self.most, self.top_k = rule, target, most, top_k
        self.decider, self.follow = decider, follow
        self.layers = tuple(sorted({*getattr(rule.policy, "layers", ()), *getattr(decider, "layers", ())}))
        self.active = torch.arange(len(target), device=target.device)  # tokens that run the pass
        self.depth = torch.ones_like(target)  # [N] passes under the rule
        # Per pass: the active tokens [n], and their scores [n, 3 + 2k]. The columns of the scores are rank,
        # probability, entropy, and the ids and probabilities of the most probable tokens. As float32, ids are exact
        # below 2^24.
        self.passes: list[tuple[Tensor, Tensor]] = []
        self.go_prob: list[Tensor] = []  # per pass: the decider's continue probabilities [N]
        self._chunks: list[Tensor] = []  # scores of the current pass

    def __call__(self, state: DepthState) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the rule's continue logits, and whether each active token takes another pass, `[n]` bool."""
        self._chunks, capture = [], not self.follow or state.depth > 1
        if capture:
            state = replace(state, map_logits=partial(self._map_and_capture, state))
        go = torch.zeros_like(self.active, dtype=torch.bool)
        logits = go.float()
        if state.depth < self.most:
            logits, go = self._ask(state)
        if capture:
            if not self._chunks:  # the rule did not read the logits, so nothing has been scored yet
                state.map_logits(lambda logits: logits[:, 0])
            self.passes.append((self.active, torch.cat(self._chunks).to(self.target.device)))
        if not self.follow:
            self.depth += go & (self.depth == state.depth)
            # Where the rule stops a token for certain, its pass would have no weight in a mixture.
            return logits.masked_fill(logits == -math.inf, math.inf), torch.full_like(go, state.depth < self.most)
        self.depth[self.active[go]] += 1
        self.active = self.active[go]
        return logits, go

    def _ask(self, state: DepthState) -> tuple[Tensor, Tensor]:
        logits, go = self.rule.decide(state, row=torch.zeros_like(self.active))
        if self.decider is not None:
            decided = logits if self.rule.policy is self.decider else self.decider(state)
            self.go_prob.append(decided.sigmoid().float().to(self.target.device))  # the number that the rule compares
        return logits, go

    def _map_and_capture(self, state: DepthState, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """Return `map_logits(f)`. The first call also scores the same logits, so the head runs once per pass."""
        if self._chunks:
            return state.map_logits(f, ahead=ahead)

        def score_then_map(logits: Tensor) -> Tensor:
            start = sum(map(len, self._chunks))
            scores = score_targets(logits, self.target[self.active[start : start + len(logits)]], self.top_k)
            numbers = torch.stack([scores.rank.float(), scores.prob, scores.entropy], dim=1)
            self._chunks.append(torch.cat([numbers, scores.top_ids.float(), scores.top_prob], dim=1))
            return f(logits)  # after the scores, since f may overwrite the logits

        all_go_on = not self.follow and state.depth < self.most
        return state.map_logits(score_then_map, ahead=ahead or all_go_on)
