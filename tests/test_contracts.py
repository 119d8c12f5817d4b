"""What other libraries rely on in a model of transformers: names, signatures, outputs and refusals."""

import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from helpers.models import tiny, token_ids
from tah import TaHConfig, TaHForCausalLM, UnsupportedBase
from tah.model import TrainingPass


def wrapped(family: str = "llama", **options) -> TaHForCausalLM:
    """A model whose LoRA changes the deeper pass."""
    torch.manual_seed(0)
    model = TaHForCausalLM.from_base(tiny(family), lora_rank=4, **options)
    for name, weight in model.named_parameters():
        if "lora_B" in name or name.startswith("output_map"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize("output", ["sum", "zero_init"])
def test_the_head_of_the_base_model_is_the_logits(output, policy):
    """TRL computes `lm_head(model.base_model(...).last_hidden_state)`."""
    model, ids = wrapped(output=output), token_ids(2, 9)
    hidden = model.base_model(ids, policy=policy, use_cache=False).last_hidden_state
    logits = model(ids, policy=policy).logits
    assert torch.allclose(model.get_output_embeddings()(hidden), logits, atol=1e-5)
    if policy == "always":  # control: the decoder without the deeper pass is something else
        plain = model.get_output_embeddings()(model.decoder(ids).last_hidden_state)
        assert (plain - logits).abs().max() > 0.01


def test_the_base_model_has_the_attributes_of_the_decoder():
    model = wrapped()
    assert model.base_model.layers is model.decoder.layers
    assert model.get_encoder() is model
    assert model(token_ids(1, 5)).last_hidden_state is None  # kept only for calls that ask for it
    with pytest.raises(AttributeError):
        _ = model.base_model.no_such_attribute


def test_a_head_that_is_not_linear_has_no_base_model_to_call():
    model, ids = wrapped("gemma2"), token_ids(1, 5)
    with pytest.raises(ValueError, match="soft-cap.*tah train"):
        model.base_model(ids)
    model = wrapped("gemma2", output="zero_init")
    assert model.base_model(ids).last_hidden_state.shape == (1, 5, model.config.hidden_size)


def test_labels_are_those_of_a_causal_model():
    assert find_labels(TaHForCausalLM) == ["labels"]
    assert "depth_labels" not in inspect.signature(TaHForCausalLM.forward).parameters


def rows(count: int = 4) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in token_ids(count, 8)]


@pytest.mark.grad
def test_trainer_evaluates_and_predicts_as_for_any_causal_model(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(wrapped(), arguments, train_dataset=rows(), eval_dataset=rows(2))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    predicted = trainer.predict(rows(2))
    assert predicted.predictions.shape[:2] == (2, 8) and predicted.label_ids.shape == (2, 8)


def test_shifted_labels_give_the_same_loss():
    model, ids = wrapped(), token_ids(2, 9)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, labels=ids).loss, model(ids, shift_labels=shifted).loss)
    with pytest.raises(ValueError, match="shift_labels"):
        model(ids, shift_labels=shifted[:, 1:])


def test_boundaries_of_packed_rows_are_read_from_the_positions():
    model, ids = wrapped(policy="always"), token_ids(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    ends = torch.tensor([0, 4, 8], dtype=torch.int32)
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    packed = model(ids, position_ids=positions, seq_idx=positions, **given).logits
    assert torch.equal(packed, model(ids, position_ids=positions).logits)
    assert not torch.allclose(packed, model(ids).logits)  # control: the boundaries matter


def test_depth_labels_are_keyword_arguments():
    model, ids = wrapped(), token_ids(2, 9)
    labels = torch.ones_like(ids)
    labels[:, 3] = 2
    out = model(ids, labels=ids, depth_labels=labels, training=TrainingPass(follow_labels=True))
    assert torch.equal(out.depth_count, labels)


def test_facts_of_the_base_are_in_the_configuration_and_not_in_its_file():
    model = wrapped()
    base = model.config.base_config
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(model.config, name) == getattr(base, name)
        assert name not in {key for key, value in model.config.to_dict().items() if not isinstance(value, dict)}
    for name in ("no_such_field", "quantization_config"):
        assert not hasattr(model.config, name)
    assert not hasattr(TaHConfig(), "vocab_size")


def test_the_argument_of_from_pretrained_has_its_usual_name(tmp_path):
    wrapped().save_pretrained(tmp_path)
    assert isinstance(TaHForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path), TaHForCausalLM)


def test_a_peft_model_is_no_base():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(tiny("llama"), settings)
    with pytest.raises(UnsupportedBase, match="merge_and_unload"):
        TaHForCausalLM.from_base(model)
    assert isinstance(TaHForCausalLM.from_base(model.merge_and_unload()), TaHForCausalLM)


