"""TRL's trainers for TaH models: supervised fine-tuning on every depth, and GRPO at given and at sampled depth.

`trl.SFTTrainer` and `trl.DPOTrainer` take a TaH model without this module. They train the logits of its last passes,
and the model's own policy decides in every forward which tokens iterate.

Shapes: B completions, P tokens of the longest prompt, C tokens of the longest completion, S tokens of a rollout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.summed import NOT_SUMMED
from ..model import TaHForCausalLM, TrainingPass
from ..policy import DepthState, Policy
from .trainer import Meter, Objective

try:
    import trl
except ImportError as error:
    raise ImportError("tah.training.trl needs TRL: pip install 'trl==1.16.*'") from error

WRITTEN_FOR = "1.16"  # the TRL whose private methods `GivenDepthGRPOTrainer` overrides


class LookAheadSFTTrainer(trl.SFTTrainer):
    """`trl.SFTTrainer` with the loss of the output after each depth, method.md (12), for any head.

    Rows may be padded, packed or padding-free. `compute_loss` is the method that TRL names for losses of one's own. The
    log has `iterated_share` and `loss_depth_1`, ... instead of TRL's entropy and token accuracy.

    Args:
        args: As in `trl.SFTTrainer`.
        objective: An `Objective` of stage `backbone` and method `lookahead` (or `blind`). The default is every depth of
            the model, with equal weights.
        kwargs: As in `trl.SFTTrainer`.

    Raises:
        ValueError: The model is no TaH model, or the objective needs depth labels, which TRL's rows do not have.
    """

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = tah_model(self.model)
        self.objective = objective or Objective("backbone", "lookahead", model.config.max_depth)
        if self.objective.stage != "backbone" or not self.objective.by_gain:
            raise ValueError(
                f"LookAheadSFTTrainer has no depth labels for the objective {self.objective.stage} "
                f"{self.objective.method}; use method lookahead, or tah train"
            )
        if self.objective.joint and model.decider is None:
            raise ValueError("joint=True trains the decider, but the model has none; give from_base a decider")
        self.meters = {True: Meter(), False: Meter("eval_")}  # training and evaluation

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, and if `return_outputs` the output with logits of the model's own policy.

        Args:
            model: Model as Trainer wraps it.
            inputs: Batch of TRL's collator: `input_ids` [B, T], `labels` [B, T], `attention_mask` or `position_ids`.
            return_outputs: Whether the output is returned too, which runs another forward.
            num_items_in_batch: Number of supervised tokens over all accumulated batches and processes.
        """
        shared, training = self.args.world_size > 1, model.training
        loss, out = self.objective.loss(model, inputs, self.state, shared, num_items_in_batch)
        self.meters[training].add(out, inputs)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, but the loss is already divided once
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log iterated share and losses by depth too."""
        evaluated = any(name.startswith("eval_") for name in logs)
        logs |= self.meters[not evaluated].take(lambda sums: self.accelerator.reduce(sums, "sum"))
        super().log(logs, start_time)


class GivenDepthGRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` for a TaH model: reinforcement learning of tokens, at the depths that the rollout took.

    The policy of the model decides once, while the completions are generated. All later forwards over them, those of
    the old, the new and the reference policy, take the same depths, so their log-probabilities belong to the same
    computation: the importance ratio before an update is 1. Without this, each update changes some decisions, and the
    ratio compares different computations.

    Which token iterates gets no gradient, because a thresholded decision has none. The decider stays as it is, unless
    an optimizer changes it by weight decay.

    Args:
        args: As in `trl.GRPOTrainer`.
        kwargs: As in `trl.GRPOTrainer`.

    Raises:
        ImportError: Another TRL is installed than the one whose private methods this class overrides.
        ValueError: The model is no TaH model, its logits are not the head of one hidden state (a mixture, a soft-cap
            or a bias), or completions would not come from `generate`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not trl.__version__.startswith(f"{WRITTEN_FOR}."):
            raise ImportError(
                f"{type(self).__name__} is written for trl {WRITTEN_FOR}, not {trl.__version__}: "
                f"pip install 'trl=={WRITTEN_FOR}.*'"
            )
        super().__init__(*args, **kwargs)
        if not tah_model(self.model).sums_states:  # otherwise refused only after the first rollout
            raise ValueError(NOT_SUMMED)
        others = {
            "use_vllm": self.use_vllm,
            "use_transformers_continuous_batching": self.use_transformers_continuous_batching,
            "rollout_func": self.rollout_func,
            "tools": self.tools,
            "environment_factory": self.environment_factories,
        }
        if given := [name for name, value in others.items() if value]:
            raise ValueError(
                f"{', '.join(given)}: depths are known only if the model's generate makes a completion in one turn; "
                "use trl.GRPOTrainer, which decides again in every forward"
            )
        self.generation_config.return_dict_in_generate = True
        self.rollout_policy: Policy | None = None  # that of the model's configuration
        self._depths = torch.empty(0)  # [B, S] passes of the tokens of the completions that are in use
        self._sequences = torch.empty(0)  # [B, S] their tokens
        self._prompt_length = 0  # tokens of the longest prompt

    def forward_at(self, depths: Tensor, model: torch.nn.Module, given: dict[str, Any]) -> Any:
        """Return the output of TRL's forward over rollouts [B, T], at their `depths` [B, T].

        Args:
            depths: Passes of each token.
            model: A TaH model, as TRL wraps it.
            given: Arguments of TRL.
        """
        return model(**given, policy="oracle", depth_labels=depths)

    # The four methods below are private in TRL 1.16, and GRPOTrainer calls each of them in that version.

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Generate completions and keep the depth of every token."""
        model: Any = self.accelerator.unwrap_model(self.model)
        generate = model.generate

        def recording(*given: Any, **options: Any) -> Tensor:
            out = generate(*given, **options, policy=self.rollout_policy)
            self._depths, self._sequences = out.depth_count.clamp(min=1), out.sequences  # the last token did not run
            self._prompt_length = options["input_ids"].shape[1]
            return out.sequences

        model.generate = recording
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            del model.generate

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Add the depths [B, P + C] to TRL's batch, which it shuffles and splits with the completions."""
        batch = super()._generate_and_score_completions(inputs)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        real = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
        if not torch.equal(_fit(self._sequences, ids.shape[1], 0)[real], ids[real]):
            raise ValueError("the tokens of the update are not those of the rollout, so their depths are unknown")
        batch["depth_labels"] = depths = _fit(self._depths, ids.shape[1], 1)
        before = slice(batch["prompt_ids"].shape[1] - 1, -1)  # token t predicts token t + 1
        again = (depths[:, before] > 1) & (batch["completion_mask"] > 0)
        shares = self.accelerator.gather(torch.stack([again.sum(), batch["completion_mask"].sum()])[None].float())
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["iterated_share"].append((shares[:, 0].sum() / shares[:, 1].sum().clamp(min=1)).item())
        return batch

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the loss of a batch at the depths of its rollout."""
        self._depths = inputs["depth_labels"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute log-probabilities [B, C] of the completions at the depths of their rollout."""
        rows = iter(_fit(self._depths, input_ids.shape[1], 1).split(batch_size or len(input_ids)))

        def at_given_depth(**given: Any) -> Any:
            return self.forward_at(next(rows), model, given)

        return super()._get_per_token_logps_and_entropies(
            at_given_depth, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
        )


