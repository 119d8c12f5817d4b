"""Additions to the `generate` of transformers: the cache of a TaH model, checks, and the depth of every token.

Shapes: B rows, S tokens of a finished sequence, T tokens of one step.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from .core.cache import DuoCache
from .core.compat import CACHE
from .policy import Rule

RULE_ARGUMENTS = tuple(Rule().arguments())  # policy, threshold, max_depth
KEPT = (*RULE_ARGUMENTS, "depth_labels", "attention_mask")  # arguments on which the depths of a sequence depend

# Settings of a generation_config.json by kind: those that occur in published models, not all settings.
SETTINGS = {
    "whole numbers": ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    "whole number": (
        *("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
        *("top_k", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_assistant_tokens", "prompt_lookup_num_tokens"),
    ),
    "number": (
        *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
        *("encoder_repetition_penalty", "length_penalty", "diversity_penalty", "guidance_scale", "max_time", "top_h"),
    ),
    "truth": ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "output_scores"),
}
KINDS = {
    "whole numbers": "a whole number or a list of them",
    "whole number": "a whole number",
    "number": "a number",
    "truth": "true or false",
}

# Arguments of the running `generate` after transformers added its own, such as an inferred mask.
_model_kwargs: ContextVar[dict[str, Any]] = ContextVar("tah_model_kwargs")


class RefuseNaN(LogitsProcessor):
    """Processor that raises at the first step with NaN logits. Without it, generation would return token 0 forever."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [B, V] unchanged, or raise `ValueError`."""
        bad = scores.isnan().any(dim=-1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"the logits of token {input_ids.shape[1]} of row {row} are NaN; the weights of the model are damaged"
            )
        return scores


