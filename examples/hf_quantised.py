"""Train an adapter beside an 8-bit base (torchao), save it, load it and generate: QLoRA for TaH, on a CPU in seconds.

The script makes a tiny base, and compares with the same base without TaH (policy `never`) and with dequantised weights.

python examples/hf_quantised.py
"""

import tempfile

import torch
from datasets import Dataset
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig, Trainer, TrainingArguments

from tah import TaHForCausalLM

torch.manual_seed(0)
work = tempfile.mkdtemp()
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(f"{work}/base")
eight_bits = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}

model = TaHForCausalLM.from_base(f"{work}/base", policy="always", lora_rank=8, decider=None, **eight_bits)
trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
assert trained and all("lora_" in name for name in trained)  # the base is frozen

rows = Dataset.from_list(
    [{"input_ids": (ids := torch.arange(i, i + 12) % 64).tolist(), "labels": ids.tolist()} for i in range(32)]
)
arguments = TrainingArguments(
    f"{work}/run", max_steps=80, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True
)
loss = Trainer(model, arguments, train_dataset=rows).train().training_loss
model.save_pretrained(f"{work}/adapter")  # the adapter alone

stock = AutoModelForCausalLM.from_pretrained(f"{work}/base", **eight_bits).eval()
loaded = TaHForCausalLM.from_pretrained(f"{work}/adapter", base=f"{work}/base")  # quantised again while it is loaded
prompt = torch.arange(5, 13)[None]
with torch.no_grad():
    assert torch.equal(loaded(prompt, policy="never").logits, stock(prompt).logits), "depth 1 is not the stock model"
    made = loaded(prompt).logits
    assert torch.equal(made, model.eval()(prompt).logits), "the loaded model differs from the saved one"
    layers = dict(stock.named_modules())
    for name, layer in loaded.base.named_modules():
        if name in layers and type(layers[name]) is torch.nn.Linear and "lm_head" not in name:
            layer.weight = torch.nn.Parameter(layers[name].weight.dequantize())
    difference = (loaded(prompt).logits - made).abs().max().item()
    assert difference < 1e-4, "LoRA beside the quantised layers differs from LoRA beside dequantised ones"

answer = TaHForCausalLM.from_pretrained(f"{work}/adapter", base=f"{work}/base").generate(prompt, max_new_tokens=6)
print(f"loss {loss:.2f}, answer {answer[0, 8:].tolist()}, difference to dequantised weights {difference:.1e}")
