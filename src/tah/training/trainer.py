"""Hugging Face's Trainer with the objectives of TaH (method.md, sections 9 to 11) and atomic checkpoints.

Shapes: B batch, T tokens, N tokens of a pass, M = max_depth.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, pad_across_processes, reduce
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from ..config import current_tensor
from ..core.compat import TrainerHooks
from ..core.logits import TaHOutput
from ..core.loss import IGNORE, decider_loss, targets_of
from ..model import TaHForCausalLM, TrainingPass
from ..names import BY_GAIN, Stage
from ..policy import Confidence, DepthState, Random
from .joint import gain_labels, joint_decider_loss

CHECKPOINTS = "checkpoints"


def supervised_of(batch: dict[str, Tensor]) -> Tensor:
    """Return whether [B, T] bool each position predicts a supervised token, as in the loss of the model.

    Args:
        batch: `labels` [B, T], and `attention_mask` [B, T] if there is padding that has no document of its own.
    """
    return targets_of(batch["labels"], batch.get("attention_mask")) != IGNORE


def read_of(batch: dict[str, Tensor]) -> Tensor:
    """Return whether [B, T] bool each token is one of a text, not padding.

    A packed row has no mask. Padding is its last document, the only one without a label (`data.Collator`).

    Args:
        batch: `labels` [B, T], and `attention_mask` [B, T] or the `position_ids` [B, T] of packed rows.
    """
    labels = batch["labels"]
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    if "position_ids" not in batch:
        return torch.ones_like(labels, dtype=torch.bool)
    index = torch.arange(labels.shape[1], device=labels.device)
    begin = torch.where(batch["position_ids"] == 0, index, 0).amax(1, keepdim=True)  # [B, 1], of the last document
    last = index >= begin
    return ~last | (last & (labels != IGNORE)).any(1, keepdim=True)


class _UncertainOf(Confidence):
    """Policy `confidence` by entropy, among tokens whose depth label allows another pass.

    Prompt tokens never iterate, because they are not predicted.
    """

    def __init__(self) -> None:
        super().__init__("entropy")

    def __call__(self, state: DepthState) -> Tensor:
        """Return continue logits `[N]`."""
        assert state.depth_labels is not None
        return torch.where(state.depth_labels > state.depth, super().__call__(state), -math.inf)


@dataclass
class Objective:
    """What a stage trains, and on which tokens.

    | method | tokens that iterate | loss |
    | --- | --- | --- |
    | `paper` | hard tokens, by depth label | final output, method.md (10) |
    | `lookahead` | every supervised token, at all depths | output after each depth, method.md (12) |
    | `blind` | as `lookahead`, but deeper passes read no text (`attention="blind"`), a control | method.md (12) |
    | `always`, `random`, `confidence` | by the policy of that name | final output |
    | `standard` | none, the one-pass baseline | output of depth 1 |
    | `tah2` | by the model's own decider, which is trained too | final output and the decider's loss, method.md (17) |

    Args:
        stage: `backbone` (base, LoRA, linear maps U and Z) or `decider`.
        method: Which tokens iterate while the backbone is trained, and which tokens should iterate by the decider.
        max_depth: Largest depth of a token.
        loss_weights: Weight of the loss at each depth. None: equal weights that add up to 1 in look-ahead training, and
            only the final output otherwise.
        share: Share of the tokens that may iterate, drawn again for every step of look-ahead training. For method
            `random`: share of the tokens that iterate.
        tau: Entropy in nats above which a token iterates.
        uncertain: Whether only tokens with an entropy above `tau` iterate in look-ahead training.
        joint: Whether the decider is trained in stage `backbone`.
        gain: Gain of a pass in nats above which a token should iterate.
        pos_weight: Weight of hard tokens in the decider's loss; None for 1.
        depth_schedule: Pairs of a share of the training and the largest depth from there on.
        coverage: Share of the total gain that hard tokens have, by depth, method.md (16), for `tah2`.
        decider_weight: Weight of the decider's loss for `tah2`.
        seed: Seed of the sampled shares.
    """

    stage: Stage
    method: str
    max_depth: int
    loss_weights: Sequence[float] | None = None
    share: float = 1.0
    tau: float = 0.3
    uncertain: bool = False
    joint: bool = False
    gain: float = 0.05
    pos_weight: float | None = None
    depth_schedule: Sequence[tuple[float, int]] = ()
    coverage: Sequence[float] = (0.99,)
    decider_weight: float = 0.05
    seed: int = 0

    @property
    def by_gain(self) -> bool:
        """Whether the decider is trained on the gain of each pass and not on labels."""
        return self.method in BY_GAIN

    def depth_at(self, progress: float) -> int:
        """Return the largest depth after the share `progress`, from 0 to 1, of the training."""
        reached = [depth for start, depth in self.depth_schedule if start <= progress]
        return reached[-1] if reached else self.max_depth

    def weights(self, depth: int) -> list[float] | None:
        """Return the weights of the losses at depths 1 to `depth`, lambda in method.md (12); None: final output only.

        If fewer depths run than there are weights, the weights of those depths are scaled up to the same sum.
        """
        if self.loss_weights is not None:
            scale = sum(self.loss_weights) / sum(self.loss_weights[:depth])
            return [scale * weight for weight in self.loss_weights[:depth]]
        return [1 / depth] * depth if self.by_gain else None

    def arguments(self, batch: dict[str, Tensor], step: int, depth: int, shared: bool = False) -> dict[str, Any]:
        """Return the keyword arguments of `TaHForCausalLM.forward` for a batch.

        Args:
            batch: Tensors of `data.Collator`, without `row`.
            step: Number of the training step.
            depth: Largest depth in this step.
            shared: Whether other processes run the same step. Every depth then runs in each process.
        """
        given = self._given(batch, step, depth, shared)
        its = {field.name: given.pop(field.name) for field in fields(TrainingPass) if field.name in given}
        return given | {"training": TrainingPass(**its)}

    def _given(self, batch: dict[str, Tensor], step: int, depth: int, shared: bool) -> dict[str, Any]:
        """Return the arguments of `forward` and the fields of `TrainingPass` in one dictionary."""
        supervised = supervised_of(batch)
        given: dict[str, Any] = {**batch, "max_depth": depth, "logits_to_keep": supervised.new_empty(0).long()}
        if shared:
            given["idle"] = True
        if self.stage == "decider" and not self.by_gain:
            # Only the decisions count (method.md (11)), so no token runs the deepest pass.
            del given["labels"]
            labels = batch["depth_labels"].clamp(max=depth - 1)
            return given | {"policy": "decider", "follow_labels": True, "depth_labels": labels}
        if self.by_gain:
            chosen = supervised
            if self.share < 1:
                chosen = supervised & self._sample(batch, step)
            given |= {"depth_labels": torch.where(chosen, depth, 1), "follow_labels": True}
            asks = self.joint or self.stage == "decider"
            given["policy"] = "decider" if asks else "oracle"
            if self.uncertain and self.stage == "backbone":
                given |= {"policy": _UncertainOf(), "threshold": self._threshold, "follow_labels": False}
            return given | {"loss_weights": self.weights(depth) if self.stage == "backbone" else [1 / depth] * depth}
        given["loss_weights"] = self.weights(depth)
        given["policy"] = {
            "paper": "oracle",
            "tah2": "decider",
            "standard": "never",
            "always": "always",
            "random": Random(self.share, self.seed),
            "confidence": Confidence("entropy"),
        }[self.method]
        if self.method == "standard":
            given["max_depth"] = 1
        if self.method == "confidence":
            given["threshold"] = self._threshold
        return given

    @property
    def _threshold(self) -> float:
        return 1 - math.exp(-self.tau)  # exceeded by 1 - exp(-entropy) if the entropy exceeds tau

    def _sample(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """Return a random share of all tokens, `[B, T]` bool. It depends on the step, but not on the machine."""
        ids = batch["input_ids"]
        counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        state: Any = _Seen(1, ids.flatten(), batch.get("position_ids", counted).flatten())
        return (Random(self.share, self.seed + 7919 * step)(state) > 0).view_as(ids)

    def loss(
        self,
        model: torch.nn.Module,
        batch: dict[str, Tensor],
        state: TrainerState,
        shared: bool,
        items: int | Tensor | None,
    ) -> tuple[Tensor, TaHOutput]:
        """Run a forward and return the loss, a scalar, and the output.

        Args:
            model: A TaH model, as a trainer wraps it.
            batch: Tensors of `data.Collator`, without `row`.
            state: State of the trainer, with the number of the step.
            shared: Whether other processes run the same step.
            items: Number of supervised tokens over all accumulated batches and processes; None for those of `batch`.
        """
        step = state.global_step
        depth = self.depth_at(step / max(1, state.max_steps))
        given = self.arguments(batch, step, depth, shared)
        if self.method == "tah2" and model.training:
            given["training"] = replace(given["training"], side_passes=True)
        out = model(**given, num_items_in_batch=items)
        if self.stage == "decider":
            return self.decider_loss(out, batch, items), out
        if self.method == "tah2" and model.training:
            return out.loss + self.decider_weight * self._joint_loss(out, batch, items), out
        return (out.loss + self.decider_loss(out, batch, items) if self.joint else out.loss), out

    def _joint_loss(self, out: TaHOutput, batch: dict[str, Tensor], items: Tensor | int | None) -> Tensor:
        """Return the decider's loss of TaH2, method.md (17), for the tokens of this step in all processes."""
        supervised = supervised_of(batch)

        def join(gains: Tensor) -> Tensor:
            """Join the gains of all processes. The padding is 0, which is no gain."""
            joined = gather(pad_across_processes(gains))
            return joined[joined > 0]

        labels = gain_labels(out, supervised, self.coverage, join)
        items = supervised.sum().clamp(min=1) if items is None else items
        return joint_decider_loss(out, labels, items, lambda sums: reduce(sums, "sum"))

    def decider_loss(self, out: TaHOutput, batch: dict[str, Tensor], items: int | Tensor | None) -> Tensor:
        """Return the decider's loss (method.md (11)), a scalar.

        Args:
            out: Output of a forward with `arguments`.
            batch: Tensors of `data.Collator`, with `labels`.
            items: Number of supervised tokens over all accumulated batches and processes; None for those of `batch`.
        """
        assert out.continue_logits is not None
        logits = out.continue_logits
        decisions = torch.arange(1, logits.shape[2] + 1, device=logits.device)  # the depths with a decision
        asked = supervised_of(batch)[:, :, None] & ~logits.isnan()
        if not self.by_gain:
            target = batch["depth_labels"][:, :, None] > decisions
            return decider_loss(logits, target, asked, None, self.pos_weight, items)
        assert out.token_loss is not None and out.depth_count is not None
        loss = torch.nn.functional.pad(out.token_loss, (0, logits.shape[2] + 1 - out.token_loss.shape[2]))
        gain = loss[:, :, :-1] - loss[:, :, 1:] - self.gain
        asked = asked & (out.depth_count[:, :, None] > decisions) & ~gain.isnan()  # where the next pass ran
        return decider_loss(logits, gain > 0, asked, gain.abs(), None, items)


