"""The model without its output head, for libraries that apply the head themselves."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .compat import CACHE
from .inputs import TrainingPass

NOT_SUMMED = (
    "the output is a mixture, or the head has a soft-cap or a bias, so the logits are not the head of one hidden "
    "state; train with tah train, or choose output='zero_init'"
)


class SummedStates:
    """A TaH model without its output head: input to summed hidden states, method.md (2).

    Libraries that compute logits themselves, such as TRL, apply the head to `model.base_model(...).last_hidden_state`.
    Other attributes are those of the base's decoder. A call runs no hooks of the TaH model itself. FSDP gathers weights
    in such hooks, so a forward that it wraps has to make the call, as in TRL.
    """

    def __init__(self, model: Any) -> None:
        self._tah = model

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """Run `TaHForCausalLM.forward` without its head.

        Returns:
            `last_hidden_state` [B, T, D]: the head of it is the model's logits.

        Raises:
            ValueError: The logits are not the head of one hidden state.
        """
        if not self._tah.sums_states:
            raise ValueError(NOT_SUMMED)
        # The caller computes a loss, so processes that train together run the same passes, as in a call with labels.
        given = {"training": TrainingPass(idle=self._tah.training)} | kwargs
        no_logits = {"logits_to_keep": torch.empty(0, dtype=torch.long), "output_last_hidden_state": True}
        out = type(self._tah).forward(self._tah, *args, **given | no_logits | {"return_dict": True})
        return BaseModelOutputWithPast(last_hidden_state=out.last_hidden_state, **{CACHE: getattr(out, CACHE)})

    def __getattr__(self, name: str) -> Any:
        if name == "_tah":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self._tah.decoder, name)
