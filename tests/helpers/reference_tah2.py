"""TaH2, slowly: one token, one depth, one row at a time, from the formulas of the authors' second method.

As in `reference.py`, the stock base runs on hand-made caches that hold exactly the keys a query may see, under a mask
that hides nothing. Everything is differentiable. Of `tah` only `model.base` and named weights are used.

Shapes: T tokens of a row, D width, V vocabulary, M maximum depth, S supervised tokens of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import Key, one_pass

EPS = 1e-6  # of every norm below, whatever the base's is
ALWAYS_LOGIT = 10.0  # of the authors' AlwaysIterDecider, so its mixture weights are those of p = 0.99995


@dataclass
class Tah2:
    """What the reference reads of a model.

    Attributes:
        base: The stock decoder with its head.
        weights: Tensors `next_input_mlp.*.weight` and `decider.*.weight`. A norm that is missing is not applied.
        output: `mixture`, `even`, or the `sum` of TaH.
        policy: `decider`, `always` or `confidence`.
        kind_of_input: `mlp`, or the `topk` or `hidden` of TaH.
        mix_topk: Number of tokens in the mix of `topk`.
    """

    base: Any
    weights: Mapping[str, Tensor]
    max_depth: int
    threshold: float = 0.5
    attention: str = "duo"
    output: str = "mixture"
    policy: str = "decider"
    kind_of_input: str = "mlp"
    mix_topk: int = 100

    @classmethod
    def of(cls, model: Any) -> Tah2:
        """The reference of a `TaHForCausalLM`."""
        config = model.config
        return cls(
            model.base,
            dict(model.named_parameters()),
            config.max_depth,
            config.threshold,
            config.attention,
            config.output,
            config.policy,
            config.next_input,
            config.mix_topk,
        )

    def next_input(self, embed: Tensor, hidden: Tensor) -> Tensor:
        """Input [D] of the next pass, from the token's embedding [D] and its last final hidden state [D]."""
        both = torch.cat(
            [self._norm("next_input_mlp.norm_embed", embed), self._norm("next_input_mlp.norm_hidden", hidden)]
        )
        x = self._norm("next_input_mlp.norm_pre", F.linear(both, self.weights["next_input_mlp.proj.weight"]))
        return self._norm("next_input_mlp.norm_out", self._mlp("next_input_mlp", x))

    def input_after(self, embed: Tensor, token: Passes) -> Tensor:
        """Input [D] of the pass after all of a token's passes."""
        if self.kind_of_input == "mlp":
            return self.next_input(embed, token.hidden[-1])
        if self.kind_of_input == "hidden":
            return embed + F.linear(token.hidden[-1], self.weights["next_input_map.weight"])
        best, ids = token.log_probs(self.output).topk(min(self.mix_topk, len(token.logits[-1])))
        return best.softmax(0) @ self.base.get_input_embeddings()(ids)

    def continue_logit(self, embed: Tensor, token: Passes) -> Tensor:
        """The policy's logit; the decider reads the logits [V] of the last pass alone."""
        hidden, logits = token.hidden[-1], token.logits[-1]
        if self.policy == "always":
            return torch.tensor(ALWAYS_LOGIT)
        if self.policy == "confidence":
            return torch.logit(1 - token.log_probs(self.output).softmax(-1).max())
        width = len(embed)
        best = logits.softmax(-1).sort(descending=True).values[:width]
        best = torch.cat([best, best.new_zeros(width - len(best))])
        parts = {"norm_embed": embed, "norm_hidden": hidden, "norm_probs": best}
        x = torch.cat([self._norm(f"decider.{name}", part) for name, part in parts.items()])
        x = self._mlp("decider", F.linear(x, self.weights["decider.proj.weight"]))
        return F.linear(self._norm("decider.norm_out", x), self.weights["decider.score.weight"])[0].float()

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights.get(f"{name}.weight")
        return x if weight is None else weight * x / (x.pow(2).mean() + EPS).sqrt()

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up, down = (self.weights[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@dataclass
class Passes:
    """The passes of one token."""

    inputs: list[Tensor] = field(default_factory=list)  # [D] per pass
    hidden: list[Tensor] = field(default_factory=list)  # [D] per pass, after the final norm
    logits: list[Tensor] = field(default_factory=list)  # [V] per pass, of that pass alone
    continue_logits: list[Tensor] = field(default_factory=list)  # after each pass but one at the maximum depth

    @property
    def count(self) -> int:
        return len(self.hidden)

    def mixture_weights(self, output: str) -> list[Tensor]:
        """The weight of each pass: all that is left goes to the last one, whatever its decision was."""
        assert output in ("mixture", "even")
        if output == "even":
            return [torch.tensor(1 / self.count)] * self.count
        weights, left = [], torch.tensor(1.0)
        for logit in self.continue_logits[: self.count - 1]:
            p = logit.sigmoid()
            weights.append(left * (1 - p))
            left = left * p
        return [*weights, left]

    def log_probs(self, output: str) -> Tensor:
        """Logarithms [V] of the mixture of the passes' probabilities; of a `sum`, accumulated logits."""
        if output == "sum":
            return torch.stack(self.logits).sum(0)
        weights = self.mixture_weights(output)
        each = [w.clamp(min=1e-10).log() + z.float().log_softmax(-1) for w, z in zip(weights, self.logits, strict=True)]
        return torch.stack(each).logsumexp(0)


@dataclass
class Row:
    """The passes of all tokens of a row, and their keys, per layer."""

    tokens: list[Passes]
    embeds: Tensor  # [T, D]
    stores: list[list[Key]]
    output: str

    @property
    def depth_count(self) -> Tensor:
        """[T]"""
        return torch.tensor([token.count for token in self.tokens])

    @property
    def log_probs(self) -> Tensor:
        """[T, V]"""
        return torch.stack([token.log_probs(self.output) for token in self.tokens])

    def at_depth(self, name: str, depth: int) -> Tensor:
        """`inputs`, `hidden`, `logits` or `continue_logits` of the tokens that have one at a depth, in order."""
        every = [getattr(token, name) for token in self.tokens]
        return torch.stack([values[depth - 1] for values in every if len(values) >= depth])

    def mixture_weights(self, columns: int) -> Tensor:
        """[T, columns], 0 where a token did not run."""
        weights = torch.zeros(len(self.tokens), columns)
        for t, token in enumerate(self.tokens):
            weights[t, : token.count] = torch.stack(token.mixture_weights(self.output))
        return weights

    def mixed_hidden(self) -> Tensor:
        """Sum [T, D] of the final hidden states of the passes, weighted as the output is."""
        mixed = []
        for token in self.tokens:
            weights = token.mixture_weights(self.output)
            mixed.append(torch.stack([w * h for w, h in zip(weights, token.hidden, strict=True)]).sum(0))
        return torch.stack(mixed)


def run(
    model: Tah2,
    input_ids: Tensor,
    max_depth: int | None = None,
    threshold: float | None = None,
    forced: Tensor | None = None,
) -> Row:
    """Run one unpadded row [T].

    Args:
        model: The weights and settings.
        input_ids: [T].
        max_depth: Most passes of this row; the model's by default.
        threshold: Threshold of this row; the model's by default.
        forced: [T], 0 where the decider decides, else as many passes as this (at most `max_depth`).
    """
    text = model.base.config.get_text_config(decoder=True)
    max_depth = max_depth or model.max_depth
    threshold = model.threshold if threshold is None else threshold
    embeds = model.base.get_input_embeddings()(input_ids)
    row = Row([], embeds, [[] for _ in range(text.num_hidden_layers)], model.output)
    for position, embed in enumerate(embeds):
        token, x = Passes(), embed
        row.tokens.append(token)
        for depth in range(1, max_depth + 1):
            logits, hidden, keys = one_pass(model.base, text, x, position, depth, row.stores, model.attention)
            for store, key in zip(row.stores, keys, strict=True):
                store.append(key)
            token.inputs.append(x)
            token.hidden.append(hidden[-1])
            token.logits.append(logits)
            if depth == max_depth:
                break
            score = model.continue_logit(embed, token)
            token.continue_logits.append(score)
            count = 0 if forced is None else int(forced[position])
            if not (count > depth if count else bool(score.sigmoid() > threshold)):
                break
            x = model.input_after(embed, token)
    return row


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """One forward of training over some rows. Tensors [.., S] are over the supervised tokens, row by row."""

    rows: list[Row]
    supervised: list[Tensor]  # indices of the supervised tokens of each row
    target_logprob: Tensor  # [S] of the mixture
    losses: Tensor  # [M, S] cross-entropy after each depth alone, of side passes where a token had stopped
    depth_count: Tensor  # [S]
    depth_labels: Tensor  # [S]
    boundaries: list[float]  # smallest gain, by depth 1..M-1, that counts as hard
    candidates: list[int]
    hard: list[int]
    costs: Tensor  # [M - 1, S]
    pos_weights: list[float]
    nll: Tensor
    decider_loss: Tensor

    def loss(self, nll_weight: float = 1.0, decider_weight: float = 0.05) -> Tensor:
        return nll_weight * self.nll + decider_weight * self.decider_loss


def train(
    model: Tah2,
    rows: list[Tensor],
    labels: list[Tensor],
    num_items: int,
    coverage: float = 0.99,
    max_depth: int | None = None,
) -> Training:
    """Compute the losses of some unpadded rows, as if they were one micro-batch.

    Args:
        model: The weights and settings.
        rows: Token ids [T] of each row.
        labels: [T] of each row, -100 where not supervised, not shifted.
        num_items: Divisor N of both losses.
        coverage: Share of all positive gains that the hard tokens have together.
        max_depth: Most passes; the model's by default.
    """
    depths = max_depth or model.max_depth
    done, places, losses = [], [], []
    for ids, unshifted in zip(rows, labels, strict=True):
        targets = F.pad(unshifted[1:], (0, 1), value=-100)
        where = (targets != -100).nonzero().flatten()
        # With `own`, a token that nothing supervises changes no other token, so it takes one pass.
        forced = (targets == -100).long() if model.attention == "own" else None
        row = run(model, ids, depths, forced=forced)
        done.append(row)
        places.append(where)
        losses += [_losses(model, row, int(t), int(targets[t]), depths) for t in where]
    chosen = [row.tokens[t] for row, where in zip(done, places, strict=True) for t in where]
    targets = torch.cat([F.pad(x[1:], (0, 1), value=-100)[where] for x, where in zip(labels, places, strict=True)])
    logprob = torch.stack([token.log_probs(model.output)[t] for token, t in zip(chosen, targets, strict=True)])
    ce = torch.stack(losses, dim=1) if losses else torch.zeros(depths, 0)
    ran = torch.tensor([token.count for token in chosen])
    depth_labels, candidate = torch.ones_like(ran), torch.ones_like(ran, dtype=torch.bool)
    boundaries, counts, hard_counts, costs = [], [], [], []
    for depth in range(1, depths):
        candidate = candidate & (ran >= depth)
        gain = ce[depth - 1] - ce[depth]
        boundary = _boundary(gain[candidate], coverage)
        hard = candidate & (gain >= boundary) & bool((gain[candidate] > 0).any())
        cost = torch.where(candidate, (gain - boundary).abs().clamp(1e-6, 1.0), 1e-6)
        boundaries.append(boundary)
        counts.append(int(candidate.sum()))
        hard_counts.append(int(hard.sum()))
        costs.append(cost)
        depth_labels, candidate = depth_labels + hard, hard
    decider_loss, pos_weights = torch.zeros(()), []
    for depth in range(1, depths):
        here = [s for s in range(len(chosen)) if ran[s] >= depth]
        target = (depth_labels[here] > depth).float()
        positives = target.sum().item()
        both = 0 < positives < len(here)
        pos_weights.append(min(max((len(here) - positives) / positives, 0.02), 50.0) if both else 1.0)
        if here:
            score = torch.stack([chosen[s].continue_logits[depth - 1] for s in here])
            bce = -(pos_weights[-1] * target * F.logsigmoid(score) + (1 - target) * F.logsigmoid(-score))
            decider_loss = decider_loss + (costs[depth - 1][here] * bce).sum() / num_items
    nothing = torch.zeros(0, len(chosen))
    return Training(
        done,
        places,
        logprob,
        ce,
        ran,
        depth_labels,
        boundaries,
        counts,
        hard_counts,
        torch.stack(costs) if costs else nothing,
        pos_weights,
        -logprob.sum() / num_items,
        decider_loss,
    )


@torch.no_grad()
def _losses(model: Tah2, row: Row, t: int, target: int, depths: int) -> Tensor:
    """Cross-entropy [M] of token t after each depth; where it had stopped, as if it alone had gone on."""
    token, text = row.tokens[t], model.base.config.get_text_config(decoder=True)
    logits, hidden = list(token.logits), token.hidden[-1]
    for depth in range(token.count + 1, depths + 1):
        x = model.next_input(row.embeds[t], hidden)
        z, states, _ = one_pass(model.base, text, x, t, depth, row.stores, model.attention)
        logits.append(z)
        hidden = states[-1]
    return torch.stack([-z.float().log_softmax(-1)[target] for z in logits])


def _boundary(gains: Tensor, coverage: float) -> float:
    """The gain at which the positive gains, largest first, add up to `coverage` of their sum; 0 if there is none."""
    ordered = sorted((g for g in gains.double().tolist() if g > 0), reverse=True)
    total, reached = math.fsum(ordered), 0.0
    for gain in ordered:
        reached += gain
        if reached >= coverage * total:
            return gain
    return 0.0
