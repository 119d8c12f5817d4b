"""What one request may choose: `policy`, `threshold`, `max_depth`, and whether it wants the depth of every token.

vLLM takes such fields in `SamplingParams.extra_args`; over HTTP they are called `vllm_xargs`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor

from ..config import TaHConfig, check_max_depth, check_threshold

POLICIES = ("decider", "confidence", "always", "never", "random")  # `oracle` needs labels, which a prompt has none of
FIELDS = ("policy", "threshold", "max_depth", "depths")
STOCK_FIELDS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")  # vLLM's own
DEPTHS_SERVED = 2


@dataclass(frozen=True)
class Choice:
    """Who iterates in one request."""

    policy: str
    threshold: float
    max_depth: int
    report_depths: bool = False  # the response has the depth of every token

    @classmethod
    def of(cls, config: TaHConfig, extra_args: dict[str, Any] | None) -> Choice:
        """The request's, the checkpoint's filling the gaps.

        Raises:
            ValueError: a field that nobody knows, or a value out of range; its message starts with the field's name.
        """
        given = {name: value for name, value in (extra_args or {}).items() if name not in STOCK_FIELDS}
        for name in set(given) - set(FIELDS):
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{name} is not a field of vllm_xargs; {hint}it takes {', '.join(FIELDS)}")
        policy = given.get("policy", config.policy)
        if policy not in POLICIES:
            near = difflib.get_close_matches(str(policy), POLICIES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"policy={policy!r} cannot be served; {hint}choose from {', '.join(POLICIES)}")
        if policy == "decider" and config.decider is None:
            raise ValueError("policy='decider': this model has no decider; give another, such as 'confidence'")
        threshold, max_depth = given.get("threshold", config.threshold), given.get("max_depth", config.max_depth)
        check_threshold(threshold)
        check_max_depth(max_depth)
        if max_depth > DEPTHS_SERVED:
            raise ValueError(f"max_depth={max_depth} cannot be served; at most {DEPTHS_SERVED}")
        depths = given.get("depths", False)
        if depths not in (True, False):
            raise ValueError(f"depths={depths!r} must be true or false")
        return cls(policy, float(threshold), int(max_depth), bool(depths))

    @property
    def iterates(self) -> bool:
        """Whether any token may."""
        return self.max_depth > 1 and self.policy != "never"

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the depths: equal keys share cached prefixes, and only they."""
        if not self.iterates:
            return ("never",)
        if self.policy in ("always", "random"):  # they do not look at the threshold
            return (self.policy,)
        return (self.policy, self.threshold)


@dataclass
class DepthLog:
    """The passes that the tokens of one request took, and how many of those numbers its answer has brought already."""

    depths: list[int] = field(default_factory=list)  # by position, of the tokens that ran; the newest one did not
    sent: int = 0

    def news(self) -> np.ndarray:
        """What the answer lacks, [tokens] int8."""
        new = np.array(self.depths[self.sent :], dtype=np.int8)
        self.sent = len(self.depths)
        return new


class DepthParameters(LogitsProcessor):
    """No logits are processed: vLLM asks its logits processors to validate what a request brings, and answers 400."""

    config: ClassVar[TaHConfig]  # of the one model of this process; set by the plugin

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        try:
            Choice.of(cls.config, sampling_params.extra_args)
        except ValueError as error:
            field = str(error).split("=")[0].split(" ")[0]
            raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{field}") from error

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        return logits
