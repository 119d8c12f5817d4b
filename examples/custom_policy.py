"""Run SmolLM2 with a custom policy: every token that is a number takes a second pass, and no other token does.

The script prints the depth of each token of the prompt and of the answer. The depth of the last token is 0, because it
has not been an input of the model.

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
    """Return +inf for a token that is a number and -inf for any other token, so that the threshold has no effect."""

    digits = torch.tensor([tokenizer.decode([i]).strip().isdigit() for i in range(len(tokenizer))])

    def __call__(self, state: DepthState) -> torch.Tensor:
        assert state.input_ids is not None
        return torch.where(self.digits[state.input_ids], math.inf, -math.inf)


chat = [{"role": "user", "content": "What is 12 + 7?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**inputs, policy=AfterDigits(), max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
for token, depth in zip(out.sequences[0].tolist(), out.depth_count[0].tolist(), strict=True):
    print(f"{depth}  {tokenizer.decode([token])!r}")
