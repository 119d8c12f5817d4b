"""What `test_trl_ranks.py` starts with torchrun, two processes on gloo: `-m helpers.trainer_ranks CASE POLICY FILE`.

Each case trains three steps with a trainer that is not ours, with gradient checkpointing and a decider that is not
frozen. The first rank writes the loss of each step. `find_unused_parameters` is off, as both trainers choose then.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from helpers.models import tah, token_ids
from tah import TaHForCausalLM
from tah.load import FOLLOW, load_tokenizer

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
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in token_ids(8)]


def model(policy: str) -> TaHForCausalLM:
    made = tah(policy="confidence" if policy == "uneven" else policy)
    if policy == "uneven":  # some batches have a token that iterates and some have none
        made.config.threshold = 0.943
    return made


def plain(policy: str, directory: str) -> Trainer:
    return Trainer(model(policy), TrainingArguments(directory, **SETTINGS), train_dataset=Dataset.from_list(ROWS))


def sft(policy: str, directory: str) -> Trainer:
    import trl

    given = {"train_dataset": Dataset.from_list(ROWS), "processing_class": load_tokenizer(str(FOLLOW))}
    return trl.SFTTrainer(model(policy), trl.SFTConfig(directory, bf16=False, **SETTINGS), **given)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        trainer = {"plain": plain, "sft": sft}[sys.argv[1]](sys.argv[2], directory)
        trainer.train()
    if trainer.is_world_process_zero():
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        Path(sys.argv[3]).write_text(json.dumps(losses))
