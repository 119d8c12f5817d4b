"""TRL's trainers take a TaH model: they call its base model and apply the output head themselves."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from tah import TaHForCausalLM
from tah.load import FOLLOW, load_tokenizer

pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning")]
trl = pytest.importorskip("trl", reason="TRL is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(FOLLOW))


def model_for(tokenizer) -> TaHForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = TaHForCausalLM.from_base(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)), lora_rank=4, policy="always"
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # a new LoRA changes nothing
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 64}], ids=["plain", "packed"])
def test_sft_has_the_loss_of_the_model_and_trains_base_and_lora(tokenizer, tmp_path, options):
    rows = [
        {"messages": [{"role": "user", "content": f"e{i}>e1 e1>e1 e{i}"}, {"role": "assistant", "content": "e1"}]}
        for i in range(4)
    ]
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False, **options
    )
    trainer = trl.SFTTrainer(
        model_for(tokenizer), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        model = trainer.model.eval()
        assert float(trainer.compute_loss(model, dict(batch))) == pytest.approx(float(model(**batch).loss), abs=1e-6)
        alone = model(**batch, policy="never").loss
        assert abs(float(alone) - float(model(**batch).loss)) > 1e-4  # control: the second pass is part of the loss
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    for part in ("embed_tokens", "q_proj.weight", "lora_A", "lora_B", "norm"):
        assert any(part in name for name in changed), part
