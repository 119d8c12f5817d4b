"""Reinforcement learning of depth with TRL: a new decider learns from rewards which tokens need a second pass.

follow-tah needs a second pass where it follows two arrows. Its decider is trained from nothing, in seconds on a CPU.
"""

import json
import random
import tempfile

import torch
from datasets import Dataset
from trl import GRPOConfig

from tah import TaHForCausalLM
from tah.load import FOLLOW, load_tokenizer
from tah.training.trl import SampledDepthGRPOTrainer

tokenizer, model = load_tokenizer(str(FOLLOW)), TaHForCausalLM.from_pretrained(str(FOLLOW))
held_out = [json.loads(line) for line in (FOLLOW / "problems.jsonl").read_text().splitlines()]
encode = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, "padding": True}
given = tokenizer.apply_chat_template([line["messages"][:1] for line in held_out], **encode)


def problem(draw):
    words = draw.sample(range(16), 16)  # six lead to themselves, five to one of these, five to one of those
    target = {word: words[at if at < 6 else at - 6 if at < 11 else at - 5] for at, word in enumerate(words)}
    start = draw.choice(words[6:])
    arrows = draw.sample([f"e{word}>e{to}" for word, to in target.items()], 16)
    prompt = [{"role": "user", "content": " ".join([*arrows, f"e{start}"])}]
    return {"prompt": prompt, "answer": f"e{start} e{target[target[start]]}"}


def right(completions, answer, **kwargs):
    return [float(said[0]["content"].endswith(wanted)) for said, wanted in zip(completions, answer, strict=True)]


def cost(depth_count, **kwargs):
    return [-0.2 * (sum(depths) / len(depths) - 1) for depths in depth_count]


def share_right(**rule):
    ids = model.eval().generate(**given, max_new_tokens=8, do_sample=False, **rule)[:, given["input_ids"].shape[1] :]
    said = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(text.endswith(line["answer"]) for text, line in zip(said, held_out, strict=True)) / len(held_out)


torch.manual_seed(0)
model.config.threshold = 0.5
model.requires_grad_(False).decider.requires_grad_(True).reset_parameters()
torch.nn.init.zeros_(model.decider.output.bias)  # at first every second token takes another pass
settings = {"max_steps": 40, "learning_rate": 1e-2, "scale_rewards": "none", "per_device_train_batch_size": 64}
settings |= {"max_completion_length": 8, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
rows = Dataset.from_list([problem(random.Random(seed)) for seed in range(320)])
with tempfile.TemporaryDirectory() as directory:
    arguments = GRPOConfig(directory, **settings)
    SampledDepthGRPOTrainer(model, [right, cost], arguments, rows, processing_class=tokenizer).train()
never, learned = share_right(policy="never"), share_right()
print(f"right without a second pass {never:.0%}, with the decisions that were learned {learned:.0%}")
assert learned > never + 0.15, "the decider did not learn where a second pass helps"
