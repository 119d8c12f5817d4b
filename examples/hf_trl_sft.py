"""Supervised fine-tuning with TRL, with the loss of every depth. On a CPU in seconds: python examples/hf_trl_sft.py

`LookAheadSFTTrainer` is `trl.SFTTrainer` with one difference: every supervised token takes all passes, and the output
after each depth counts. Rows are packed here. The script compares its loss with a computation of its own.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from tah import TaHForCausalLM
from tah.load import FOLLOW, load_tokenizer  # a tokenizer of the package, one token per word
from tah.training.trl import LookAheadSFTTrainer

tokenizer = load_tokenizer(str(FOLLOW))
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
model = TaHForCausalLM.from_base(base, max_depth=2, lora_rank=4, policy="always")

rows = [{"prompt": f"e{i}>e1 e1>e2", "completion": f"e{i} e{i % 3}>e{i}"} for i in range(12)]
with tempfile.TemporaryDirectory() as directory:
    arguments = SFTConfig(
        directory, max_steps=20, learning_rate=1e-2, packing=True, max_length=32, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_steps=5,
    )  # fmt: skip
    trainer = LookAheadSFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()

batch = next(iter(trainer.get_train_dataloader()))
model.eval()
with torch.no_grad():
    loss = float(trainer.compute_loss(model, dict(batch)))
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # position t predicts token t + 1
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    each = []
    for depth in (1, 2):
        depths = torch.where(targets != -100, depth, 1)
        logits = model(**inputs, policy="oracle", depth_labels=depths).logits
        each.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())))

print(f"loss of TRL's trainer {loss:.6f}; after each depth {each[0]:.6f} and {each[1]:.6f}")
assert abs(loss - (each[0] + each[1]) / 2) < 1e-5, "the loss is not the mean over the depths"
assert loss < 4, "nothing was learned"
