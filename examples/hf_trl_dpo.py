"""Preference training (DPO) of a TaH model with TRL. On a CPU in seconds: python examples/hf_trl_dpo.py

`trl.DPOTrainer` takes a TaH model as it is. Policy and reference model each decide in their own forward which tokens
iterate. The script compares the loss of the first batch with a computation on the logits of each completion alone.
"""

import copy
import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from tah import TaHForCausalLM
from tah.load import FOLLOW, load_tokenizer  # a tokenizer of the package, one token per word

tokenizer = load_tokenizer(str(FOLLOW))
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
model = TaHForCausalLM.from_base(base, lora_rank=4, policy="confidence", threshold=0.995)
reference = copy.deepcopy(model)  # or leave it out: TRL then loads it from the directory of the model

rows = [{"prompt": f"e{i}>e1 e1>e2 ", "chosen": f"e2 e{i}", "rejected": f"e{i} e{i}>e1 e1"} for i in range(8)]
with tempfile.TemporaryDirectory() as directory:
    arguments = DPOConfig(
        directory, max_steps=10, learning_rate=1e-3, beta=0.5, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_steps=5,
    )  # fmt: skip
    trainer = DPOTrainer(model, reference, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()


def log_prob(of, row, name):
    ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
    each = of(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    return each[-len(row[f"{name}_ids"]) :].sum()


with torch.no_grad():
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = float(trainer.compute_loss(model.eval(), batch))
    scores = [
        log_prob(model, row, "chosen") - log_prob(reference, row, "chosen")
        - log_prob(model, row, "rejected") + log_prob(reference, row, "rejected")
        for row in trainer.train_dataset
    ]  # fmt: skip
    want = float(-torch.nn.functional.logsigmoid(0.5 * torch.stack(scores)).mean())

print(f"loss of TRL's trainer {loss:.6f}, of the completions alone {want:.6f}")
assert abs(loss - want) < 1e-4, "the losses differ"
assert loss < 0.69, "nothing was learned"
