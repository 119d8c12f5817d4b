"""Reinforcement learning (GRPO) at given depth with TRL. On a CPU in seconds: python examples/hf_trl_grpo.py

The model's policy decides while completions are generated, and the update takes the same depths. The script changes the
threshold after a rollout and compares the importance ratios, with and without the depths of the rollout.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from tah import TaHForCausalLM
from tah.load import FOLLOW, load_tokenizer  # a tokenizer of the package, one token per word
from tah.training.trl import GivenDepthGRPOTrainer

tokenizer = load_tokenizer(str(FOLLOW))
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
rows = [{"prompt": f"e{i}>e1 e1>e2 e{i}"} for i in range(8)]
even = set(range(0, len(tokenizer), 2))


def reward(completion_ids, **kwargs):
    return [sum(token in even for token in ids) / len(ids) for ids in completion_ids]


def trained(trainer_class, directory):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes))
    model = TaHForCausalLM.from_base(base, lora_rank=4, lora_dropout=0.0, policy="confidence", threshold=0.955)
    arguments = GRPOConfig(
        directory, max_steps=6, learning_rate=1e-3, num_iterations=2, max_completion_length=8, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_steps=2,
    )  # fmt: skip
    trainer = trainer_class(model, reward, arguments, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer


def furthest_ratio(trainer):
    """The largest distance of an importance ratio from 1, where only the threshold has changed since the rollout."""
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    trainer.model.config.threshold = 0.9
    found = []
    forward = trainer.model.forward
    trainer.model.forward = lambda **given: found.append(forward(**given)) or found[-1]
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    new = found[-1].log_probs[:, -batch["completion_ids"].shape[1] :]
    old = batch["old_per_token_logps"]
    return float((((new - old) * batch["completion_mask"]).exp() - 1).abs().max())


with tempfile.TemporaryDirectory() as directory:
    given, again = (furthest_ratio(trained(kind, directory)) for kind in (GivenDepthGRPOTrainer, GRPOTrainer))
print(f"importance ratios differ from 1 by at most {given:.1e} at given depth, by {again:.1e} where decided again")
assert given < 1e-5 < again
