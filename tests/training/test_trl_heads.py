"""Which heads TRL applies to a sum of passes: a family has the log-probabilities of the model, or it is refused."""

import pytest
import torch
from datasets import Dataset

from helpers.families import FAMILIES, tiny
from helpers.models import labels, shake, token_ids
from helpers.trl_models import model_of, words
from tah import TaHForCausalLM

trl = pytest.importorskip("trl", reason="TRL is not installed")

from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from tah.training import trl as ours  # noqa: E402

pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


@pytest.fixture(scope="module")
def tokenizer():
    return words()


@torch.no_grad()
@pytest.mark.parametrize("output", ["sum", "zero_init"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_of_the_head_that_trl_applies(family, output):
    """TRL reads scale and soft-cap from the configuration, and the model from the head itself."""
    try:
        base = tiny(family)
    except (ValueError, KeyError):
        pytest.skip(f"the installed transformers has no {family}")
    model = shake(TaHForCausalLM.from_base(base, policy="oracle", mix_topk=16, lora_rank=4, output=output))
    ids, depths = token_ids(), labels()
    logits = model(ids, depth_labels=depths).logits
    want = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    add_fused_lm_head(model)
    if not model.sums_states:
        with pytest.raises(ValueError, match="the head has a soft-cap or a bias"):
            model(ids, labels=ids, depth_labels=depths, fused_lm_head=True)
        return
    got = model(ids, labels=ids, depth_labels=depths, fused_lm_head=True).log_probs
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    alone = model(ids, labels=ids, policy="never", fused_lm_head=True).log_probs
    assert (alone - want).abs().max() > 1e-2  # control: the second pass is part of it


ROWS = [{"prompt": "e1>e2 e2>e3 e1", "chosen": "e2 e3", "rejected": "e3"} for _ in range(4)]
SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}


def sft(model, tokenizer, directory):
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS])
    arguments = trl.SFTConfig(str(directory), **SETTINGS)
    trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()


def dpo(model, tokenizer, directory):
    arguments = trl.DPOConfig(str(directory), precompute_ref_log_probs=True, **SETTINGS)
    trl.DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer).train()


def grpo(cls):
    def train(model, tokenizer, directory):
        arguments = trl.GRPOConfig(str(directory), num_generations=2, max_completion_length=3, **SETTINGS)
        rows = Dataset.from_list(ROWS).select_columns("prompt")
        cls(model, lambda prompts, **kwargs: [0.0] * len(prompts), arguments, rows, processing_class=tokenizer).train()

    return train


@pytest.mark.parametrize(
    "train",
    [sft, dpo, grpo(trl.GRPOTrainer), grpo(ours.GivenDepthGRPOTrainer)],
    ids=["sft", "dpo", "grpo", "given_depth"],
)
def test_every_trainer_refuses_a_head_with_a_soft_cap(tokenizer, tmp_path, train):
    with pytest.raises(ValueError, match="the head has a soft-cap or a bias"):
        train(model_of(tokenizer, "gemma2"), tokenizer, tmp_path)


def test_given_depth_refuses_before_the_first_rollout(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(trl.GRPOTrainer, "train", lambda self: pytest.fail("the trainer was made"))
    with pytest.raises(ValueError, match="choose output='zero_init'"):
        grpo(ours.GivenDepthGRPOTrainer)(model_of(tokenizer, "gemma2"), tokenizer, tmp_path)
