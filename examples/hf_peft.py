"""Train a PEFT adapter on a TaH model, save it, load it, merge it: `python examples/hf_peft.py`.

The adapter is active at every depth, beside the model's own LoRA, which is active from depth 2 on and stays frozen. The
example compares the model with the adapter with the merged model, which runs without PEFT, and exits with 1 if their
logits differ.
"""

import copy
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tah import TaHForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
model = TaHForCausalLM.from_base(base, lora_rank=4, policy="always")
for name, weight in model.named_parameters():
    if "lora_B" in name:  # an untrained LoRA changes nothing; a trained one does
        torch.nn.init.normal_(weight, std=0.1)
untouched = copy.deepcopy(model)
ids = torch.randint(3, 64, (4, 16))

model.requires_grad_(False)  # PEFT 0.19 would train the own LoRA, because of its name, and not save it
# The decider's layers are linear layers, too. A language-model loss does not reach them, so they get no adapter.
settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", exclude_modules=r"decider\..*")
adapted = get_peft_model(model, settings)
adapted.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(20):
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
adapted.eval()

with tempfile.TemporaryDirectory() as directory, torch.no_grad():
    adapted.save_pretrained(directory)
    loaded = PeftModel.from_pretrained(untouched, directory)  # the own LoRA is that of the checkpoint, unchanged
    logits = loaded(input_ids=ids).logits
    merged = loaded.merge_and_unload()  # a TaH model without PEFT
    difference = (merged(ids).logits - logits).abs().max().item()
    trained = (adapted(input_ids=ids).logits - logits).abs().max().item()
print(f"{type(merged).__name__}: merged differs by {difference:.1e}, loaded by {trained:.1e}")
if not (difference < 1e-3 and trained < 1e-4 and losses[-1] < losses[0]):
    raise SystemExit(1)
