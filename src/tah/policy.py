"""Who iterates: policies map the state after a pass to continue logits.

Shapes: N tokens that ran the pass, D width, V vocabulary, k entries of a top-k.

A policy is any callable from a [`DepthState`] to [N] continue logits; a token runs another pass iff
sigmoid(logit) > threshold, strictly. +inf and -inf (or a bool tensor) decide whatever the threshold is. Writing one
takes a small class:

    class EveryThird(Policy):
        def __call__(self, state):
            return state.positions % 3 == 0

    model.generate(**inputs, policy=EveryThird())
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
    def __call__(self, f: Callable[[Tensor], Tensor], /, ahead: bool = False) -> Tensor: ...


@dataclass
class DepthState:
    """What is known about N tokens after they ran pass `depth`."""

    depth: int  # the pass just run, >= 1
    input_ids: Tensor | None  # [N]; None when the model was given embeddings
    positions: Tensor  # [N] position ids
    hidden: dict[int, Tensor]  # hidden state k -> [N, D], for the k in the policy's `layers`
    depth_labels: Tensor | None  # [N] passes each token should take, where known
    map_logits: MapLogits
    """`map_logits(f)` applies f: [n, V] -> [n, ...] to the accumulated logits, a chunk of tokens at a time, so that
    no [N, V] needs to exist. Only while the policy runs: later passes add to the same sums. With `ahead=True` it also
    prepares the next input of these tokens: for a policy that lets most of them go on."""


class Policy:
    """Base class of policies.

    Attributes:
        layers: hidden states it reads (0 = input embedding, L = after the final norm); only these are kept.
    """

    layers: tuple[int, ...] = ()

    def __call__(self, state: DepthState) -> Tensor:
        """Continue logits [N]."""
        raise NotImplementedError

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def _constant(state: DepthState, value: float) -> Tensor:
    return torch.full(state.positions.shape, value, device=state.positions.device)


class Always(Policy):
    """Every token runs every depth."""

    def __call__(self, state: DepthState) -> Tensor:
        return _constant(state, math.inf)


class Never(Policy):
    """Every token stops after depth 1: the plain base model."""

    def __call__(self, state: DepthState) -> Tensor:
        return _constant(state, -math.inf)


class Oracle(Policy):
    """A token runs as many passes as its depth label says; one where there is none."""

    def __call__(self, state: DepthState) -> Tensor:
        if state.depth_labels is None:
            return _constant(state, -math.inf)
        return torch.where(state.depth_labels > state.depth, math.inf, -math.inf)


class Confidence(Policy):
    """Training-free: iterate where the logits so far are not confident.

    Its probability of continuing is 1 - confidence, so with threshold t a token iterates iff confidence < 1 - t.

    Args:
        measure: `probability` of the top-1 token, or exp(-`entropy`) with the entropy in nats.
    """

    def __init__(self, measure: str = "probability") -> None:
        if measure not in CONFIDENCE_MEASURES:
            raise ValueError(unknown("confidence measure", measure, CONFIDENCE_MEASURES))
        self.measure = measure

    @torch.no_grad()
    def __call__(self, state: DepthState) -> Tensor:
        confidence = state.map_logits(self._confidence)
        return torch.logit(1 - confidence)

    def _confidence(self, logits: Tensor) -> Tensor:
        logp = logits.float().log_softmax(-1)
        if self.measure == "probability":
            return logp.amax(-1).exp()
        return (-torch.special.entr(logp.exp()).sum(-1)).exp()


class Random(Policy):
    """Iterate a given share of tokens, chosen by a hash: a control for policies that claim to choose well.

    The choice depends on seed, position, depth and token id only, so it is the same in any batch, with or without a
    cache.

    Args:
        rate: share of tokens, in [0, 1].
        seed: another seed chooses other tokens.
    """

    def __init__(self, rate: float = 0.07, seed: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"random rate {rate!r} must be in [0, 1]")
        self.rate, self.seed = rate, seed

    def __call__(self, state: DepthState) -> Tensor:
        draw = torch.full_like(state.positions, self.seed)
        for part in (state.positions, torch.full_like(state.positions, state.depth), state.input_ids):
            if part is not None:
                draw = _scramble(draw + part)
        return torch.where(draw.double() / 2**31 < self.rate, math.inf, -math.inf)


def _scramble(x: Tensor) -> Tensor:
    """A bijective mix of 31-bit integers (multiply and shift, twice)."""
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = (x ^ (x >> 16)) * multiplier & 0x7FFFFFFF
    return x ^ (x >> 16)


def build_policy(name: str, config: TaHConfig) -> Policy:
    """The policy of this name with the config's settings; not for `decider`, which the model holds.

    Raises:
        ValueError: an unknown name.
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
    """Who iterates in a call, a command or a request. What is None is as the model's configuration says.

    Args:
        policy: a name, or a [`Policy`].
        threshold: in [0, 1], or one per row [B].
        max_depth: >= 1, or one per row [B].
    """

    policy: str | Callable[[DepthState], Tensor] | None = None
    threshold: float | Tensor | None = None
    max_depth: int | Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """As arguments of `forward` and `generate`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def completed(self, config: TaHConfig) -> Rule:
        """With the configuration's values in the place of None."""
        given = self.arguments()
        return Rule(**{name: getattr(config, name) if value is None else value for name, value in given.items()})

    def bind(
        self,
        config: TaHConfig,
        decider: Callable[[DepthState], Tensor] | None,
        rows: int,
        follow_labels: bool = False,
    ) -> BoundRule:
        """The rule of a call on B = `rows` rows, checked.

        Raises:
            ValueError: an unknown policy, or a threshold or max_depth out of range or not one per row.
        """
        policy, threshold, max_depth = self.completed(config).arguments().values()
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
        return BoundRule(policy, threshold, deepest, by_row, follow_labels)


