"""Hugging Face's Trainer with what iteration adds: who iterates in training, two losses, checkpoints that are whole.

Shapes: B batch, T tokens, M = max_depth.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from ..config import current_tensor
from ..core.compat import TrainerHooks
from ..core.logits import TaHOutput
from ..core.loss import IGNORE, decider_loss, shift
from ..model import TaHForCausalLM, TrainingPass
from ..names import BY_GAIN, Stage
from ..policy import Confidence, DepthState, Random

CHECKPOINTS = "checkpoints"


class _UncertainOf(Confidence):
    """Entropy, among tokens whose depth labels allow more: a prompt's tokens are not to be predicted."""

    def __init__(self) -> None:
        super().__init__("entropy")

    def __call__(self, state: DepthState) -> Tensor:
        """[N]"""
        assert state.depth_labels is not None
        return torch.where(state.depth_labels > state.depth, super().__call__(state), -math.inf)


@dataclass
class Objective:
    """What a stage trains, and on which tokens (the paper's two stages; docs/how-to/train.md).

    Args:
        stage: `backbone` (base, adapter, maps) or `decider`.
        method: which tokens iterate while the backbone is trained, and which tokens a decider is to find.
            `paper`: hard tokens, by their depth labels; loss of the final output.
            `lookahead`: every supervised token, all depths; loss after each depth. `blind` is the same, but deeper
            passes see no text (config `attention="blind"`), the control.
            `always`, `random`, `confidence`: as the policy of that name; loss of the final output.
            `standard`: no token.
        max_depth: most passes.
        seed: of the sampled shares.

    The other fields are those of the recipe's sections (`recipe.Backbone`, `recipe.Decider`).
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
    seed: int = 0

    @property
    def by_gain(self) -> bool:
        """Whether the decider learns what a pass gains, and not labels."""
        return self.method in BY_GAIN

    def depth_at(self, progress: float) -> int:
        """Most passes when `progress` in [0, 1] of the training is done."""
        reached = [depth for start, depth in self.depth_schedule if start <= progress]
        return reached[-1] if reached else self.max_depth

    def weights(self, depth: int) -> list[float] | None:
        if self.loss_weights is not None:  # what a shallower start leaves out goes to the depths that run
            scale = sum(self.loss_weights) / sum(self.loss_weights[:depth])
            return [scale * weight for weight in self.loss_weights[:depth]]
        return [1 / depth] * depth if self.by_gain else None

    def arguments(self, batch: dict[str, Tensor], step: int, depth: int, shared: bool = False) -> dict[str, Any]:
        """Arguments of `forward`, those of training as one object."""
        given = self._given(batch, step, depth, shared)
        its = {field.name: given.pop(field.name) for field in fields(TrainingPass) if field.name in given}
        return given | {"training": TrainingPass(**its)}

    def _given(self, batch: dict[str, Tensor], step: int, depth: int, shared: bool) -> dict[str, Any]:
        """Arguments of `forward` for a batch, at a training step with at most `depth` passes.

        `shared`: other processes run the same step, so every depth must run in each.
        """
        supervised = shift(batch["labels"]) != IGNORE  # [B, T] positions that predict a supervised token
        given: dict[str, Any] = {**batch, "max_depth": depth, "logits_to_keep": supervised.new_empty(0).long()}
        if shared:
            given["idle"] = True
        if self.stage == "decider" and not self.by_gain:
            # Only decisions are needed: no token runs the deepest pass, and nothing but the decider is trained.
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
        return 1 - math.exp(-self.tau)  # 1 - exp(-entropy) > 1 - exp(-tau)

    def _sample(self, batch: dict[str, Tensor], step: int) -> Tensor:
        """[B, T] bool, a share of all tokens; another one at every step, the same on any machine."""
        ids = batch["input_ids"]
        counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        state: Any = _Seen(1, ids.flatten(), batch.get("position_ids", counted).flatten())
        return (Random(self.share, self.seed + 7919 * step)(state) > 0).view_as(ids)

    def decider_loss(self, out: TaHOutput, batch: dict[str, Tensor], items: int | Tensor | None) -> Tensor:
        """The decider's loss from a forward with `arguments` (normalised once, over supervised tokens only)."""
        assert out.continue_logits is not None
        logits = out.continue_logits
        decisions = torch.arange(1, logits.shape[2] + 1, device=logits.device)  # asked after this depth
        asked = (shift(batch["labels"]) != IGNORE)[:, :, None] & ~logits.isnan()
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
    """The part of a `DepthState` that `Random` reads."""

    depth: int
    input_ids: Tensor
    positions: Tensor


