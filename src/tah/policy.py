"""Policies: which tokens iterate, method.md (3).

Shapes: B rows of a call, N tokens that ran the pass, n tokens of a chunk, D width, V vocabulary.

A policy is any callable from a [`DepthState`] to continue logits [N]. A token takes another pass if sigmoid(logit) >
threshold, strictly. +inf and -inf (or True and False of a bool tensor) decide for every threshold. A policy can be a
small class:

    class EveryThird(Policy):
        def __call__(self, state):
            return state.positions % 3 == 0

    model.generate(**inputs, policy=EveryThird())

A policy may also return a pair: continue logits, by which a mixture weighs the passes, and decisions [N] bool.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import TaHConfig, check_max_depth, check_threshold
from .names import CONFIDENCE_MEASURES, POLICIES, unknown


class MapLogits(Protocol):
    """Function that applies another function to the accumulated logits of the tokens of a `DepthState`."""

    def __call__(self, f: Callable[[Tensor], Tensor], /, ahead: bool = False) -> Tensor: ...


@dataclass
class DepthState:
    """The state of N tokens after a pass, from which a policy decides."""

    depth: int  # depth of the pass that just ran, >= 1
    input_ids: Tensor | None  # [N]; None if the model was given embeddings
    positions: Tensor  # [N] position ids
    hidden: dict[int, Tensor]  # hidden state k -> [N, D], for the k in the policy's `layers`
    depth_labels: Tensor | None  # [N] passes that each token should take, if the call has labels
    map_logits: MapLogits
    """`map_logits(f)` applies f: [n, V] -> [n, ...] to the accumulated logits, a chunk of tokens at a time, so that no
    [N, V] is needed. Call it only while the policy runs, because later passes add to the same sums. With `ahead=True`
    it also prepares the next input of these tokens; use this in a policy that makes most of them iterate."""
    map_pass_logits: Callable[[Callable[[Tensor], Tensor]], Tensor]
    """`map_pass_logits(f)` does the same with the logits of the last pass alone."""
    embeds: Callable[[], Tensor]  # `embeds()` returns the token embeddings [N, D], the inputs of depth 1


class Policy:
    """Base class of policies.

    Attributes:
        layers: Indices of the hidden states that the policy reads (0: input of the first layer, L: after the final
            norm). Only these are kept.
    """

    layers: tuple[int, ...] = ()

    def __call__(self, state: DepthState) -> Tensor:
        """Return continue logits [N]."""
        raise NotImplementedError

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def _constant(state: DepthState, value: float) -> Tensor:
    return torch.full(state.positions.shape, value, device=state.positions.device)


class Always(Policy):
    """Every token takes all passes."""

    def __call__(self, state: DepthState) -> Tensor:
        return _constant(state, math.inf)


class Never(Policy):
    """Every token stops after depth 1, so the output is that of the base."""

    def __call__(self, state: DepthState) -> Tensor:
        return _constant(state, -math.inf)


class Oracle(Policy):
    """A token takes as many passes as its depth label, or one if there are no labels."""

    def __call__(self, state: DepthState) -> Tensor:
        if state.depth_labels is None:
            return _constant(state, -math.inf)
        return torch.where(state.depth_labels > state.depth, math.inf, -math.inf)


class Confidence(Policy):
    """Tokens with a low confidence iterate. This policy needs no training.

    The continue probability is 1 - confidence. With threshold t a token iterates if its confidence is below 1 - t.

    Args:
        measure: Measure of the confidence: `probability`, the largest probability, or `entropy`, exp(-entropy) with the
            entropy in nats.
    """

    def __init__(self, measure: str = "probability") -> None:
        if measure not in CONFIDENCE_MEASURES:
            raise ValueError(unknown("confidence measure", measure, CONFIDENCE_MEASURES))
        self.measure = measure

    @torch.no_grad()
    def __call__(self, state: DepthState) -> Tensor:
        """Return the logit of 1 - confidence, [N]."""
        confidence = state.map_logits(self._confidence)
        return torch.logit(1 - confidence)

    def _confidence(self, logits: Tensor) -> Tensor:
        logp = logits.float().log_softmax(-1)
        if self.measure == "probability":
            return logp.amax(-1).exp()
        return (-torch.special.entr(logp.exp()).sum(-1)).exp()


class Random(Policy):
    """A given share of tokens iterates, chosen by a hash. This is a control for other policies.

    The choice depends only on seed, position, depth and token id, so it is the same in any batch, with or without a
    cache.

    Args:
        rate: Share of tokens, in [0, 1].
        seed: Random seed.

    Raises:
        ValueError: The rate is out of range.
    """

    def __init__(self, rate: float = 0.07, seed: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"random rate {rate!r} must be in [0, 1]")
        self.rate, self.seed = rate, seed

    def __call__(self, state: DepthState) -> Tensor:
        return torch.where(draw(state, self.seed) < self.rate, math.inf, -math.inf)


def draw(state: DepthState, seed: int) -> Tensor:
    """Return a number [N] float64 in [0, 1) for each token, a hash of seed, position, depth and token id."""
    draw = torch.full_like(state.positions, _scramble(seed))  # else seed 1 at t would be seed 0 at t + 1
    for part in (state.positions, torch.full_like(state.positions, state.depth), state.input_ids):
        if part is not None:
            draw = _scramble(draw + part)
    return draw.double() / 2**31


def _scramble(x: Any) -> Any:
    """Return a bijective mix of 31-bit integers, of a tensor or of one number: multiply and shift, twice. 0 gives 0."""
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = (x ^ (x >> 16)) * multiplier & 0x7FFFFFFF
    return x ^ (x >> 16)


def build_policy(name: str, config: TaHConfig) -> Policy:
    """Return the policy of this name with the settings of a configuration.

    The policy `decider` is part of the model and not made here.

    Raises:
        ValueError: The name is unknown.
    """
    match name:
        case "oracle":
            return Oracle()
        case "always":
            return Always()
        case "never":
            return Never()
        case "confidence":
            return Confidence(config.confidence_measure)
        case "random":
            return Random(config.random_rate, config.random_seed)
    raise ValueError(unknown("policy", name, POLICIES))


@dataclass(frozen=True)
class Rule:
    """Policy, threshold and maximum depth of a call, a command or a request.

    None stands for the value of the model's configuration.

    Args:
        policy: Name of a policy, or a [`Policy`].
        threshold: Threshold in [0, 1], or one per row [B].
        max_depth: Most passes, >= 1, or one value per row [B].
    """

    policy: str | Callable[[DepthState], Tensor] | None = None
    threshold: float | Tensor | None = None
    max_depth: int | Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the three values as arguments of `forward` and `generate`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def draws(self, config: TaHConfig) -> bool:
        """Return whether the decisions are drawn with the continue probability, so that the threshold has no effect."""
        return self.completed(config).policy == "decider" and config.decision == "sample"

    def completed(self, config: TaHConfig) -> Rule:
        """Return the rule with the configuration's values instead of None."""
        given = self.arguments()
        return Rule(**{name: getattr(config, name) if value is None else value for name, value in given.items()})

    def bind(
        self,
        config: TaHConfig,
        decider: Callable[[DepthState], Tensor] | None,
        rows: int,
        follow_labels: bool = False,
    ) -> BoundRule:
        """Return the checked rule of a call.

        Args:
            config: Configuration of the model.
            decider: Decider of the model, or None.
            rows: Number B of rows.
            follow_labels: Whether the depth labels decide instead of the policy.

        Raises:
            ValueError: The policy is unknown, or threshold or max_depth are out of range or not one per row.
        """
        policy, threshold, max_depth = self.completed(config).arguments().values()
        # The model's own decider may also be given as an object.
        draws = config.decision == "sample" and decider is not None and policy in ("decider", decider)
        if draws and (isinstance(threshold, Tensor) or threshold != config.threshold):
            raise ValueError("threshold has no effect with decision='sample', which draws the decisions; leave it out")
        if policy == "decider":
            if decider is None:
                raise ValueError("this model has no decider; give another policy, such as confidence")
            policy = decider
        elif isinstance(policy, str):
            policy = build_policy(policy, config)
        elif not callable(policy):
            raise ValueError(f"policy={policy!r} is neither a name nor a Policy")
        threshold = _per_row("threshold", threshold, rows, check_threshold)
        max_depth = _per_row("max_depth", max_depth, rows, check_max_depth)
        by_row = max_depth if isinstance(max_depth, Tensor) else None
        deepest = 1 if isinstance(policy, Never) else max_depth if by_row is None else int(by_row.max())
        seed = config.random_seed if draws else None
        return BoundRule(policy, threshold, deepest, by_row, follow_labels, seed)