@dataclass(frozen=True)
class BoundRule:
    """A rule with its policy found and its values checked for the rows of one call."""

    policy: Callable[[DepthState], Tensor]
    threshold: float | Tensor  # or [B]
    max_depth: int  # of the deepest row
    row_depth: Tensor | None = None  # [B] where rows differ
    follow_labels: bool = False  # the policy is asked, the depth labels decide

    def decide(self, state: DepthState, row: Tensor) -> tuple[Tensor, Tensor]:
        """Ask the policy: continue logits [N] and who goes on [N] bool.

        Continue iff sigmoid(logit), in the policy's own precision, > threshold, strictly; +inf always does.

        Args:
            state: of the N tokens that just ran.
            row: [N] batch row of each.

        Raises:
            ValueError: the policy gave NaN.
        """
        logits = self.policy(state).to(row.device)
        if logits.shape != row.shape:
            raise ValueError(f"the policy gave a tensor of shape {list(logits.shape)} for {len(row)} tokens; give [N]")
        if logits.dtype == torch.bool:  # plain yes and no
            logits = torch.where(logits, math.inf, -math.inf)
        if logits.isnan().any():
            raise ValueError(f"the policy gave NaN after depth {state.depth}: hidden states or logits are not finite")
        threshold = self.threshold.to(row.device)[row] if isinstance(self.threshold, Tensor) else self.threshold
        go = (logits.sigmoid().float() > threshold) | (logits == math.inf)
        if self.follow_labels:
            if state.depth_labels is None:
                raise ValueError("follow_labels needs depth_labels")
            go = state.depth_labels > state.depth
        if self.row_depth is not None:  # a row at its own limit was not really asked
            asked = self.row_depth.to(row.device)[row] > state.depth
            logits, go = torch.where(asked, logits, math.nan), go & asked
        return logits, go


def _per_row(name: str, value: Any, rows: int, check: Callable[[Any], None]) -> Any:
    """A checked scalar, or a checked tensor [B]."""
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