class TaHGeneration:
    """Mixin over `GenerationMixin` that passes `policy`, `threshold` and `max_depth` (or [B], per row) to `forward`."""

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does. With `return_dict_in_generate=True` the result has further entries:

        * `depth_count` [B, S] int64: passes of the token at each position. Entry t is the number of passes before token
          t + 1 was predicted. It is 0 at the last token, which did not run.
        * `continue_logits` and `continue_prob` [B, S, max_depth - 1]: the policy's continue logits and their sigmoid,
          nan where there was no decision.
        * `mixture_weights` [B, S, max_depth], if the output is a mixture: the weight of each pass in the prediction of
          the next token, 0 for a pass that did not run.

        With `inputs_embeds`, S includes the prompt, although `sequences` does not contain it.

        Args:
            inputs: Prompt [B, T].
            generation_config: As in transformers.
            logits_processor: As in transformers.
            args: As in transformers.
            kwargs: As in transformers; also `policy`, `threshold`, `max_depth` and `depth_labels`.

        Raises:
            ValueError: The prompt is empty or longer than the model's positions, the logits are NaN, or an output is
                not supported.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        self._check_prompt(prompt, kwargs.get("attention_mask"))
        for name in RULE_ARGUMENTS:
            if isinstance(kwargs.get(name), (list, tuple)):  # transformers repeats tensors for beams, not lists
                kwargs[name] = torch.tensor(kwargs[name])
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported: passes at different depths cover different tokens")
        if kwargs.get("depth_labels") is not None and kwargs.get("inputs_embeds") is not None:
            raise ValueError("depth_labels need input_ids: labels of generated tokens follow those of the prompt")
        processors = LogitsProcessorList([*(logits_processor or []), RefuseNaN()])
        token = _model_kwargs.set({})
        try:
            out = super().generate(inputs, generation_config, processors, *args, **kwargs)  # type: ignore[misc]
            if not isinstance(out, Tensor) and hasattr(out, "sequences"):
                prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
                prompts = 1 if prompt is None else len(prompt)
                out["depth_count"], out["continue_logits"] = self._depths(out, prompts)
                out["continue_prob"] = out["continue_logits"].sigmoid()
                weights = self.mixture_weights(out["depth_count"], out["continue_logits"])  # type: ignore[attr-defined]
                if weights is not None:
                    out["mixture_weights"] = weights
        finally:
            _model_kwargs.reset(token)
        return out

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `NotImplementedError`: transformers' continuous batching has no place for keys of deeper passes."""
        raise NotImplementedError("continuous batching of TaH models is in vLLM: use tah serve or vllm.LLM(MODEL)")

    def _check_prompt(self, prompt: Any, mask: Any) -> None:
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[attr-defined]
        if not isinstance(prompt, Tensor) or prompt.dim() != 2:
            return
        if prompt.shape[1] == 0:
            raise ValueError("the prompt is empty; give at least one token")
        length = prompt.shape[1]
        if limit is not None and length > limit and isinstance(mask, Tensor) and mask.dim() == 2:
            length = int(mask.sum(1).max())
        if limit is not None and length > limit:
            raise ValueError(f"the prompt has {length} tokens but the model has only {limit} positions")

    @torch.no_grad()
    def _depths(self, out: Any, prompts: int) -> tuple[Tensor, Tensor]:
        """Return depth counts [B, S] and continue logits [B, S, max_depth - 1] of finished sequences of `prompts` rows.

        They come from the cache. After beam search the rows of the cache are not the sequences. One more forward over
        the finished sequences then gives the same depths as generating them.
        """
        cache, sequences = getattr(out, CACHE, None), out.sequences
        given, (rows, length) = _model_kwargs.get(), sequences.shape
        beams = getattr(out, "beam_indices", None) is not None or hasattr(out, "sequences_scores")
        if isinstance(cache, DuoCache) and not beams and cache.continue_logits is not None:
            count, logits = cache.depth_count.view, cache.continue_logits.view
            if given.get("inputs_embeds") is None:
                count, logits = count[:, : length - 1], logits[:, : length - 1]
        else:
            kept = {name: _as_rows(given[name], prompts, rows) for name in KEPT if given.get(name) is not None}
            for name, fill in (("attention_mask", 1), ("depth_labels", 1)):
                if name in kept:
                    kept[name] = F.pad(kept[name], (0, length), value=fill)[:, : length - 1]
            again = self(sequences[:, :-1], logits_to_keep=1, use_cache=False, **kept)  # type: ignore[operator]
            count, logits = again.depth_count, again.continue_logits
        return F.pad(count, (0, 1)), F.pad(logits, (0, 0, 0, 1), value=float("nan"))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        depth_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the next step, with the depth labels of its tokens."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        known = _parameters(type(self).forward)  # type: ignore[attr-defined]
        # transformers has checked the arguments and adds some that `forward` does not have, such as a tokenizer.
        inputs = {name: value for name, value in inputs.items() if name in known}
        if (labels := depth_labels) is not None:  # labels cover the prompt; a generated token has label 1
            step = inputs["input_ids"].shape[1]
            labels = F.pad(labels, (0, max(0, input_ids.shape[1] - labels.shape[1])), value=1)
            inputs["depth_labels"] = labels[:, input_ids.shape[1] - step : input_ids.shape[1]]
        return inputs

    @staticmethod
    def arguments_of_assistant(assistant: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments for an assistant model. One that is not a TaH model has no policy."""
        if assistant is None or isinstance(assistant, TaHGeneration):
            return given
        return {name: value for name, value in given.items() if name not in (*RULE_ARGUMENTS, "depth_labels")}

    def prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Add a `DuoCache` to the arguments of a `generate` that has no cache.

        Args:
            generation_config: As in transformers.
            model_kwargs: Arguments of the model, changed in place.

        Raises:
            ValueError: The configuration names another kind of cache.
        """
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={wanted!r} is not supported; a TaH model uses a DuoCache")
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = DuoCache()
        _model_kwargs.get().update(model_kwargs)


def check_generation_config(config: Any, source: str) -> None:
    """Check the types of the settings of a generation_config.json. transformers checks few of them before use.

    Args:
        config: The `generation_config` of a model.
        source: Name of the model, for the message.

    Raises:
        ValueError: A setting has a wrong type.
    """
    for kind, names in SETTINGS.items():
        for name in names:
            value = getattr(config, name, None)
            each = value if kind == "whole numbers" and isinstance(value, list) else [value]
            if not all(entry is None or _is(entry, kind) for entry in each) or (name, value) == ("eos_token_id", []):
                shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
                raise ValueError(f"generation_config.json of {source}: {name}={shown} must be {KINDS[kind]}")


def _is(value: Any, kind: str) -> bool:
    if kind == "truth":
        return isinstance(value, bool)
    return isinstance(value, int if kind != "number" else (int, float)) and not isinstance(value, bool)


def _as_rows(value: Any, prompts: int, rows: int) -> Any:
    """Return a per-row tensor for the rows of the finished sequences.

    transformers repeats it for each prompt, for the beams or for the returned sequences, whichever are more.
    """
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[:: len(value) // prompts].repeat_interleave(rows // prompts, dim=0)


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