class SampledDepthGRPOTrainer(GivenDepthGRPOTrainer):
    """GRPO of tokens and depths: the decider's decisions are sampled in the rollout, and reinforced like tokens.

    In a rollout a token takes another pass with its continue probability, without a threshold. The log-probability of
    the decisions at position t is added to that of token t + 1, so TRL's ratio, clipping and KL are those of both. The
    decisions of the prompt, except those of its last token, are sampled too but not reinforced.

    Reward functions get `depth_count`: for each completion a list with the passes before each of its tokens. A cost per
    pass is a reward function:

        def cost(depth_count, **kwargs):
            return [-0.1 * (sum(depths) / len(depths) - 1) for depths in depth_count]

    After the training a threshold of 0.5 gives the more probable decision.

    Args:
        args: As in `trl.GRPOTrainer`.
        kwargs: As in `trl.GRPOTrainer`.

    Raises:
        ImportError: As for `GivenDepthGRPOTrainer`.
        ValueError: As for `GivenDepthGRPOTrainer`, or the model has no decider, or no weight of the decider is trained.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        decider = tah_model(self.model).decider
        if decider is None:
            raise ValueError("there are no decisions to reinforce: the model has no decider; give from_base a decider")
        if not any(weight.requires_grad for weight in decider.parameters()):
            raise ValueError(
                "no weight of the decider requires a gradient, so its decisions would not be learned; give the "
                "peft_config modules_to_save=['decider'], or without PEFT call model.decider.requires_grad_(True)"
            )
        self.rollout_policy = Sampled(decider)

    def forward_at(self, depths: Tensor, model: torch.nn.Module, given: dict[str, Any]) -> Any:
        """Return the output of TRL's forward, with the log-probabilities of the decisions added to those of tokens."""
        found: list[Tensor] = []  # continue logits [N] after each depth, of the tokens that ran it
        decider: Any = tah_model(self.accelerator.unwrap_model(model)).decider
        handle = decider.register_forward_hook(lambda module, args, logits: found.append(logits.float()))
        try:
            training = TrainingPass(follow_labels=True, idle=self.model.training)
            out = model(**given, policy="decider", depth_labels=depths, training=training)
        finally:
            handle.remove()
        ran = given["attention_mask"].bool()
        chosen = torch.zeros(ran.shape, device=ran.device)
        for depth, logits in enumerate(found, 1):
            again = (depths > depth)[ran]
            each = F.logsigmoid(torch.where(again, logits, -logits))
            chosen = chosen + chosen.new_zeros(ran.shape).masked_scatter(ran, each.to(chosen))
            ran = ran & (depths > depth)
        out.log_probs = out.log_probs + chosen[:, :-1].masked_fill(~out.label_mask, 0)
        return out

    def _calculate_rewards(self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, ids: Any) -> Tensor:
        """Return TRL's rewards, of functions that get the depths too. This method is private in TRL 1.16."""
        first = self._prompt_length - 1  # the last token of each prompt
        counts = [row[first : first + len(tokens)] for row, tokens in zip(self._depths.tolist(), ids, strict=True)]
        inputs = [row | {"depth_count": count} for row, count in zip(inputs, counts, strict=True)]
        return super()._calculate_rewards(inputs, prompts, completions, ids)


class Sampled(Policy):
    """The decisions of a decider, drawn: a token takes another pass with its continue probability.

    Args:
        decider: The decider of a model.
    """

    def __init__(self, decider: Any) -> None:
        self.decider, self.layers = decider, decider.layers

    def __call__(self, state: DepthState) -> Tensor:
        """Return decisions [N] bool."""
        probability = self.decider(state).float().sigmoid()
        return torch.rand_like(probability) < probability


def tah_model(model: Any) -> TaHForCausalLM:
    """Return the TaH model that a trainer has, also below PEFT.

    Raises:
        ValueError: It has another model.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, TaHForCausalLM):
        raise ValueError(f"the model is a {type(inner).__name__}; make a TaH model with TaHForCausalLM.from_base(...)")
    return inner


def _fit(rows: Tensor, length: int, fill: int) -> Tensor:
    """Return `rows` [B, S] cut or filled on the right to [B, length]."""
    return F.pad(rows, (0, max(0, length - rows.shape[1])), value=fill)[:, :length]