@dataclass
class _Seen:
    """The fields of `DepthState` that `Random` reads."""

    depth: int
    input_ids: Tensor
    positions: Tensor


class Meter:
    """Sums since the last log, kept on the device: iterated share and cross-entropy by depth.

    With side passes, method.md (16), also the passes and the decisions of all tokens that are not padding, and the side
    passes, which are not among them.

    Args:
        prefix: Prefix of the names in the log.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, out: TaHOutput, batch: dict[str, Tensor]) -> None:
        """Add the counts and losses of a batch."""
        assert out.depth_count is not None
        supervised = supervised_of(batch)
        found = {"tokens": supervised.sum(), "iterated": (supervised & (out.depth_count > 1)).sum()}
        if out.token_loss is not None:
            for depth in range(out.token_loss.shape[2]):
                known = supervised & ~out.token_loss[:, :, depth].isnan()
                found[f"loss_{depth + 1}"] = out.token_loss[:, :, depth][known].sum()
                found[f"known_{depth + 1}"] = known.sum()
        if out.pass_loss is not None:
            assert out.continue_logits is not None
            read = read_of(batch)
            found |= {"read": read.sum(), "passes": out.depth_count[read].sum()}
            found["decisions"] = (~out.continue_logits[read].isnan()).sum()
            found["side"] = (~out.pass_loss.isnan()).sum() - out.depth_count[supervised].sum()
        for name, value in found.items():
            value = value.float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the averages and reset the sums.

        Args:
            reduce: Function that adds up the sums of all processes.
        """
        names, values = list(self.sums), list(self.sums.values())
        total = reduce(torch.stack(values)).tolist() if values else []
        sums, self.sums = dict(zip(names, total, strict=True)), {}
        logs = {"iterated_share": sums["iterated"] / max(1, sums["tokens"])} if sums else {}
        for name in [name for name in sums if name.startswith("loss_")]:
            if known := sums["known" + name.removeprefix("loss")]:
                logs[name.replace("loss", "loss_depth")] = sums[name] / known
        if "read" in sums:
            each = {"mean_depth": "passes", "decisions": "decisions", "side_passes": "side"}
            logs |= {name: sums[counted] / sums["read"] for name, counted in each.items()}
        return {self.prefix + name: value for name, value in logs.items()}