def continues(logits: Tensor, bound: float | Tensor) -> Tensor:
    """Return whether sigmoid(logit) is larger than a bound, [N] bool; always True if the logit is +inf.

    Args:
        logits: Continue logits [N]. The sigmoid is computed in their precision.
        bound: Threshold, one or one per token [N].
    """
    return (logits.sigmoid().float() > bound) | (logits == math.inf)


@dataclass(frozen=True)
class BoundRule:
    """A rule whose policy is a function and whose values are checked for the rows of one call."""

    policy: Callable[[DepthState], Tensor]
    threshold: float | Tensor  # one, or one per row [B]
    max_depth: int  # the largest of all rows
    row_depth: Tensor | None = None  # [B] maximum depth of each row, if rows differ
    follow_labels: bool = False  # whether the depth labels decide instead of the policy
    seed: int | None = None  # seed of decisions that are drawn with the continue probability; None: threshold

    def decide(self, state: DepthState, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return continue logits [N] and, as [N] bool, which tokens take another pass, method.md (3).

        A token continues if sigmoid(logit), computed in the precision of the logits, is larger than the threshold (or,
        with a seed, than a random number), and always if the logit is +inf.

        Args:
            state: State of the N tokens that just ran.
            row: Batch row [N] of each token.

        Raises:
            ValueError: The policy returned NaN, another shape or another type, or labels are missing.
        """
        found: Any = self.policy(state)
        logits, forced = found if isinstance(found, tuple) else (found, None)
        if not isinstance(logits, Tensor) or not (logits.is_floating_point() or logits.dtype == torch.bool):
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the policy returned {kind}; return a tensor of floating point logits or bool, [N]")
        logits = logits.to(row.device)
        if logits.shape != row.shape:
            shape = list(logits.shape)
            raise ValueError(f"the policy returned a tensor of shape {shape} for {len(row)} tokens; return [N]")
        if logits.dtype == torch.bool:
            logits = torch.where(logits, math.inf, -math.inf)
        if logits.isnan().any():
            raise ValueError(
                f"the policy returned NaN after depth {state.depth}: hidden states or logits are not finite"
            )
        bound = self.threshold.to(row.device)[row] if isinstance(self.threshold, Tensor) else self.threshold
        if self.seed is not None:
            bound = draw(state, self.seed)
        go = continues(logits, bound)
        if forced is not None:
            if not isinstance(forced, Tensor) or forced.dtype != torch.bool or forced.shape != row.shape:
                raise ValueError(f"the policy returned decisions that are not a bool tensor of [{len(row)}]")
            go = forced.to(row.device)
        if self.follow_labels:  # last, so that labels decide over a policy that returns decisions, too
            if state.depth_labels is None:
                raise ValueError("follow_labels needs depth_labels")
            go = torch.where(state.depth_labels == 0, go, state.depth_labels > state.depth)
        if self.row_depth is not None:  # in a row at its maximum depth there is no decision
            asked = self.row_depth.to(row.device)[row] > state.depth
            logits, go = torch.where(asked, logits, math.nan), go & asked
        return logits, go


def _per_row(name: str, value: Any, rows: int, check: Callable[[Any], None]) -> Any:
    """Return a checked number, or a checked tensor [B]."""
    if isinstance(value, (list, tuple)):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        check(value)
        return value
    if value.dim() == 0:
        check(value.item())
        return value.item()
    if value.shape != (rows,):
        raise ValueError(f"{name} has shape {list(value.shape)}; give one value, or one per row: [{rows}]")
    for entry in value.tolist():
        check(entry)
    return value