def test_a_base_with_injected_adapters_is_refused():
    peft = pytest.importorskip("peft")
    base = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=2), tiny("llama"))
    with pytest.raises(UnsupportedBase, match="merge_and_unload"):
        TaHForCausalLM.from_base(base)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedBase, match="PEFT"):
        TaHForCausalLM.from_base(peft.get_peft_model(tiny("llama"), prompts))


def test_a_fact_of_the_base_is_set_in_the_base(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    again = TaHForCausalLM.from_pretrained(tmp_path, max_position_embeddings=48)
    assert again.config.base_config.max_position_embeddings == again.config.max_position_embeddings == 48
    assert "max_position_embeddings" not in {k for k, v in again.config.to_dict().items() if not isinstance(v, dict)}


@pytest.mark.grad
def test_trainer_keeps_depth_labels_that_are_named(tmp_path):
    labels = torch.ones(8, dtype=torch.long)
    labels[3] = 2
    given = [row | {"depth_labels": labels} for row in rows(2)]
    for named, iterated in ((["labels", "depth_labels"], 1), (None, 0)):
        arguments = TrainingArguments(str(tmp_path), label_names=named, report_to="none", use_cpu=True)
        trainer = Trainer(wrapped(policy="oracle"), arguments, train_dataset=given)
        batch = next(iter(trainer.get_train_dataloader()))
        depths = trainer.model.eval()(**batch).depth_count
        assert int((depths > 1).sum()) == 2 * iterated  # control: without the names the column is dropped


def test_labels_of_depths_need_tokens():
    model, ids = wrapped(), token_ids(1, 5)
    with pytest.raises(ValueError, match="depth_labels need input_ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), depth_labels=torch.ones_like(ids))


def test_continuous_batching_is_refused_at_once():
    with pytest.raises(NotImplementedError, match="tah serve"):
        wrapped().generate_batch([[1, 2, 3]])


def test_reentrant_checkpointing_is_refused():
    model = wrapped()
    with pytest.raises(ValueError, match="use_reentrant=True is not supported"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert not model._supports_default_dynamic_cache()


def test_the_implementation_of_experts_is_that_of_the_base(tmp_path):
    torch.manual_seed(0)
    experts = tiny("qwen3_moe")
    model, ids = TaHForCausalLM.from_base(experts, policy="always", lora_rank=2), token_ids(1, 6)
    assert model._can_set_experts_implementation()
    logits = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert set(model.get_experts_implementation().values()) == {name}
        assert model.decoder.config._experts_implementation == name
        logits[name] = model(ids).logits
        assert torch.allclose(logits[name], logits["eager"], atol=1e-5)
    assert not torch.equal(logits["eager"], logits["batched_mm"])  # control: another kernel has other roundings
    with pytest.raises(ValueError, match="nonsense"):
        model.set_experts_implementation("nonsense")
    model.save_pretrained(tmp_path)
    again = TaHForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert set(again.get_experts_implementation().values()) == {"eager"}
    assert torch.allclose(again(ids).logits, logits["eager"], atol=1e-5)


def test_a_base_without_experts_has_no_implementation_of_them():
    model = wrapped()
    assert model._can_set_experts_implementation() is tiny("llama")._can_set_experts_implementation() is False
    now = model.get_experts_implementation()
    model.set_experts_implementation(now)  # what it has already, as generate and the exporters restore it
    for name in ("batched_mm", {"": "grouped_mm"}):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
            model.set_experts_implementation(name)
    assert model.get_experts_implementation() == now
    plain = TaHForCausalLM(TaHConfig(base_config=tiny("llama").config))
    assert set(plain.get_experts_implementation().values()) == {"eager"}


def test_a_directory_of_the_base_alone_is_no_checkpoint(tmp_path):
    model = wrapped()
    model.base_model.save_pretrained(tmp_path / "decoder")
    model.base.save_pretrained(tmp_path / "base")
    for name in ("decoder", "base"):
        with pytest.raises(ValueError, match=r"no base_config; make a model with TaHForCausalLM\.from_base"):
            TaHForCausalLM.from_pretrained(tmp_path / name)


def test_tied_weights_are_saved_once_and_are_not_missing(tmp_path):
    base = tiny("llama", tie_word_embeddings=True)
    model, ids = TaHForCausalLM.from_base(base, lora_rank=2, policy="always"), token_ids(1, 6)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "base.model.embed_tokens.weight" in tensors and "base.lm_head.weight" not in tensors
    again, info = TaHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.base.lm_head.weight is again.base.model.embed_tokens.weight
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    del tensors["base.model.embed_tokens.weight"]  # control: a tensor that is missing is reported
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="embed_tokens"):
        TaHForCausalLM.from_pretrained(tmp_path)
