"""Think-at-Hard on any Hugging Face decoder. Start reading at `TaHForCausalLM.forward`.

A *pass* is one run of the base; the *depth* of a pass is its number, counted from 1. Depth 1 is the base, unchanged.
After each pass a *policy* decides which tokens take another one. Those tokens run again at their position, on a new
input and with LoRA, and attend to keys of depths up to their own. The logits of all passes of a token are summed, or
their probabilities mixed (TaH2).
docs/explanation/method.md has the equations, and docs/explanation/architecture.md follows one prompt through this file.

Shapes: B batch, T tokens of this call, N tokens that ran the last pass, M of them that run the next one, R rows with at
least one of the M, P most of the M in any row (they are packed left: [R, P]), D width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import can_return_tuple
from typing_extensions import Unpack

from .checkpoints.safe import SafeCheckpoint, load_plain
from .config import TaHConfig
from .core import fast
from .core.cache import DuoCache, PassCache
from .core.compat import CACHE, PrivateHooks, allow_replay_with_cache, given_cache
from .core.depth import at_depth, replay_contexts
from .core.families import UnsupportedBase, check_base, check_facts, decoder_layers, decoder_of, head_of, refuse_peft
from .core.head import Head
from .core.inputs import ForwardKwargs, Tokens, TrainingPass
from .core.logits import RunningOutput, TaHOutput, capture_hidden, select
from .core.lora import DepthLoRA, add_lora
from .core.loss import DepthLoss
from .core.masks import take_ready_masks
from .core.mixture import mixture_weights, pass_losses
from .core.next_input import NextInputMLP, mixed_embedding
from .core.packing import lay_out, pack
from .core.quantised import check_frozen, freeze_quantised
from .core.summed import SummedStates
from .decider import build_decider
from .generation import TaHGeneration
from .names import MIXTURES
from .policy import BoundRule, DepthState, Policy, Rule


class TaHForCausalLM(SafeCheckpoint, TaHGeneration, PrivateHooks, PreTrainedModel, GenerationMixin):
    """A base decoder that takes more passes, with LoRA, on the tokens that a policy chooses (the paper's model).

    Make one with [`~TaHForCausalLM.from_base`], or load one with `from_pretrained`. The wrapped model is `self.base`.
    """

    config_class = TaHConfig
    config: TaHConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    replay_contexts = staticmethod(replay_contexts)  # a replayed layer runs at its first depth

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
        self.decider, self.next_input_map, self.next_input_mlp, self.output_map = None, None, None, None
        if config.decider:
            self.decider = build_decider(config.decider, text)
        if config.next_input == "hidden":  # U in method.md (5)
            self.next_input_map = nn.Linear(width, width, bias=False)
            nn.init.normal_(self.next_input_map.weight, std=0.02)
        if config.next_input == "mlp":  # method.md (13)
            self.next_input_mlp = NextInputMLP(width, config.next_input_width or width, config.next_input_norms)
        if config.output == "zero_init":  # Z in method.md (8)
            self.output_map = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.output_map.weight)
        for part in (self.decider, self.next_input_map, self.next_input_mlp, self.output_map):
            if part is not None:
                part.to(device=like.device, dtype=like.dtype)
        for layer in decoder_layers(self.decoder, text.num_hidden_layers):
            allow_replay_with_cache(layer)  # PassCache.update can run a second time without changing the cache
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
        policy: str | Policy | None = None,
        threshold: float | Tensor | None = None,
        max_depth: int | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        training: TrainingPass | None = None,
        cache: DuoCache | None = None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> TaHOutput:
        """Run every token at depth 1, and the tokens that the policy chooses at deeper depths.

        Args:
            input_ids: Token ids [B, T].
            attention_mask: Mask [B, >= T], 0 at padding (left or right). Only the last T columns are read.
            position_ids: Positions [B, T], the same at every depth. By default counted from the attention mask.
            past_key_values: The `DuoCache` of earlier tokens of the same batch.
            cache: The same as `past_key_values`, which transformers 5.24 renamed. Give one of them.
            inputs_embeds: Embeddings [B, T, D] instead of `input_ids`.
            labels: Token ids [B, T], aligned with `input_ids`, -100 where not supervised. They are shifted inside.
            policy: Name of a policy, or a [`Policy`]. The default is that of the configuration.
            threshold: Threshold in [0, 1], or one per row [B]. The default is that of the configuration.
            max_depth: Most passes, >= 1, or one value per row [B]. The default is that of the configuration.
            use_cache: Whether to return a cache. The default is False in training, else True.
            logits_to_keep: Number of last tokens, or indices of tokens, for which logits are returned. 0 means all. The
                default is all, but none in training with labels, whose loss needs no [B, T, V].
            training: Arguments that only training needs.
            kwargs: See [`ForwardKwargs`].

        Returns:
            Logits, loss, cache, and for every token its `depth_count` and `continue_logits`, see [`TaHOutput`].

        Raises:
            ValueError: Inputs do not fit each other, or a value is out of range. The message names them.
            TypeError: An argument is unknown.
        """
        past = given_cache(past_key_values, cache)
        tokens = Tokens.check(input_ids, inputs_embeds, attention_mask, position_ids, past)
        B, T = tokens.valid.shape
        targets, depth_labels = tokens.check_others(labels, **kwargs)
        training = training or TrainingPass()
        rule = Rule(policy, threshold, max_depth).bind(self.config, self.decider, B, training.follow_labels)
        use_cache = not self.training if use_cache is None else use_cache
        cache = self._cache(past, use_cache, rule, T)

        # Depth 1, method.md (1): every token through the unchanged base. Opening a pass reserves slots for its tokens
        # in the cache. The base gets a view of the cache for this pass, and its layers write keys and values there.
        pass_cache = None if cache is None else tokens.open_pass(cache, deeper=rule.max_depth > 1)
        hidden, features = self._run(1, pass_cache, rule.policy, **tokens.stock_inputs(pass_cache, self.decoder))
        # The logits of a token are the sum over its passes, method.md (2), or a mixture of them, (15). `running` holds
        # hidden states [B*T, D]. The head runs only on tokens whose logits the policy, the next input, the loss or the
        # caller needs. If the policy reads logits, the `num_best` most probable tokens can be kept for the next input,
        # so that the head does not run twice.
        num_best = self.config.mix_topk if self.config.next_input == "topk" else 0
        running = fast.running_output(
            self.config.output, self.head, hidden.to(tokens.valid.device), self.output_map, num_best, logits_to_keep
        )
        depth_count = torch.ones_like(tokens.positions)
        columns = max(rule.max_depth, self.config.max_depth) - 1  # not narrower in a call with a smaller max_depth
        continue_logits = torch.full((B * T, columns), math.nan, device=tokens.valid.device)
        active = tokens.indices()  # [N] flat indices b * T + t of the tokens that just ran, without padding
        hidden, features = select(hidden, features, tokens.valid, every=not tokens.padded)
        loss = None if targets is None else DepthLoss(targets, rule.max_depth, training.loss_weights)
        has_loss = self.training and loss is not None
        idle = has_loss if training.idle is None else training.idle
        zero = running.total.new_zeros((), dtype=torch.float32)

        for depth in range(1, rule.max_depth):
            # The policy decides which of the tokens that just ran take another pass, method.md (3) ...
            state = DepthState(
                depth=depth,
                input_ids=tokens.select(tokens.ids, active),
                positions=tokens.positions.flatten()[active],
                hidden=features,
                depth_labels=tokens.select(depth_labels, active),
                map_logits=partial(running.map_logits, active),
                map_pass_logits=partial(running.map_pass_logits, hidden),
                embeds=partial(self._embeds, tokens, active),
            )
            new_logits, iterates = rule.decide(state, row=active // T)  # [N], [N] bool
            del state, features  # frees the hidden states of a long prompt
            continue_logits = continue_logits.index_put(
                (active, active.new_tensor(depth - 1)), new_logits.to(continue_logits)
            )
            if loss is not None:
                loss.add(running, depth, active, iterates)  # before deeper passes add to the output
            if idle and not iterates.any():
                zero = zero + self._idle(range(depth, rule.max_depth), rule, cache, tokens, running, active, hidden)
            active, hidden, go_logits = active[iterates], hidden[iterates], new_logits[iterates]
            if len(active) == 0:
                break

            # ... and those run again at their position, on the next input, method.md (4), (5) or (13).
            assert cache is not None
            embeds = self._next_input(tokens, running, active, hidden)  # [M, D]
            hidden, features = self._run_again(depth + 1, cache, rule.policy, tokens, active, embeds)  # [M, D]
            running.add(active, hidden, go_logits)
            depth_count = depth_count.flatten().index_add(0, active, torch.ones_like(active)).view(B, T)

        if loss is not None:
            loss.add(running, rule.max_depth, active)  # tokens that took all passes
        if idle:
            self._add_zero(zero, rule.max_depth, running, loss)
        pass_loss = (
            self._pass_loss(rule, cache, tokens, running, targets=targets, depth_count=depth_count, everywhere=idle)
            if training.side_passes
            else None
        )
        if cache is not None and self.config.attention != "duo":
            cache.drop_deep()  # `own`, `blind`: only a token's later passes attend to its deeper keys, method.md (7)
        continue_logits = continue_logits.view(B, T, columns)
        if cache is not None and (use_cache or past is not None):
            cache.commit(depth_count, continue_logits.detach())
        value = None if loss is None else loss.value(running, kwargs.get("num_items_in_batch"))  # fills loss.by_depth
        return TaHOutput(
            loss=value,
            logits=None if logits_to_keep is None and has_loss else self._logits(running, B, T, logits_to_keep),
            **{CACHE: cache if use_cache else None},
            depth_count=depth_count,
            continue_logits=continue_logits,
            token_loss=None if loss is None else loss.by_depth.view(B, T, -1),
            pass_loss=pass_loss,
            mixture_weights=self.mixture_weights(depth_count, continue_logits.detach()),
            last_hidden_state=running.summed(B, T) if kwargs.get("output_last_hidden_state") else None,
        )

    def _cache(self, past: DuoCache | None, use_cache: bool, rule: BoundRule, length: int) -> DuoCache | None:
        """Return the caller's cache, or a new one where a cache or the keys of depth 1 are needed."""
        cache = DuoCache() if past is None and (use_cache or rule.max_depth > 1) else past
        if cache is not None and rule.max_depth > 1:
            Tokens.check_length(cache.get_seq_length() + length, self.config.get_text_config(decoder=True))
        return cache

    def _run(
        self, depth: int, pass_cache: PassCache | None, policy: Callable[[DepthState], Tensor], **inputs: Any
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run one pass; return final hidden states [.., .., D] and, by index, those that the policy reads."""
        decoder = self.decoder
        num_layers = self.config.get_text_config(decoder=True).num_hidden_layers
        wanted: tuple[int, ...] = getattr(policy, "layers", ())
        if wanted and not 0 <= min(wanted) <= max(wanted) <= num_layers:
            raise ValueError(f"the policy reads hidden states {list(wanted)}; the base has 0..{num_layers}")
        layers = decoder_layers(decoder, num_layers)
        around = fast.attention_in_blocks(inputs["attention_mask"] if depth > 1 else None, decoder.dtype)
        # `at_depth` turns LoRA on at depths above 1, method.md (6).
        with at_depth(depth, around), capture_hidden(layers, wanted) as seen:
            # use_cache decides only whether the base creates a cache. It uses a given cache in both cases.
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
        alone: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the tokens `active` [M] at `depth` >= 2 on inputs [M, D].

        Only rows with an active token take part, their tokens packed left. With `alone`, each attends to no other token
        of this pass.

        Returns:
            Final hidden states [M, D] and, by index, the hidden states [M, D] that the policy reads.
        """
        packed = pack(active, tokens.positions.shape[1])
        positions = tokens.positions[packed.rows].gather(1, packed.columns)  # [R, P]
        # Order keys are positions that also distinguish the documents of a row (masks.py).
        order_keys = tokens.order_keys[packed.rows].gather(1, packed.columns)
        pass_cache = cache.open_deeper_pass(depth, packed, tokens.order_keys.flatten()[active], alone)
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
        """Run one token through the pass after each of `depths`; return 0 times the results.

        The gradient of this zero reaches every parameter of those passes. Without it, the other processes of a
        distributed training would wait for gradients of a process that has no hard token.
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

    def _pass_loss(
        self,
        rule: BoundRule,
        cache: DuoCache | None,
        tokens: Tokens,
        running: RunningOutput,
        targets: Tensor | None,
        depth_count: Tensor,
        everywhere: bool,
    ) -> Tensor:
        """Return `TaHOutput.pass_loss`. With `everywhere`, every depth runs, because other processes run it."""

        def run_alone(depth: int, active: Tensor, hidden: Tensor) -> Tensor:
            """Return the final hidden states [M, D] of the pass after `depth`, without a change of the cache."""
            assert cache is not None
            with cache.forgetting():
                embeds = self._next_input(tokens, running, active, hidden)
                return self._run_again(depth + 1, cache, rule.policy, tokens, active, embeds, alone=True)[0]

        if targets is None:
            raise ValueError("side passes need labels")
        limits = rule.max_depth if rule.row_depth is None else rule.row_depth
        return pass_losses(running, targets, depth_count, limits, run_alone, everywhere)

    def _add_zero(self, zero: Tensor, max_depth: int, running: RunningOutput, loss: DepthLoss | None) -> None:
        """Add the zero of idle passes to the loss, or without labels to the output, from which the caller makes a loss.

        If several processes train, it also reaches the parameters that no path of the method connects to the logits:
        the decider's, whose decisions have no gradient, and in a call of one pass those of all deeper passes. DDP waits
        for a gradient of every parameter, unless it has `find_unused_parameters`.

        In a process alone these parameters have no gradient, so an optimizer leaves them as they are. In several
        processes their gradient is zero. The result is the same without weight decay. With weight decay the optimizer
        reduces them in several processes only, unless `requires_grad_(False)` excludes them.
        """
        if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts: list[nn.Module | None] = [self.decider]
            if max_depth == 1:
                parts += [self.next_input_map, self.next_input_mlp, self.output_map]
                parts += [child for lora in self.modules() if isinstance(lora, DepthLoRA) for child in lora.children()]
            for weight in (weight for part in parts if part is not None for weight in part.parameters()):
                if weight.requires_grad and not isinstance(weight, DTensor):  # FSDP does not wait
                    zero = zero + 0 * weight.float().sum().to(zero.device)
        if loss is not None:
            loss.add_zero(zero)
        else:
            running.total = running.total + zero

    def _next_input(self, tokens: Tokens, running: RunningOutput, active: Tensor, hidden: Tensor) -> Tensor:
        """Return next inputs [M, D] of the tokens `active` [M], whose last pass ended in `hidden` [M, D].

        This is the mix of token embeddings, method.md (4), the token's embedding plus U h, (5), or a network of
        embedding and h, (13).
        """
        if self.next_input_mlp is not None:
            return self.next_input_mlp(self._embeds(tokens, active), hidden)
        if self.next_input_map is not None:
            return self._embeds(tokens, active) + self.next_input_map(hidden)
        return mixed_embedding(running, active, self.get_input_embeddings())

    def _embeds(self, tokens: Tokens, active: Tensor) -> Tensor:
        """Return the embeddings [M, D] of the tokens `active` [M], the inputs of depth 1."""
        if tokens.embeds is not None:
            return tokens.embeds.flatten(0, 1)[active]
        return self.get_input_embeddings()(tokens.select(tokens.ids, active))

    def mixture_weights(self, depth_count: Tensor, continue_logits: Tensor) -> Tensor | None:
        """Return the weight [B, T, max_depth] of each pass, method.md (15), or None where the output is a sum.

        Args:
            depth_count: Passes [B, T] of each token.
            continue_logits: Continue logits [B, T, max_depth - 1].
        """
        if self.config.output not in MIXTURES:
            return None
        return mixture_weights(depth_count, continue_logits, self.config.output == "even")

    def _logits(self, running: RunningOutput, B: int, T: int, keep: int | Tensor | None) -> Tensor:
        """Return logits [B, K, V] of the K tokens to keep, see `forward`. None: of all."""
        index = torch.arange(B * T, device=running.total.device).view(B, T)
        index = index[:, keep if isinstance(keep, Tensor) else slice(-(keep or 0), None)]
        logits = running.logits(index.flatten())
        return logits.view(B, index.shape[1], logits.shape[-1])

    def train(self, mode: bool = True) -> TaHForCausalLM:
        """Set training mode, as in torch.

        Raises:
            ValueError: The base is quantised, and one of its parameters requires a gradient.
        """
        if mode and not self.training:
            check_frozen(self.base)
        return super().train(mode)

    # -- parts ---------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> SummedStates:
        """The model without its head, for libraries that apply the head themselves (TRL)."""
        return SummedStates(self)

    @property
    def sums_states(self) -> bool:
        """Whether the logits are the head of one hidden state per token, the sum over its passes."""
        return self.config.output not in MIXTURES and (self.output_map is not None or self.head.is_linear)

    @property
    def decoder(self) -> PreTrainedModel:
        """Return the base without its head."""
        return decoder_of(self.base)

    @property
    def head(self) -> Head:
        """Return the head: final hidden states [..., D] to logits [..., V], as the base computes them."""
        return head_of(self.base)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> TaHForCausalLM:
        return self  # as in any decoder-only model

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    # -- making one ----------------------------------------------------------------------------------------------

    @classmethod
    def from_base(cls, base: str | PreTrainedModel, **kwargs: Any) -> TaHForCausalLM:
        """Return a TaH model around a base. Before training, with the default policy, its logits equal the base's.

        A model given as an object becomes part of the result: its linear layers get LoRA, in place.

        Args:
            base: A model, or its Hub id or directory.
            kwargs: Fields of [`TaHConfig`]. The others go to the base's `from_pretrained` (`dtype`, `device_map`,
                `attn_implementation`, `revision`, ...).

        Raises:
            UnsupportedBase: The base cannot be wrapped. The message has the reason.
            ValueError: A field is out of range, an option is unknown, or the base's files cannot be loaded.
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
        refuse_peft(base)
        check_base(base)
        freeze_quantised(base)
        config = TaHConfig(base_config=base.config, dtype=base.dtype, **options)
        model = cls(config, base=base)
        if split := getattr(base, "hf_device_map", None):  # trainers read it, and move no layer of a split model
            model.hf_device_map = {f"base.{name}".rstrip("."): device for name, device in split.items()}
        if base.generation_config is not None:
            model.generation_config = base.generation_config
        return model.eval()
