"""What `test_trl_ranks.py` starts with torchrun, two processes on gloo: `-m helpers.trainer_ranks TRAINER FILE`.

Trainers that are not ours train three steps of each policy, with gradient checkpointing, for which they turn
`find_unused_parameters` off, and with a decider that is not frozen. The first rank writes the loss of each step.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from helpers.models import tah, token_ids
from helpers.trl_models import words
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
    arguments = trl.SFTConfig(directory, bf16=False, **SETTINGS | {"learning_rate": 5e-5} | settings)
    return trl.SFTTrainer(model(policy), arguments, train_dataset=rows, processing_class=words())


def losses(trainer: Trainer) -> list[float]:
    """The loss of each step of a training."""
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    found = {}
    for policy in POLICIES:
        with tempfile.TemporaryDirectory() as directory:
            trainer = {"plain": plain, "sft": sft}[sys.argv[1]](policy, directory)
            found[policy] = losses(trainer)
    if trainer.is_world_process_zero():
        Path(sys.argv[2]).write_text(json.dumps(found))