class TaHTrainer(TrainerHooks, Trainer):
    """`Trainer` for one stage.

    A checkpoint appears only when it is complete. SIGTERM saves a checkpoint and stops the training. A loss that is not
    finite raises ValueError with the step and the rows. Metrics are written to `metrics.jsonl` beside the directory of
    the checkpoints.

    Args:
        objective: What the stage trains.
        kwargs: Arguments of `Trainer`. Batches come from `data.Collator`; their entry `row` is for messages.
    """

    def __init__(self, *, objective: Objective, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert self.model is not None
        self.model.register_load_state_dict_pre_hook(_rename_former_tensors)  # checkpoints of older versions
        self.objective, self.stopped = objective, False
        self.meters = {True: Meter(), False: Meter("eval_")}  # training and evaluation
        self.add_callback(_StopOnSignal(self))

    # -- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, with the output if `return_outputs`.

        Args:
            model: Model as Trainer wraps it.
            inputs: Batch of `data.Collator`.
            return_outputs: Whether the output is returned too.
            num_items_in_batch: Number of supervised tokens over all accumulated batches and processes.

        Raises:
            ValueError: The loss is not finite.
        """
        batch = dict(inputs)
        rows = batch.pop("row", None)
        inner: TaHForCausalLM = self.accelerator.unwrap_model(self.model)
        training = model.training
        if self.objective.stage == "decider":  # no dropout in the frozen parts
            assert inner.decider is not None
            inner.eval()
            inner.decider.train(training)
        step = self.state.global_step
        loss, out = self.objective.loss(model, batch, self.state, self.args.world_size > 1, num_items_in_batch)
        if not torch.isfinite(loss):
            where = f" (rows {rows.tolist()})" if rows is not None else ""
            raise ValueError(f"the loss is {loss.item()} at step {step + 1}{where}; lower the learning rate")
        self.meters[training].add(out, batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, but the loss is already divided once
        return (loss, out) if return_outputs else loss

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the token id [B, T] that each position of a batch should predict, -100 where it has no loss."""
        return targets_of(batch["labels"], batch.get("attention_mask"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log iterated share and losses by depth too, and append a line to `metrics.jsonl`."""
        evaluated = any(name.startswith("eval_") for name in logs)
        logs |= self.meters[not evaluated].take(lambda sums: self.accelerator.reduce(sums, "sum"))
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **logs}
            with open(Path(self.args.output_dir).parent / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, run: Path, save: Callable[[Path], None]) -> None:
        """Write a checkpoint of Trainer beside its place, and rename it when it is complete.

        Args:
            run: Directory of the checkpoints.
            save: Trainer's function that writes a checkpoint below a directory.
        """
        name, staging = f"checkpoint-{self.state.global_step}", run / ".saving"
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        save(staging)
        self.accelerator.wait_for_everyone()
        if best := self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = best.replace(str(staging), str(run))
        if self.is_world_process_zero():
            self.state.save_to_json(str(staging / name / "trainer_state.json"))
            if (run / name).exists():
                shutil.rmtree(run / name)
            os.replace(staging / name, run / name)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()


def _rename_former_tensors(module: torch.nn.Module, state: dict[str, Any], *rest: Any) -> None:
    """Rename the tensors of older checkpoints in `state`."""
    for name in list(state):
        state[current_tensor(name)] = state.pop(name)


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint in `directory`, or None."""
    found = [path for path in directory.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _StopOnSignal(TrainerCallback):
    """Save a checkpoint after the current step and end the training when SIGTERM arrives."""

    def __init__(self, trainer: TaHTrainer) -> None:
        self.trainer = trainer
        self.before: Any = None
        self.asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self.before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # only the main thread can handle signals
            self.before = None

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = self.asked
        if args.world_size > 1:  # all processes must stop at the same step
            flags = self.trainer.accelerator.gather(torch.tensor([stop], device=args.device).int())
            stop = bool(flags.any())
        if stop:
            self.trainer.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
