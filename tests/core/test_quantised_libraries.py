"""What other libraries do with a model around a quantised or a split base: TRL, PEFT, Trainer; and its size."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from helpers.families import VOCAB, tiny
from helpers.models import distance, shake, tah, token_ids
from helpers.trl_models import words
from tah import TaHForCausalLM
from tah.checkpoints.adapter import BASE
from tah.checkpoints.contents import parameter_counts
from tah.core.quantised import plain_values

torchao = pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: E402


def quantised(vocab_size: int = VOCAB, lora_rank: int = 4) -> TaHForCausalLM:
    """A model around a base in int8; its head is not quantised."""
    base = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=vocab_size)
    quantize_(base, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    return shake(TaHForCausalLM.from_base(base, policy="always", mix_topk=16, lora_rank=lora_rank))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: plain_values(weight.detach()).clone() for name, weight in model.named_parameters()}


@pytest.mark.grad
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sft_trains_the_adapter_with_the_loss_of_the_model(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    tokenizer = words()
    model = quantised(vocab_size=len(tokenizer))
    before = weights(model)
    stock = quantised(vocab_size=len(tokenizer), lora_rank=0).base
    rows = Dataset.from_list([{"text": " ".join(f"e{j}>e{(i + j) % 13}" for j in range(6))} for i in range(8)])
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, disable_tqdm=True, bf16=False,
        report_to="none", use_cpu=True, learning_rate=1e-2, shuffle_dataset=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        given = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}
        wanted, one_pass = model(**given).loss.item(), model(**given, policy="never").loss.item()
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(wanted, abs=1e-4) and abs(logged - one_pass) > 1e-2
    changed = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert (tmp_path / "checkpoint-2" / BASE).is_file()
    loaded, ids = TaHForCausalLM.from_pretrained(tmp_path / "checkpoint-2", base=stock), token_ids(2)
    with torch.no_grad():
        assert distance(loaded(ids).logits, model.eval()(ids).logits) < 1e-5
        assert distance(stock(ids).logits, model(ids).logits) > 0.1  # control


@pytest.mark.grad
def test_peft_trains_a_copy_of_the_head():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(quantised(), config)
    before, ids = weights(model), token_ids(2)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.1)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert any("lm_head.modules_to_save" in name for name in changed)
    assert not [name for name in changed if "modules_to_save" not in name and "lora_" not in name]
    model.eval()
    model.get_submodule("base_model.model.base.lm_head.original_module").requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.original_module.weight requires a gradient, but the base is quan"):
        model.train()


def test_trainer_moves_no_layer_of_a_split_base(tmp_path):
    base = tiny("llama")
    control = Trainer(TaHForCausalLM.from_base(base, lora_rank=4), TrainingArguments(str(tmp_path), use_cpu=True))
    assert not control.is_model_parallel
    base = tiny("llama")
    base.hf_device_map = {"model": 0, "lm_head": 1}  # as from_pretrained leaves it with device_map="auto" on two GPUs
    model = TaHForCausalLM.from_base(base, lora_rank=4)
    assert model.hf_device_map == {"base.model": 0, "base.lm_head": 1}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True))
    assert trainer.is_model_parallel and not trainer.place_model_on_device
    whole = tiny("llama")
    whole.hf_device_map = {"": 0}
    assert TaHForCausalLM.from_base(whole, lora_rank=4).hf_device_map == {"base": 0}


class Packed(nn.Module):
    """The tensors of a layer in 4 bits, all zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Integers(Packed):
    """A layer of GPTQ: eight numbers in each element of a buffer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("qweight", torch.zeros(inputs // 8, outputs, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, outputs, dtype=torch.float16))
        self.bias = None


class Bytes(Packed):
    """A layer of bitsandbytes: two numbers in each byte of a parameter, and a plain bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs))


def test_a_packed_layer_counts_by_its_widths():
    plain = tah(next_input="mlp", policy="always")
    counts = parameter_counts(plain)
    assert counts["next_input"] == sum(p.numel() for n, p in plain.named_parameters() if n.startswith("next_input_"))
    assert counts["next_input"] > 0 and sum(counts.values()) == plain.num_parameters()
    for kind, biases in ((Integers, 0), (Bytes, 1)):
        base = tiny("llama")
        for layer in base.model.layers:
            up = layer.mlp.up_proj
            biases_of = biases * up.out_features * len(base.model.layers)
            layer.mlp.up_proj = kind(up.in_features, up.out_features)
        model = TaHForCausalLM.from_base(base, next_input="mlp", policy="always", mix_topk=16, lora_rank=4)
        assert parameter_counts(model) == counts | {"base": counts["base"] + biases_of}
        assert model.num_parameters() != plain.num_parameters()  # control
