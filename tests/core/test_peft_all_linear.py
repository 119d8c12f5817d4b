"""PEFT around a TaH model: adapters on the layers of the base, beside the model's own LoRA."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from helpers.families import tiny
from helpers.models import tah, token_ids
from tah import TaHForCausalLM
from tah.core.lora import DepthLoRA

peft = pytest.importorskip("peft")
DECIDER = r"decider\..*"  # its layers are linear layers, too, but a language-model loss gives them no gradient


def adapted(model: torch.nn.Module, **options) -> peft.PeftModel:
    """The model with a random PEFT adapter on every linear layer."""
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", **options)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, settings)
    for name, weight in wrapped.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return wrapped


def layers(model: torch.nn.Module) -> list[str]:
    """Names of the layers that PEFT adapts, relative to the base."""
    named = model.get_base_model().named_modules()
    return [n.removeprefix("base.") for n, m in named if isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_linear_layers_are_those_of_the_base(family: str) -> None:
    alone = layers(adapted(tiny(family)))
    assert len(alone) > 4
    assert layers(adapted(tah(family, lora_rank=4), exclude_modules=DECIDER)) == alone
    with_decider = layers(adapted(tah(family, lora_rank=4, decider={"kind": "lean"})))
    assert [name for name in with_decider if not name.startswith("decider.")] == alone
    assert len(with_decider) > len(alone)  # control: without exclude_modules the decider is adapted as well


def test_only_the_adapter_of_peft_is_trained() -> None:
    model = adapted(tah(policy="always"), exclude_modules=DECIDER)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".default." in name for name in trained)
    own = [layer for layer in model.modules() if isinstance(layer, DepthLoRA)]
    assert own and not any(layer.lora_A.weight.requires_grad for layer in own)


@pytest.mark.grad
def test_every_part_of_the_adapter_has_a_gradient() -> None:
    model = adapted(tah(policy="always"), exclude_modules=DECIDER).train()
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]


@pytest.mark.parametrize("policy", ["never", "random", "always"])
def test_the_adapter_is_the_same_when_merged_and_when_loaded(policy: str, tmp_path: Path) -> None:
    ids, plain = token_ids(), tah(policy=policy, random_rate=0.5)(token_ids()).logits
    model = adapted(tah(policy=policy, random_rate=0.5))
    logits = model(ids).logits
    with torch.enable_grad():  # the plain path
        assert torch.allclose(model(ids).logits, logits, atol=1e-5)
    assert not torch.allclose(plain, logits, atol=0.01)  # control: the adapter matters
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tah(policy=policy, random_rate=0.5), tmp_path)
    assert torch.equal(again(ids).logits, logits)
    merged = model.merge_and_unload()
    assert type(merged) is TaHForCausalLM
    assert torch.allclose(merged(ids).logits, logits, atol=1e-4)
    tokens = again.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(merged.generate(ids, max_new_tokens=4, do_sample=False), tokens)


def test_without_further_passes_it_is_the_adapter_on_the_base() -> None:
    base, model = adapted(tiny("llama")), adapted(tah("llama", policy="never"), exclude_modules=DECIDER)
    logits = base(token_ids()).logits
    assert torch.allclose(model(token_ids()).logits, logits, atol=1e-5)
    assert not torch.allclose(model(token_ids(), policy="always").logits, logits, atol=0.01)


@pytest.mark.grad
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "hf_peft.py"))
    assert "merged differs by" in capsys.readouterr().out
