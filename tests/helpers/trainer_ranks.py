"""What `test_trl_ranks.py` starts with torchrun, two processes on gloo: `-m helpers.trainer_ranks TRAINER FILE`.

Trainers that are not ours train three steps of each policy, with gradient checkpointing, for which they turn
`find_unused_parameters` off, and with a decider that is not frozen. The first rank writes the loss of each step and the
final weights. TRAINER `given` or `sampled` is GRPO, of which every rank also writes its batch.
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from helpers.models import tah, token_ids
from helpers.trl_models import model_of, words
from tah import TaHForCausalLM

POLICIES = ("always", "never", "uneven")
ROWS = token_ids(8)
SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 1,
    "gradient_checkpointing": True,
    "use_cpu": True,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "optim": "sgd",  # weights differ by no more than gradients, and weight decay is a factor
    "learning_rate": 0.01,
    "weight_decay": 0.5,
    "lr_scheduler_type": "constant",
}


@torch.no_grad()
def model(policy: str) -> TaHForCausalLM:
    """A model; with the policy `uneven` tokens iterate in four of the eight rows."""
    made = tah(policy="decider" if policy == "uneven" else policy)
    if policy == "uneven":
        highest = made(ROWS).continue_prob.amax((1, 2)).sort().values
        made.config.threshold = float(highest[3:5].mean())
    return made


def plain(policy: str, directory: str, **settings: int) -> Trainer:
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ROWS]
    return Trainer(
        model(policy), TrainingArguments(directory, **SETTINGS | settings), train_dataset=Dataset.from_list(rows)
    )


def sft(policy: str, directory: str, **settings: int) -> Trainer:
    import trl

    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in ROWS])
    arguments = trl.SFTConfig(directory, bf16=False, **SETTINGS | settings)
    return trl.SFTTrainer(model(policy), arguments, train_dataset=rows, processing_class=words())


def losses(trainer: Trainer) -> list[float]:
    """The loss of each step of a training."""
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def grpo(kind: str, directory: str, **settings: int) -> Any:
    """A trainer of GRPO for one update with one prompt, of which `batches` keeps the inputs."""
    import trl

    from tah.training import trl as ours

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    cls = {"given": ours.GivenDepthGRPOTrainer, "sampled": ours.SampledDepthGRPOTrainer}[kind]
    tokenizer, rows = words(), [{"prompt": "e1>e2 " * 3 * (i % 2) + f"e{i}>e1 e{i}"} for i in range(4)]
    once = {"max_steps": 1, "weight_decay": 0.0, "max_grad_norm": 0.0, "learning_rate": 1.0}
    once |= {"per_device_train_batch_size": 2, "num_generations": 4}  # completions of both ranks
    once |= {"max_completion_length": 10, "loss_type": "grpo", "bf16": False}
    arguments = trl.GRPOConfig(directory, **SETTINGS | once | settings)
    trainer = cls(model_of(tokenizer), reward, arguments, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.batches, compute = [], trainer.compute_loss

    def kept(model: Any, inputs: dict[str, Any], *given: Any, **options: Any) -> Any:
        trainer.batches.append(dict(inputs))
        return compute(model, inputs, *given, **options)

    trainer.compute_loss = kept
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of the weights of a trainer's model."""
    inner = trainer.accelerator.unwrap_model(trainer.model)
    return {name: weight.detach().clone() for name, weight in inner.named_parameters()}


def main(kind: str, path: str) -> None:
    """Train, and write what the test compares."""
    with tempfile.TemporaryDirectory() as directory:
        if kind in ("given", "sampled"):
            trainer = grpo(kind, directory)
            trainer.train()
            torch.save((trainer.batches, weights(trainer)), f"{path}.{os.environ['RANK']}")
            return
        found = {}
        for policy in POLICIES:
            trainer = {"plain": plain, "sft": sft}[kind](policy, directory)
            found[policy] = losses(trainer), weights(trainer)
        if trainer.is_world_process_zero():
            torch.save(found, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
