"""Train a tiny TaH model with accelerate, in any number of processes, and compare with a loop of plain PyTorch.

Tokens of the first row only iterate, so with two processes the second one has no hard token.

python examples/hf_accelerate.py
torchrun --nproc_per_node 2 examples/hf_accelerate.py
accelerate launch --cpu examples/hf_accelerate.py
"""

import copy

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from tah import TaHForCausalLM, TrainingPass

torch.manual_seed(0)
sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(**sizes))
model = TaHForCausalLM.from_base(base, max_depth=2, lora_rank=4, policy="oracle", decider=None).train()
ids = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(1))
depth_labels = torch.ones_like(ids)  # passes of each token, which the policy oracle follows
depth_labels[0, 5::4] = 2
tokens = ids[:, 1:].numel()  # supervised tokens of all processes together

plain, expected = copy.deepcopy(model), []  # the same steps without accelerate, on all rows
optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
for _ in range(3):
    loss = plain(ids, labels=ids, depth_labels=depth_labels, num_items_in_batch=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    expected.append(loss.item())

accelerator = Accelerator(cpu=True)
processes, losses = accelerator.num_processes, []
rows = [{"input_ids": x, "labels": x, "depth_labels": depth} for x, depth in zip(ids, depth_labels, strict=True)]
loader = DataLoader(rows, batch_size=len(rows) // processes)  # one batch for each process
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5), loader)
for _ in range(3):
    for batch in loader:
        # idle: a process without hard tokens uses the same parameters as the others.
        loss = model(**batch, num_items_in_batch=tokens, training=TrainingPass(idle=True)).loss
        accelerator.backward(loss * processes)  # DDP takes the mean of the gradients, and a loss is a share of the sum
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), reduction="sum").item())

accelerator.print(f"{processes} processes, loss", *(f"{loss:.4f}" for loss in losses))
torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
torch.testing.assert_close(accelerator.unwrap_model(model).state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
accelerator.end_training()
