"""What a TaH model adds to transformers' own `generate`: its cache, clear errors, and the depth of every token.

Shapes: B rows, S tokens of a finished sequence, T tokens of one step.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from .cache import DuoCache

RULE_ARGUMENTS = ("policy", "threshold", "max_depth")


class RefuseNaN(LogitsProcessor):
    """Stops generation at the first step whose logits are not numbers, instead of emitting token 0 for ever."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = scores.isnan().any(dim=-1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"the model gave NaN logits for token {input_ids.shape[1]} of row {row}; its weights are bad"
            )
        return scores


class TaHGeneration:
    """Mixin over `GenerationMixin`. `policy`, `threshold` and `max_depth` (per row: tensors [B]) go to `forward`."""

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`. With `return_dict_in_generate=True` the result also has

        * `depth_count` [B, S] int64: passes the token at each position took as input, so entry t is what it cost to
          predict token t + 1; 0 at the last token, which was produced but never run;
        * `continue_logits` [B, S, max_depth - 1]: the policy's logit for going on (nan where it was not asked).

        Raises:
            ValueError: an empty prompt, one longer than the model's positions, or NaN logits.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[attr-defined]
        if isinstance(prompt, Tensor) and prompt.dim() == 2:
            if prompt.shape[1] == 0:
                raise ValueError("the prompt is empty; give at least one token")
            if limit is not None and prompt.shape[1] >= limit:
                raise ValueError(f"the prompt has {prompt.shape[1]} tokens but the model only {limit} positions")
        given = kwargs.pop("logits_processor", None) or []
        kwargs["logits_processor"] = LogitsProcessorList([*given, RefuseNaN()])
        out = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        if not isinstance(out, Tensor) and hasattr(out, "sequences"):
            out["depth_count"], out["continue_logits"] = self._depths(out, kwargs)
        return out

    @torch.no_grad()
    def _depths(self, out: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Depths and continue logits of finished sequences [B, S], from the cache or from one more forward.

        The rows of the cache are the sequences, except after beam search; running the finished sequences at once
        gives the same depths as generating them did.
        """
        cache, sequences = getattr(out, "past_key_values", None), out.sequences
        steps = sequences.shape[1] - 1
        beams = getattr(out, "beam_indices", None) is not None or hasattr(out, "sequences_scores")
        if isinstance(cache, DuoCache) and not beams and cache.continue_logits is not None:
            count, logits = cache.depth_count.view, cache.continue_logits.view
            if kwargs.get("inputs_embeds") is None:
                count, logits = count[:, :steps], logits[:, :steps]
        else:
            mask, rows = kwargs.get("attention_mask"), sequences.shape[0]
            rule = {name: kwargs[name] for name in RULE_ARGUMENTS if kwargs.get(name) is not None}
            if mask is not None:
                mask = F.pad(mask, (0, steps - mask.shape[1]), value=1)
                mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)
            for name, value in rule.items():
                if isinstance(value, Tensor):
                    rule[name] = value.repeat_interleave(rows // value.shape[0], dim=0)
            again = self(sequences[:, :steps], attention_mask=mask, logits_to_keep=1, use_cache=False, **rule)  # type: ignore[operator]
            count, logits = again.depth_count, again.continue_logits
        return F.pad(count, (0, 1)), F.pad(logits, (0, 0, 0, 1), value=float("nan"))

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        labels = inputs.get("depth_labels")
        if labels is not None:  # labels cover the prompt; a produced token has none, which the oracle takes as 1
            step = inputs["input_ids"].shape[1]
            labels = F.pad(labels, (0, max(0, input_ids.shape[1] - labels.shape[1])), value=1)
            inputs["depth_labels"] = labels[:, input_ids.shape[1] - step : input_ids.shape[1]]
        # transformers has checked its arguments by now and hands some of its own through (a tokenizer, for one).
        known = inspect.signature(self.forward).parameters  # type: ignore[attr-defined]
        return {name: value for name, value in inputs.items() if name in known}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={wanted!r} is not supported; a TaH model uses its own DuoCache")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DuoCache()
