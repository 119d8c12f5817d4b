"""A policy of your own: iterate after a digit, and nowhere else.

python examples/custom_policy.py
"""

import math

import torch
from transformers import AutoTokenizer

from tah import DepthState, Policy, TaHForCausalLM
from tah.checkpoints.smollm2 import smollm2_base

base = smollm2_base()
tokenizer = AutoTokenizer.from_pretrained(base)
model = TaHForCausalLM.from_base(str(base))


class AfterDigits(Policy):
    """+inf iterates and -inf stops whatever the threshold; a finite logit is compared with it after a sigmoid."""

    digits = torch.tensor([tokenizer.decode([i]).strip().isdigit() for i in range(len(tokenizer))])

    def __call__(self, state: DepthState) -> torch.Tensor:
        assert state.input_ids is not None
        return torch.where(self.digits[state.input_ids], math.inf, -math.inf)


chat = [{"role": "user", "content": "What is 12 + 7?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**inputs, policy=AfterDigits(), max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
for token, depth in zip(out.sequences[0].tolist(), out.depth_count[0].tolist(), strict=True):
    print(f"{depth}  {tokenizer.decode([token])!r}")
