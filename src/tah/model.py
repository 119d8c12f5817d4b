"""Think-at-Hard on any Hugging Face decoder. Start reading at `TaHForCausalLM.forward`.

The *depth* of a token counts its passes over the base from 1: depth 1 is the plain base model. After each pass a
*policy* decides which tokens are hard; only those run again, with LoRA active, on a new input at their old position,
and read keys of depths up to their own. The logits of all passes of a token add up.
docs/explanation/architecture.md follows one prompt through this file.

Shapes: B batch, T tokens of this call, N tokens that ran the last pass, M of them that run the next one, R rows that
hold at least one of the M, P most of the M in any row (they run packed left: [R, P]), D width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import can_return_tuple

from .checkpoints.safe import SafeCheckpoint, load_plain
from .config import TaHConfig
from .core import fast
from .core.cache import DuoCache, PassCache
from .core.compat import CACHE, PrivateHooks, allow_replay_with_cache, given_cache
from .core.depth import at_depth, replay_contexts
from .core.families import UnsupportedBase, check_base, check_facts, decoder_layers, decoder_of, head_of
from .core.head import Head
from .core.inputs import Tokens
from .core.logits import RunningOutput, TaHOutput, capture_hidden, select
from .core.lora import add_lora
from .core.loss import DepthLoss
from .core.masks import take_ready_masks
from .core.next_input import mixed_embedding
from .core.packing import lay_out, pack
from .decider import build_decider
from .generation import TaHGeneration
from .policy import BoundRule, DepthState, Policy, Rule


@dataclass(frozen=True)
class TrainingPass:
    """What only training asks of a forward.

    Args:
        follow_labels: tokens run as many passes as `depth_labels` says; the policy is asked, but not followed.
        loss_weights: weight of the output after each depth 1..max_depth in the loss; by default only the output after
            a token's last pass counts.
        idle: where no token goes on, run one through the deeper passes all the same and add 0 times the result to the
            loss. In distributed training (DDP, FSDP) every process needs a gradient for the same parameters. By
            default while training with labels.
    """

    follow_labels: bool = False
    loss_weights: Sequence[float] | None = None
    idle: bool | None = None


class TaHForCausalLM(SafeCheckpoint, TaHGeneration, PrivateHooks, PreTrainedModel, GenerationMixin):
    """A base decoder that runs again, with an adapter, on the tokens that a policy calls hard (the paper).

    Make one with [`~TaHForCausalLM.from_base`], load one with `from_pretrained`. The wrapped model is `self.base`.
    """

    config_class = TaHConfig
    config: TaHConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    replay_contexts = staticmethod(replay_contexts)  # a replayed layer runs at the depth it first ran at

    def __init__(self, config: TaHConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.base_config is None:
            raise ValueError("TaHConfig has no base_config; make a model with TaHForCausalLM.from_base(...)")
        self.base = AutoModelForCausalLM.from_config(config.base_config) if base is None else base
        check_facts(self.base)
        text = config.get_text_config(decoder=True)
        if config.lora_rank:
            decoder = self.decoder
            path = next((f"{name}." for name, module in self.base.named_modules() if name and module is decoder), "")
            add_lora(decoder, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets, path)
        width, like = text.hidden_size, next(self.get_input_embeddings().parameters())
        self.decider = build_decider(config.decider, width, text.vocab_size) if config.decider else None
        # Two choices differ from the paper: the next input emb + U h, and the output h1 + Z h2. These are U and Z.
        self.next_input_map = nn.Linear(width, width, bias=False) if config.next_input == "hidden" else None
        self.output_map = nn.Linear(width, width, bias=False) if config.output == "zero_init" else None
        if self.next_input_map is not None:
            nn.init.normal_(self.next_input_map.weight, std=0.02)
        if self.output_map is not None:
            nn.init.zeros_(self.output_map.weight)
        for part in (self.decider, self.next_input_map, self.output_map):
            if part is not None:
                part.to(device=like.device, dtype=like.dtype)
        for layer in decoder_layers(self.decoder, text.num_hidden_layers):
            allow_replay_with_cache(layer)  # activation checkpointing may replay PassCache.update
        self.post_init()

    # -- the method ----------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DuoCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        depth_labels: Tensor | None = None,
        policy: str | Policy | None = None,
        threshold: float | Tensor | None = None,
        max_depth: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        training: TrainingPass | None = None,
        cache: DuoCache | None = None,
        **kwargs: Any,
    ) -> TaHOutput:
        """Run every token once and the hard ones again.

        Args:
            input_ids: [B, T].
            attention_mask: [B, >= T], 0 at padding (left or right); only the last T columns are read.
            position_ids: [B, T]; counted from the attention mask when not given. The same at every depth.
            past_key_values, cache: the `DuoCache` of earlier tokens of the same batch (transformers 5.24 renamed it).
            inputs_embeds: [B, T, D] instead of `input_ids`.
            labels: [B, T] like `input_ids`, -100 where not supervised; shifted inside.
            depth_labels: [B, T] passes each token should take, for the policy `oracle` and for
                `training.follow_labels`; not shifted.
            policy: a name or a [`Policy`]; the config's by default.
            threshold: in [0, 1], or one per row [B]; the config's by default.
            max_depth: >= 1, or one per row [B]; the config's by default.
            use_cache: return a cache; by default not while training.
            logits_to_keep: number of last tokens, or indices of tokens, to return logits for; 0 means all. By default
                all, but none while training with labels, whose loss needs no [B, T, V].
            training: what only training asks for.
            kwargs: `num_items_in_batch`, the number to divide the loss by (default: supervised tokens of this call).

        Returns:
            Logits, loss, cache, and for every token its `depth_count` and `continue_logits` (nan where the policy was
            not asked), see [`TaHOutput`].

        Raises:
            ValueError: for inputs that do not fit each other, naming them.
        """
        past = given_cache(past_key_values, cache)
        tokens = Tokens.check(input_ids, inputs_embeds, attention_mask, position_ids, past)
        B, T = tokens.valid.shape
        tokens.check_others(kwargs, labels=labels, depth_labels=depth_labels)
        training = training or TrainingPass()
        rule = Rule(policy, threshold, max_depth).bind(self.config, self.decider, B, training.follow_labels)
        use_cache = not self.training if use_cache is None else use_cache
        cache = self._cache(past, use_cache, rule, T)

        # Depth 1: every token through the untouched base. Opening a pass reserves slots for its tokens in the cache;
        # the base gets the view of it that belongs to this pass, and its layers write their keys and values there.
        pass_cache = None if cache is None else tokens.open_pass(cache, deeper=rule.max_depth > 1)
        hidden, features = self._run(1, pass_cache, rule.policy, **tokens.stock_inputs(pass_cache, self.decoder))
        # The logits of a token are the sum over its passes. They are carried as a sum of hidden states [B*T, D]; the
        # head runs on tokens whose logits are asked for: by the policy, the next input, the loss or the caller. Where
        # the policy looks at logits, the `num_best` most probable tokens can be kept for the next input, so that the
        # head does not run twice.
        num_best = self.config.mix_topk if self.next_input_map is None else 0
        running = fast.running_output(self.head, hidden.to(tokens.valid.device), self.output_map, num_best)
        depth_count = torch.ones_like(tokens.positions)
        columns = max(rule.max_depth, self.config.max_depth) - 1  # as wide in calls with a smaller max_depth
        continue_logits = torch.full((B * T, columns), math.nan, device=tokens.valid.device)
        active = tokens.indices()  # [N] flat indices b * T + t of the tokens that just ran, padding left out
        hidden, features = select(hidden, features, tokens.valid, every=not tokens.padded)
        loss = None if labels is None else DepthLoss(labels, rule.max_depth, training.loss_weights)
        kept = use_cache or past is not None
        idle = self.training and loss is not None if training.idle is None else training.idle

        for depth in range(1, rule.max_depth):
            # Who is hard? The policy decides about the tokens that just ran ...
            state = DepthState(
                depth=depth,
                input_ids=tokens.select(tokens.ids, active),
                positions=tokens.positions.flatten()[active],
                hidden=features,
                depth_labels=tokens.select(depth_labels, active),
                map_logits=partial(running.map_logits, active),
            )
            new_logits, goes_on = rule.decide(state, row=active // T)  # [N], [N] bool
            del state, features  # a long prompt's hidden states need not outlive the decision
            where = (active, active.new_tensor(depth - 1))
            continue_logits = continue_logits.index_put(where, new_logits.to(continue_logits))
            if loss is not None:
                loss.add(running, depth, active, goes_on)  # before deeper passes add to the output
            if idle and not goes_on.any():
                zero = self._idle(range(depth, rule.max_depth), rule, cache, tokens, running, active, hidden)
                if loss is not None:  # with no loss to reach, the passes still keep sharded processes (FSDP) in step
                    loss.add_zero(zero)
            active, hidden = active[goes_on], hidden[goes_on]
            if len(active) == 0:
                break

            # ... and the hard ones run again, on a new input at their old position.
            assert cache is not None
            embeds = self._next_input(tokens, running, active, hidden)  # [M, D]
            hidden, features = self._run_again(depth + 1, cache, rule.policy, tokens, active, embeds)  # [M, D]
            running.add(active, hidden)
            depth_count = depth_count.flatten().index_add(0, active, torch.ones_like(active)).view(B, T)

        if loss is not None:
            loss.add(running, rule.max_depth, active)  # the tokens that took all passes
        if cache is not None and self.config.attention != "duo":
            cache.drop_deep()  # `own`, `blind`: a token's deeper keys are for its own later passes, which are over
        continue_logits = continue_logits.view(B, T, columns)
        if cache is not None and kept:
            cache.commit(depth_count, continue_logits.detach())
        no_logits = logits_to_keep is None and self.training and loss is not None
        logits = None if no_logits else self._logits(running, B, T, 0 if logits_to_keep is None else logits_to_keep)
        value = None if loss is None else loss.value(running, kwargs.get("num_items_in_batch"))  # fills loss.by_depth
        return TaHOutput(
            loss=value,
            logits=logits,
            **{CACHE: cache if use_cache else None},
            depth_count=depth_count,
            continue_logits=continue_logits,
            token_loss=None if loss is None else loss.by_depth.view(B, T, -1),
        )

    def _cache(self, past: DuoCache | None, use_cache: bool, rule: BoundRule, length: int) -> DuoCache | None:
        """The caller's cache, or a new one where it is needed: deeper passes read the keys of depth 1 from it."""
        cache = DuoCache() if past is None and (use_cache or rule.max_depth > 1) else past
        if cache is not None and rule.max_depth > 1:
            Tokens.check_length(cache.get_seq_length() + length, self.config.get_text_config(decoder=True))
        return cache

    def _run(
        self, depth: int, pass_cache: PassCache | None, policy: Callable[[DepthState], Tensor], **inputs: Any
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One pass over the base: final hidden states [.., .., D] and those that the policy reads, by index."""
        decoder = self.decoder
        num_layers = self.config.get_text_config(decoder=True).num_hidden_layers
        wanted: tuple[int, ...] = getattr(policy, "layers", ())
        if wanted and not 0 <= min(wanted) <= max(wanted) <= num_layers:
            raise ValueError(f"the policy reads hidden states {list(wanted)}; the base has 0..{num_layers}")
        layers = decoder_layers(decoder, num_layers)
        around = fast.attention_in_blocks(inputs["attention_mask"] if depth > 1 else None, decoder.dtype)
        # `at_depth` switches LoRA: it is off at depth 1 and on at every depth beyond (lora.py).
        with at_depth(depth, around), capture_hidden(layers, wanted) as seen:
            # use_cache only says whether the base creates a cache; it uses the one that it is given either way.
            hidden = decoder(**{CACHE: pass_cache}, use_cache=False, **inputs).last_hidden_state
        if num_layers in wanted:
            seen[num_layers] = hidden
        return hidden, seen

    def _run_again(
        self,
        depth: int,
        cache: DuoCache,
        policy: Callable[[DepthState], Tensor],
        tokens: Tokens,
        active: Tensor,
        embeds: Tensor,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """A pass at `depth` >= 2 of the tokens `active` [M] with inputs [M, D]: final hidden states [M, D] and those
        that the policy reads. Only rows with an active token take part, their tokens packed left."""
        packed = pack(active, tokens.positions.shape[1])
        positions = tokens.positions[packed.rows].gather(1, packed.columns)  # [R, P]
        # A query sees keys up to its own position. Order keys are positions that also tell documents apart (masks.py).
        order_keys = tokens.order_keys[packed.rows].gather(1, packed.columns)
        pass_cache = cache.open_deeper_pass(depth, packed, tokens.order_keys.flatten()[active])
        take_ready_masks(self.decoder)
        masks = pass_cache.masks(self.decoder.config, order_keys, self.config.attention, embeds.dtype)
        inputs = {"inputs_embeds": lay_out(embeds, packed), "position_ids": positions, "attention_mask": masks}
        hidden, features = self._run(depth, pass_cache, policy, **inputs)
        return select(hidden, features, packed.valid, packed.full)

    def _idle(
        self,
        depths: range,
        rule: BoundRule,
        cache: DuoCache | None,
        tokens: Tokens,
        running: RunningOutput,
        active: Tensor,
        hidden: Tensor,
    ) -> Tensor:
        """Run one token through the passes after each of `depths` and return 0 times what came out: a zero whose
        gradient reaches every parameter of those passes.

        A process without a hard token would else leave the others waiting for its gradients.
        """
        assert cache is not None
        zero, active, hidden = running.total.new_zeros((), dtype=torch.float32), active[:1], hidden[:1]
        with cache.forgetting():
            for depth in depths:
                embeds = self._next_input(tokens, running, active, hidden)
                hidden, _ = self._run_again(depth + 1, cache, rule.policy, tokens, active, embeds)
                out = hidden if self.output_map is None else self.output_map(hidden)
                zero = zero + 0 * out.float().sum()
        return zero

    def _next_input(self, tokens: Tokens, running: RunningOutput, active: Tensor, hidden: Tensor) -> Tensor:
        """Next inputs [M, D] of the tokens `active` [M] whose last pass ended in `hidden` [M, D]: the embeddings of the
        most probable next tokens so far, weighted by their probabilities (the paper's input updater), or emb + U h."""
        embed = self.get_input_embeddings()
        if self.next_input_map is not None:
            own = embed(tokens.ids) if tokens.embeds is None else tokens.embeds
            return own.flatten(0, 1)[active] + self.next_input_map(hidden)
        return mixed_embedding(running, active, embed)

    def _logits(self, running: RunningOutput, B: int, T: int, keep: int | Tensor) -> Tensor:
        """[B, K, V]"""
        index = torch.arange(B * T, device=running.total.device).view(B, T)
        index = index[:, slice(-keep, None) if isinstance(keep, int) else keep]
        logits = running.logits(index.flatten())
        return logits.view(B, index.shape[1], logits.shape[-1])

    # -- parts ---------------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> PreTrainedModel:
        """The base without its head."""
        return decoder_of(self.base)

    @property
    def head(self) -> Head:
        """Final hidden states [..., D] to logits [..., V], as the base computes them."""
        return head_of(self.base)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    # -- making one ----------------------------------------------------------------------------------------------

    @classmethod
    def from_base(cls, base: str | PreTrainedModel, **kwargs: Any) -> TaHForCausalLM:
        """Wrap a base model. Untrained, with the default policy, the result answers exactly as the base does.

        A model given as an object becomes part of the result: its linear layers get the adapters, in place.

        Args:
            base: a model, or the hub id or directory of one.
            kwargs: fields of [`TaHConfig`]; the rest goes to the base's `from_pretrained` (`dtype`, `device_map`,
                `attn_implementation`, `revision`, ...).

        Raises:
            UnsupportedBase: the base's family cannot be wrapped; says why.
            ValueError: a config field out of range, arguments nobody takes, or a base whose files cannot be loaded.
        """
        fields = {field.name for field in dataclasses.fields(TaHConfig)} - {"base_config"}
        own = fields - {field.name for field in dataclasses.fields(TaHConfig.__mro__[1])}
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        if isinstance(base, str) or hasattr(base, "__fspath__"):
            base = load_plain(base, **kwargs)
        elif kwargs:
            raise ValueError(f"unknown options: {', '.join(sorted(kwargs))}; TaHConfig takes {', '.join(sorted(own))}")
        if isinstance(base, cls):
            raise UnsupportedBase("this is a TaH model already; load it with TaHForCausalLM.from_pretrained")
        check_base(base)
        config = TaHConfig(base_config=base.config, dtype=base.dtype, **options)
        model = cls(config, base=base)
        if base.generation_config is not None:
            model.generation_config = base.generation_config
        return model.eval()
