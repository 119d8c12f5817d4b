"""Train a TaH model with `transformers.Trainer` and take the best checkpoint: python examples/hf_trainer.py

Nothing here is special to TaH but `from_base`. The script compares the evaluation of Trainer with a plain forward.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tah import TaHForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
model = TaHForCausalLM.from_base(base, lora_rank=4, policy="always")
ids = torch.randint(3, 64, (16, 12))
rows = [{"input_ids": row, "labels": row} for row in ids]

with tempfile.TemporaryDirectory() as directory:
    arguments = TrainingArguments(
        directory, max_steps=30, learning_rate=1e-2, use_cpu=True, report_to="none", eval_strategy="steps",
        eval_steps=10, save_steps=10, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = trainer.evaluate()["eval_loss"]  # of the best checkpoint
    logits = trainer.predict(rows).predictions  # [16, 12, 64], without the depths

model.eval()
with torch.no_grad():
    out = model(ids.to(model.device), labels=ids.to(model.device))
print(f"eval_loss {before:.4f} -> {found:.4f}; a forward has {out.loss.item():.4f}")
assert abs(found - out.loss.item()) < 1e-5, "the evaluation of Trainer is not the loss of the model"
assert (torch.from_numpy(logits) - out.logits.cpu()).abs().max() < 1e-5, "the predictions are not the logits"
assert found < before, "nothing was learned"
