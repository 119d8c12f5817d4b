"""The output of TaH2, method.md (15): a mixture of the probabilities of each token's passes.

Shapes: B batch, T tokens, M most passes, N chosen tokens, n tokens of a deeper pass, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .head import Head
from .logits import CHUNK, Found, RunningOutput
from .loss import IGNORE

SMALLEST = 1e-10  # of a weight, so that its logarithm is finite


class Mixture(RunningOutput):
    """Log-probabilities of a mixture of passes, held as hidden states and weights and never as [B, T, V].

    The weights of a token's passes add up to 1 whatever made it stop: its last pass has all of the rest.

    Args:
        head: Hidden states to logits.
        hidden: Final hidden states [B, T, D] of depth 1.
        even: Whether all passes of a token have the same weight, instead of weights by continue probability.
        num_best: Number k of tokens in the mix of the next input.
    """

    def __init__(self, head: Head, hidden: Tensor, even: bool, num_best: int) -> None:
        super().__init__(head, hidden, None, num_best)
        self.even = even
        self.rest = torch.ones(len(self.total), device=self.total.device)  # [B*T] weight of each token's last pass
        self.weights = [self.rest]  # [B*T] by depth; only tokens that ran the depth have one

    def add(self, tokens: Tensor, hidden: Tensor, continue_logits: Tensor) -> None:
        self.deeper.append((tokens, hidden))
        if self.even:
            count = self.rest.reciprocal().index_add(0, tokens, self.rest.new_ones(len(tokens)))
            self.rest = count.reciprocal()
            self.weights = [self.rest] * (1 + len(self.deeper))
            return
        p, rest = continue_logits.to(self.rest).sigmoid(), self.rest[tokens]
        self.weights[-1] = self.weights[-1].index_put((tokens,), rest * (1 - p))
        self.rest = self.rest.index_put((tokens,), rest * p)
        self.weights.append(self.rest)

    def so_far(self) -> Mixture:
        now = super().so_far()
        assert isinstance(now, Mixture)
        now.weights = list(self.weights)
        return now

    def logits(self, tokens: Tensor, found: Found | None = None) -> Tensor:
        """Return log-probabilities [N, V] float32 of `tokens` [N]; without gradients, with little more than them in
        memory."""
        if torch.is_grad_enabled() or len(tokens) <= CHUNK:
            return super().logits(tokens, found)
        made: Tensor | None = None
        for i, chunk in enumerate(self.chunks(tokens, CHUNK)):
            part = super().logits(*chunk)
            made = part.new_empty(len(tokens), part.shape[-1]) if made is None else made
            made[i * CHUNK : (i + 1) * CHUNK] = part
        assert made is not None
        return made

    def through(self, head: Callable[[Tensor], Tensor], tokens: Tensor, found: Found | None = None) -> Tensor:
        """Return log-probabilities [N, V] float32 of `tokens` [N]."""
        logp = self.pass_logits(head, 1, tokens).float().log_softmax(-1)
        if not self.deeper:
            return logp
        # The head may be on another device than the tokens.
        first, *deeper = [w[tokens, None].clamp(min=SMALLEST).log().to(logp.device) for w in self.weights]
        logp = logp + first
        found = self.found(tokens) if found is None else found
        for depth, (weight, (hit, at)) in enumerate(zip(deeper, found, strict=True), start=2):
            hit = hit.to(logp.device)
            own = self.pass_logits(head, depth, at).float().log_softmax(-1) + weight[hit]
            logp = logp.index_put((hit,), torch.logaddexp(logp[hit], own))
        return logp

    def pass_logits(self, head: Callable[[Tensor], Tensor], depth: int, at: Tensor) -> Tensor:
        """Return the logits [n, V] of one pass alone, for some of its tokens, as indices [n] into them."""
        return head((self.total if depth == 1 else self.deeper[depth - 2][1])[at])

    def summed(self, B: int, T: int) -> Tensor:
        """Return the final hidden states [B, T, D] of each token, summed with the weights of its passes."""
        total = self.total * self.weights[0][:, None].to(self.total.dtype)
        for (tokens, hidden), weight in zip(self.deeper, self.weights[1:], strict=True):
            total = total.index_add(0, tokens, (hidden * weight[tokens, None]).to(total.dtype))
        return total.view(B, T, -1)

    @property
    def is_single_matrix(self) -> bool:
        """Return False: the output is not linear in the hidden states."""
        return False


@torch.no_grad()
def pass_losses(
    running: RunningOutput,
    targets: Tensor,
    depth_count: Tensor,
    max_depth: Tensor | int,
    run_alone: Callable[[int, Tensor, Tensor], Tensor],
    everywhere: bool,
) -> Tensor:
    """Return the cross-entropy [B, T, M] float32 of each pass alone, and that of one pass more.

    Args:
        running: All passes of the call.
        targets: Token id [B, T] that each position should predict, `IGNORE` where not supervised.
        depth_count: Passes [B, T] of each token.
        max_depth: Most passes, or those of each row [B]. M is the largest.
        run_alone: Function that runs the pass after `depth` on some tokens: `run_alone(depth, tokens [n], hidden
            [n, D])` returns final hidden states [n, D].
        everywhere: Whether every depth has to run, because other processes run it.

    Raises:
        ValueError: The output is a sum, which does not keep the passes apart.
    """
    if not isinstance(running, Mixture):
        raise ValueError("side passes need output='mixture' or 'even'")
    target, count = targets.flatten(), depth_count.flatten()
    limit = torch.as_tensor(max_depth, device=count.device).expand(len(targets)).repeat_interleave(targets.shape[1])
    most = int(limit.max())
    found = torch.full((len(target), most), math.nan, device=target.device)

    def note(depth: int, tokens: Tensor, hidden: Tensor) -> None:
        for some, rows in zip(tokens.split(CHUNK), hidden.split(CHUNK), strict=True):
            logits = running.head(rows).float()
            each = torch.nn.functional.cross_entropy(logits, target[some].to(logits.device), reduction="none")
            found[some, depth - 1] = each.to(found.device)

    everyone = torch.arange(len(target), device=target.device)
    for depth, (tokens, hidden) in enumerate([(everyone, running.total), *running.deeper], start=1):
        counts = target[tokens] != IGNORE
        note(depth, tokens[counts], hidden[counts])
        stops = counts & (count[tokens] == depth) & (limit[tokens] > depth)
        if stops.any():
            note(depth + 1, tokens[stops], run_alone(depth, tokens[stops], hidden[stops]))
        elif everywhere and depth < most:
            run_alone(depth, tokens[:1], hidden[:1])
    for depth in range(len(running.deeper) + 2, most) if everywhere else ():
        run_alone(depth, everyone[:1], running.total[:1])  # other processes may have run it
    return found.view(*targets.shape, most)


def mixture_weights(depth_count: Tensor, continue_logits: Tensor, even: bool) -> Tensor:
    """Return the weight [B, T, M] float32 of each pass, method.md (15), 0 for a pass that did not run.

    Args:
        depth_count: Passes [B, T] of each token.
        continue_logits: Continue logits [B, T, M - 1] of each token.
        even: As in `Mixture`.
    """
    depths = torch.arange(1, continue_logits.shape[-1] + 2, device=depth_count.device)
    count = depth_count[..., None]
    if even:
        return (depths <= count).float() / count.clamp(min=1)
    p = torch.where(depths[:-1] < count, continue_logits.float().sigmoid(), 0.0)  # no pass after the last one
    p = torch.nn.functional.pad(p, (0, 1))
    rest = torch.nn.functional.pad(p[..., :-1].cumprod(-1), (1, 0), value=1.0)
    return rest * (1 - p) * (depths <= count)  # the last token of `generate` ran no pass