class Meter:
    """Sums since the last log, on the device: share of iterated tokens and cross-entropy by depth."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, out: TaHOutput, batch: dict[str, Tensor]) -> None:
        assert out.depth_count is not None
        supervised = shift(batch["labels"]) != IGNORE
        found = {"tokens": supervised.sum(), "iterated": (supervised & (out.depth_count > 1)).sum()}
        if out.token_loss is not None:
            for depth in range(out.token_loss.shape[2]):
                known = supervised & ~out.token_loss[:, :, depth].isnan()
                found[f"loss_{depth + 1}"] = out.token_loss[:, :, depth][known].sum()
                found[f"known_{depth + 1}"] = known.sum()
        for name, value in found.items():
            value = value.float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Averages, and start again. `reduce` adds up the processes' sums."""
        names, values = list(self.sums), list(self.sums.values())
        total = reduce(torch.stack(values)).tolist() if values else []
        sums, self.sums = dict(zip(names, total, strict=True)), {}
        logs = {"iterated_share": sums["iterated"] / max(1, sums["tokens"])} if sums else {}
        for name in [name for name in sums if name.startswith("loss_")]:
            if known := sums["known" + name.removeprefix("loss")]:
                logs[name.replace("loss", "loss_depth")] = sums[name] / known
        return {self.prefix + name: value for name, value in logs.items()}


class TaHTrainer(TrainerHooks, Trainer):
    """`Trainer` for one stage.

    Checkpoints appear whole or not at all; SIGTERM saves one and stops; a loss that is not a number stops with the
    step and the rows. Metrics go to `metrics.jsonl` beside the checkpoints' directory.

    Args:
        objective: what is trained.
        kwargs: as for `Trainer`; batches come from `data.Collator` and have a `row` entry for messages.
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
        batch = dict(inputs)
        rows = batch.pop("row", None)
        inner: TaHForCausalLM = self.accelerator.unwrap_model(self.model)
        training = model.training
        if self.objective.stage == "decider":  # the frozen parts without dropout
            assert inner.decider is not None
            inner.eval()
            inner.decider.train(training)
        step, most = self.state.global_step, max(1, self.state.max_steps)
        depth = self.objective.depth_at(step / most)
        given = self.objective.arguments(batch, step, depth, shared=self.args.world_size > 1)
        out = model(**given, num_items_in_batch=num_items_in_batch)
        loss = out.loss
        if self.objective.stage == "decider":
            loss = self.objective.decider_loss(out, batch, num_items_in_batch)
        elif self.objective.joint:
            loss = loss + self.objective.decider_loss(out, batch, num_items_in_batch)
        if not torch.isfinite(loss):
            where = f" (rows {rows.tolist()})" if rows is not None else ""
            raise ValueError(f"the loss is {loss.item()} at step {step + 1}{where}; lower the learning rate")
        self.meters[training].add(out, batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes; the sum is meant
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        evaluated = any(name.startswith("eval_") for name in logs)
        logs |= self.meters[not evaluated].take(lambda sums: self.accelerator.reduce(sums, "sum"))
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **logs}
            with open(Path(self.args.output_dir).parent / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, run: Path, save: Callable[[Path], None]) -> None:
        """Trainer's checkpoint, written aside and moved into place by one rename when complete.

        Args:
            run: directory of the checkpoints.
            save: Trainer's own way to write one, below the directory that it is given.
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
    for name in list(state):
        state[current_tensor(name)] = state.pop(name)


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint below `directory`."""
    found = [path for path in directory.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _StopOnSignal(TrainerCallback):
    """SIGTERM (a scheduler taking the machine back) saves a checkpoint after the step and ends the training."""

    def __init__(self, trainer: TaHTrainer) -> None:
        self.trainer = trainer
        self.before: Any = None
        self.asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self.before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread: whoever runs us handles signals
            self.before = None

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stop = self.asked
        if args.world_size > 1:  # all ranks stop at the same step
            flags = self.trainer.accelerator.gather(torch.tensor([stop], device=args.device).int())
            stop = bool(flags.any())
        if stop:
            self.trainer.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
