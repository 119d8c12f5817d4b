"""The input of a forward call, checked once.

Shapes: B batch, T tokens of this call, D width, N tokens in question.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .cache import DuoCache, PassCache
from .families import stable_positions
from .masks import DOCUMENT, NEVER, document_masks

LOSS_ARGUMENTS = {"num_items_in_batch"}
NO_SUCH_OUTPUT = {"output_attentions", "output_hidden_states"}


@dataclass
class Tokens:
    """The checked input of one forward call."""

    ids: Tensor | None  # [B, T]
    embeds: Tensor | None  # [B, T, D], instead of ids
    valid: Tensor  # [B, T] bool, False at padding
    positions: Tensor  # [B, T] int64
    order_keys: Tensor  # [B, T] int64: the positions, where a row holds one document (masks.py)
    padded: bool  # any padding in this call
    explicit: bool  # positions were given by the caller
    documents: bool  # a row holds several documents

    @classmethod
    def check(
        cls,
        ids: Tensor | None,
        embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> Tokens:
        """Raises `ValueError` for inputs that do not fit each other."""
        if (ids is None) == (embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        B, T = (ids if ids is not None else embeds).shape[:2]  # type: ignore[union-attr]
        if B == 0 or T == 0:
            raise ValueError(f"the input is empty (shape [{B}, {T}]); give at least one token")
        if cache is not None and not isinstance(cache, DuoCache):
            raise ValueError(f"the cache is a {type(cache).__name__}; a TaH model needs a tah.DuoCache, or none")
        device = (ids if ids is not None else embeds).device  # type: ignore[union-attr]
        valid, padded = torch.ones(B, T, dtype=torch.bool, device=device), False
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
                raise ValueError(
                    f"attention_mask of shape {list(attention_mask.shape)} does not cover an input of [{B}, {T}]; "
                    "give 0/1 per token, [B, T] or [B, cached + T]"
                )
            valid = attention_mask[:, -T:].bool().to(device)
            padded = not bool(valid.all())
        if position_ids is None:
            positions = _count(valid, padded, cache)
        else:
            if position_ids.shape[-1] != T or position_ids.dim() != 2:
                raise ValueError(f"position_ids of shape {list(position_ids.shape)} do not fit [{B}, {T}]")
            positions = position_ids.to(device).expand(B, T)
        tokens = cls(ids, embeds, valid, positions, positions, padded, position_ids is not None, False)
        if tokens.explicit and T > 1:
            tokens._tell_documents_apart(continued=cache is not None and cache.get_seq_length() > 0)
        return tokens

    def _tell_documents_apart(self, continued: bool) -> None:
        """A position that does not exceed that of the row's real token before begins another document of the row
        (transformers' convention for packed rows).

        Raises:
            ValueError: in the middle of a cached sequence, where positions must rise.
        """
        index = torch.arange(self.valid.shape[1], device=self.valid.device).expand_as(self.valid)
        before = torch.where(self.valid, index, -1).cummax(1).values[:, :-1]  # the newest real token, -1 for none
        earlier = self.positions.gather(1, before.clamp(min=0))
        begins = self.valid[:, 1:] & (before >= 0) & (self.positions[:, 1:] <= earlier)
        self.documents = bool(begins.any())
        if self.documents and continued:
            raise ValueError("position_ids must rise along each row where a cache is continued")
        if self.documents:
            number = torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
            self.order_keys = self.positions + number * DOCUMENT

    def check_others(self, kwargs: dict[str, Any], **labels: Tensor | None) -> None:
        """Labels fit the input, and nothing was asked for that would silently not happen (`kwargs`: the rest)."""
        shape = tuple(self.valid.shape)
        for name, tensor in labels.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} of shape {list(tensor.shape)} do not fit an input of shape {list(shape)}")
        for name in NO_SUCH_OUTPUT & set(kwargs):
            if kwargs.pop(name):
                raise ValueError(f"{name} is not supported: passes at different depths cover different tokens")
        if strange := set(kwargs) - LOSS_ARGUMENTS:
            raise TypeError(f"TaHForCausalLM.forward got unexpected arguments: {', '.join(sorted(strange))}")

    @staticmethod
    def check_length(length: int, config: PreTrainedConfig) -> None:
        """Raises `ValueError` where a sequence is longer than this base can be run at two depths over."""
        limit = stable_positions(config)
        if limit is not None and length > limit:
            raise ValueError(
                f"{length} tokens: beyond {limit} this base's rotary embedding depends on the length of a pass, so "
                "deeper passes would not match depth 1; use shorter inputs or policy='never'"
            )

    def open_pass(self, cache: DuoCache, deeper: bool) -> PassCache:
        """Reserve depth-1 slots in the cache for these tokens; `deeper`: deeper passes may follow."""
        return cache.open_pass(self.order_keys, self.valid, self.padded, self.documents, deeper)

    def stock_inputs(self, pass_cache: PassCache | None, decoder: PreTrainedModel) -> dict[str, Any]:
        """Arguments of the depth-1 pass: what a user of the plain base would give it."""
        if self.documents:
            masks = document_masks(decoder.config, self.order_keys, self.valid, decoder.dtype)
            return self._inputs(masks, self.positions)
        mask = pass_cache.padding_mask() if pass_cache is not None else self.valid if self.padded else None
        # Without a cache, positions that merely count are left to the base: it treats given ones as a sign of packing.
        count = pass_cache is None and not self.padded and not self.explicit
        return self._inputs(None if mask is None else mask.long(), None if count else self.positions)

    def _inputs(self, attention_mask: Any, position_ids: Tensor | None) -> dict[str, Any]:
        given = {"inputs_embeds": self.embeds} if self.ids is None else {"input_ids": self.ids}
        return given | {"attention_mask": attention_mask, "position_ids": position_ids}

    def indices(self) -> Tensor:
        """[N] flat indices of the real tokens."""
        if self.padded:
            return self.valid.flatten().nonzero().squeeze(1)
        return torch.arange(self.valid.numel(), device=self.valid.device)

    def select(self, x: Tensor | None, tokens: Tensor) -> Tensor | None:
        """[B, T] -> [N], or None for None."""
        return None if x is None else x.flatten()[tokens]


def check_ids(ids: Iterable[int], model: PreTrainedModel, what: str, why: str) -> None:
    """That a model has an embedding for every token. torch's own error is an index on a CPU, and on a GPU it ends the
    whole process.

    Args:
        ids: tokens.
        what: has these tokens.
        why: it may have others than the model has.

    Raises:
        ValueError: it has none for one of them.
    """
    size = model.get_input_embeddings().weight.shape[0]
    most = max(ids, default=0)
    if most >= size:
        raise ValueError(f"{what} has the token {most}, but the model only {size}: {why}")


def _count(valid: Tensor, padded: bool, cache: DuoCache | None) -> Tensor:
    """Positions [B, T] of tokens that nobody gave positions for: the number of real tokens before each, >= 0."""
    B, T = valid.shape
    seen: int | Tensor = cache.get_seq_length() if cache is not None else 0
    if cache is not None and cache.has_padding:
        seen = (cache.order_keys.view != NEVER).sum(1, keepdim=True)
    if padded:
        return (valid.cumsum(1) - 1 + seen).clamp(min=0)
    return (torch.arange(T, device=valid.device) + seen).expand(B, T)
