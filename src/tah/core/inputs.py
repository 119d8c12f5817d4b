"""The checked input of a forward call.

Shapes: B batch, T tokens of this call, D width, N chosen tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .cache import DuoCache, PassCache
from .families import stable_positions
from .loss import targets_of
from .masks import DOCUMENT, NEVER, document_masks

OTHER_ARGUMENTS = {"num_items_in_batch", "depth_labels", "shift_labels", "output_last_hidden_state"}
# Boundaries of packed rows as `DataCollatorWithFlattening` gives them. The positions contain them too.
PACKING_ARGUMENTS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
NO_SUCH_OUTPUT = {"output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class TrainingPass:
    """Arguments of a forward that only training needs.

    Args:
        follow_labels: Whether the depth labels decide who iterates, also if the policy returns decisions. The policy
            still returns its continue logits. A label of 0 leaves the decision to the policy.
        loss_weights: Weight of the output after each depth 1..max_depth, method.md (12). By default only the output
            after a token's last pass counts, method.md (10).
        idle: Whether to run one token through the deeper passes where no token iterates, and to add 0 times the result
            to the loss, or without labels to `last_hidden_state`. In distributed training (DDP, FSDP) every process
            needs a gradient for the same parameters, also for those that the loss cannot reach, such as the decider's.
            The default is True in training with labels.
        side_passes: Whether to compute `TaHOutput.pass_loss`, from which TaH2 makes its labels, method.md (16). Every
            supervised token that stops runs one more pass, without gradients and without other tokens noticing.
    """

    follow_labels: bool = False
    loss_weights: Sequence[float] | None = None
    idle: bool | None = None
    side_passes: bool = False


class ForwardKwargs(TypedDict, total=False):
    """Further arguments of `TaHForCausalLM.forward`.

    They are no parameters of its signature because `Trainer` takes every parameter with "label" in its name for a
    required label (`transformers.utils.find_labels`).

    Args:
        depth_labels: Passes [B, T] that each token should take, for the policy `oracle` and for
            `training.follow_labels`. They are not shifted, method.md (9). `Trainer` drops the column unless it gets
            `TrainingArguments(label_names=["labels", "depth_labels"])`; without labels `oracle` iterates nowhere.
        shift_labels: Token ids [B, T] that each position should predict, -100 where not supervised, instead of
            `labels`.
        num_items_in_batch: Divisor of the loss. The default is the number of supervised tokens of this call, without
            those that only padding could predict. `Trainer` counts these, too (docs/reference/limits.md).
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx: Boundaries of packed rows, from
            `DataCollatorWithFlattening`. They are ignored: `position_ids` contain the same boundaries.
        output_last_hidden_state: Whether the output has `last_hidden_state`. The default is False.
    """

    depth_labels: Tensor
    shift_labels: Tensor
    num_items_in_batch: int | Tensor
    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    seq_idx: Tensor
    output_last_hidden_state: bool


@dataclass
class Tokens:
    """The checked input of one forward call."""

    ids: Tensor | None  # [B, T]
    embeds: Tensor | None  # [B, T, D], instead of ids
    valid: Tensor  # [B, T] bool, False at padding
    positions: Tensor  # [B, T] int64
    order_keys: Tensor  # [B, T] int64; equal to the positions where a row holds one document (masks.py)
    padded: bool  # whether there is padding in this call
    explicit: bool  # whether the caller gave the positions
    documents: bool  # whether a row holds several documents

    @classmethod
    def check(
        cls,
        ids: Tensor | None,
        embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> Tokens:
        """Return the checked input of a call.

        Args:
            ids: Token ids [B, T], or None.
            embeds: Embeddings [B, T, D], or None.
            attention_mask: Mask [B, >= T] with 0 at padding.
            position_ids: Positions [B, T] or [1, T].
            cache: Cache of earlier tokens.

        Raises:
            ValueError: The inputs do not fit each other.
        """
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
            tokens._find_documents(continued=cache is not None and cache.get_seq_length() > 0)
        return tokens

    def _find_documents(self, continued: bool) -> None:
        """Set `documents` and `order_keys` from the positions.

        A position that is not larger than that of the row's last real token begins another document of the row. This is
        the convention of transformers for packed rows.

        Args:
            continued: Whether a cache holds earlier tokens.

        Raises:
            ValueError: A cached sequence is continued and its positions do not rise.
        """
        index = torch.arange(self.valid.shape[1], device=self.valid.device).expand_as(self.valid)
        before = torch.where(self.valid, index, -1).cummax(1).values[:, :-1]  # the last real token, -1 for none
        earlier = self.positions.gather(1, before.clamp(min=0))
        begins = self.valid[:, 1:] & (before >= 0) & (self.positions[:, 1:] <= earlier)
        self.documents = bool(begins.any())
        if self.documents and continued:
            raise ValueError("position_ids must rise along each row where a cache is continued")
        if self.documents:
            number = torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
            self.order_keys = self.positions + number * DOCUMENT

    def check_others(self, labels: Tensor | None, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        """Check labels and the arguments that `forward` has no parameter for.

        Args:
            labels: Token ids [B, T], not shifted, or None.
            kwargs: See `ForwardKwargs` in `model.py`.

        Returns:
            The token id [B, T] that each position should predict, `IGNORE` at padding, which predicts nothing; and its
            depth label [B, T]. None where not given.

        Raises:
            ValueError: Labels do not fit the input, or an output is not supported.
            TypeError: An argument is unknown.
        """
        targets, depth_labels = kwargs.get("shift_labels"), kwargs.get("depth_labels")
        shape = tuple(self.valid.shape)
        for name, tensor in (("labels", labels), ("shift_labels", targets), ("depth_labels", depth_labels)):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} of shape {list(tensor.shape)} do not fit an input of shape {list(shape)}")
        for name in NO_SUCH_OUTPUT & set(kwargs):
            if kwargs.pop(name):
                raise ValueError(f"{name} is not supported: passes at different depths cover different tokens")
        if strange := set(kwargs) - OTHER_ARGUMENTS - PACKING_ARGUMENTS:
            raise TypeError(f"TaHForCausalLM.forward got unexpected arguments: {', '.join(sorted(strange))}")
        shifted = targets is not None
        labels = targets if shifted else labels
        return (None if labels is None else targets_of(labels, self.valid, shifted)), depth_labels

    @staticmethod
    def check_length(length: int, config: PreTrainedConfig) -> None:
        """Check that a sequence is not too long for deeper passes of this base.

        Raises:
            ValueError: The positions of a deeper pass would be rotated differently than those of depth 1.
        """
        limit = stable_positions(config)
        if limit is not None and length > limit:
            raise ValueError(
                f"{length} tokens: beyond {limit} this base's rotary embedding depends on the length of a pass, so "
                "deeper passes would not match depth 1; use shorter inputs or policy='never'"
            )

    def open_pass(self, cache: DuoCache, deeper: bool) -> PassCache:
        """Reserve depth-1 slots in the cache for these tokens.

        Args:
            cache: The cache.
            deeper: Whether deeper passes may follow.
        """
        return cache.open_pass(self.order_keys, self.valid, self.padded, self.documents, deeper)

    def stock_inputs(self, pass_cache: PassCache | None, decoder: PreTrainedModel) -> dict[str, Any]:
        """Return the arguments of the depth-1 pass: those that a user of the base gives it."""
        if self.documents:
            masks = document_masks(decoder.config, self.order_keys, self.valid, decoder.dtype)
            return self._inputs(masks, self.positions)
        mask = pass_cache.padding_mask() if pass_cache is not None else self.valid if self.padded else None
        # Without a cache, the base counts the positions itself. It takes given positions as a sign of packed documents.
        count = pass_cache is None and not self.padded and not self.explicit
        return self._inputs(None if mask is None else mask.long(), None if count else self.positions)

    def _inputs(self, attention_mask: Any, position_ids: Tensor | None) -> dict[str, Any]:
        given = {"inputs_embeds": self.embeds} if self.ids is None else {"input_ids": self.ids}
        return given | {"attention_mask": attention_mask, "position_ids": position_ids}

    def indices(self) -> Tensor:
        """Return the flat indices [N] of the real tokens."""
        if self.padded:
            return self.valid.flatten().nonzero().squeeze(1)
        return torch.arange(self.valid.numel(), device=self.valid.device)

    def select(self, x: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Return the entries [N] of x [B, T] at the flat indices `tokens` [N], or None for None."""
        return None if x is None else x.flatten()[tokens]


def check_ids(ids: Iterable[int], model: PreTrainedModel, what: str, why: str) -> None:
    """Check that a model has an embedding for every token.

    torch raises an `IndexError` without a name on a CPU, and on a GPU the whole process ends.

    Args:
        ids: Token ids.
        model: The model.
        what: Name of the source of the tokens, for the message.
        why: Possible reason, for the message.

    Raises:
        ValueError: A token id has no embedding.
    """
    size = model.get_input_embeddings().weight.shape[0]
    most = max(ids, default=0)
    if most >= size:
        raise ValueError(f"{what} has the token {most}, but the model has only {size} tokens: {why}")


def _count(valid: Tensor, padded: bool, cache: DuoCache | None) -> Tensor:
    """Return positions [B, T]: the number of real tokens before each token, >= 0."""
    B, T = valid.shape
    seen: int | Tensor = cache.get_seq_length() if cache is not None else 0
    if cache is not None and cache.has_padding:
        seen = (cache.order_keys.view != NEVER).sum(1, keepdim=True)
    if padded:
        return (valid.cumsum(1) - 1 + seen).clamp(min=0)
    return (torch.arange(T, device=valid.device) + seen).expand(B, T)
