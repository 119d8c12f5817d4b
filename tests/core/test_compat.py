"""Every private name of transformers and accelerate in `tah/core/compat.py` is still there and still does its work."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationMixin,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.families import tiny
from helpers.models import distance, labels, shake, tah, token_ids
from tah import TaHForCausalLM, check_base
from tah.core import compat
from tah.core.depth import at_depth
from tah.core.loss import targets_of


def test_the_name_of_the_cache_is_that_of_the_installed_transformers() -> None:
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert compat.CACHE in known
    assert compat.CACHE in inspect.signature(type(tiny("llama").model).forward).parameters


def test_a_cache_is_given_once() -> None:
    one = object()
    assert compat.given_cache(one, None) is compat.given_cache(None, one) is one
    with pytest.raises(ValueError, match="two names for one argument"):
        compat.given_cache(one, one)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_of_a_configuration(name: str) -> None:
    base = tiny("llama", name)
    assert compat.attention_of(base.config) == name
    compat.set_attention(base.config, "eager")
    assert compat.attention_of(base.model.layers[0].self_attn.config) == "eager"


def flash_like(monkeypatch: pytest.MonkeyPatch, name: str = "flash_causal_only") -> list[str]:
    """Register a kernel that takes no mask and looks itself up by its module's configuration, as flash kernels do."""
    calls: list[str] = []

    def kernel(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **kwargs: object) -> object:
        assert mask is None, "a flash kernel takes no ready mask"
        calls.append(module.config._attn_implementation)  # type: ignore[union-attr]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=kwargs["scaling"])
        return out.transpose(1, 2), None

    # transformers would import the package of a kernel with "flash" in its name
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *args, **kwargs: None)
    AttentionInterface.register(name, kernel)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return calls


@pytest.mark.parametrize("name", ["flash_causal_only", "causal_only"])
def test_flash_kernels_keep_depth_one_and_sdpa_takes_ready_masks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    calls, ids, depth_labels = flash_like(monkeypatch, name), token_ids(), labels(depth=3)
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with torch.no_grad():
        want = tah(max_depth=3, policy="oracle")(ids, depth_labels=depth_labels)
        base = tiny("llama", "sdpa")
        base.set_attn_implementation(name)
        model = shake(TaHForCausalLM.from_base(base, policy="oracle", max_depth=3, lora_rank=4))
        copied = copy.deepcopy(model)
        with open(tmp_path / "model.pickle", "wb") as file:
            pickle.dump(model, file)
        again = pickle.loads((tmp_path / "model.pickle").read_bytes())
        model.save_pretrained(tmp_path / "saved")
        for one in (model, copied, again):
            one.load_state_dict(tah(max_depth=3, policy="oracle").state_dict(), strict=False)
            calls.clear()
            out = one(ids, depth_labels=depth_labels)
            assert calls == [name] * base.config.num_hidden_layers  # depth 1 alone, under the kernel's own name
            assert compat.attention_of(one.base.config) == compat.attention_of(one.config.base_config) == name
            assert (out.depth_count == want.depth_count).all()
        for implementation in ("eager", "sdpa", name):  # chosen again after wrapping
            model.set_attn_implementation(implementation)
            calls.clear()
            found = model(ids, depth_labels=depth_labels).logits
            assert distance(found, out.logits) < 1e-4
            assert len(calls) == (base.config.num_hidden_layers if implementation == name else 0)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before  # nobody else's kernels changed


def test_checking_a_base_leaves_it_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_like(monkeypatch)
    base = tiny("llama", "sdpa")
    base.set_attn_implementation("flash_causal_only")
    before = [id(module.config) for module in base.modules() if hasattr(module, "config")]
    check_base(base)
    assert before == [id(module.config) for module in base.modules() if hasattr(module, "config")]
    assert compat.attention_of(base.config) == "flash_causal_only"


def test_a_kernel_without_a_mask_function_of_its_own_is_wrapped() -> None:
    AttentionInterface.register("maskless", ALL_ATTENTION_FUNCTIONS["sdpa"])
    base = tiny("llama", "sdpa")
    base.set_attn_implementation("maskless")
    with torch.no_grad():
        out = TaHForCausalLM.from_base(base)(token_ids(), policy="always")
    assert (out.depth_count == 2).all()


def test_the_configuration_of_an_attention_module_depends_on_the_depth_only_in_its_kernel() -> None:
    config = tiny("llama", "eager").config
    ours = copy.deepcopy(compat.AttentionByDepth(config))
    assert ours.hidden_size == config.hidden_size
    for name, deeper in [("flash_attention_2", "sdpa"), *((name, name) for name in compat.TAKE_MASKS)]:
        compat.set_attention(ours.config, name)  # also after the modules have got it
        assert ours._attn_implementation == name
        with at_depth(2):
            assert ours._attn_implementation == deeper


def test_kernels_of_a_configuration() -> None:
    assert compat.kernels_of(tiny("llama", "eager").config)["attn_implementation"] == "eager"


def test_marked_modules_are_not_initialised_again() -> None:
    base = tiny("llama")
    layers = [base.model.layers[0].mlp.up_proj, base.model.layers[0].mlp.down_proj]
    for layer in layers:
        nn.init.constant_(layer.weight, 7)
        layer._is_hf_initialized = False
    compat.mark_initialized(layers[0])
    base.initialize_weights()
    assert (layers[0].weight == 7).all() and not (layers[1].weight == 7).all()


def test_layers_are_replayed_although_they_write_into_a_cache() -> None:
    """Without permission transformers takes the cache away from a layer under activation checkpointing."""
    model = tah(policy="always").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer, given = model.base.model.layers[0], []
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get(compat.CACHE)), with_kwargs=True
    )
    ids = token_ids()
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert len(given) > 2 and all(cache is not None for cache in given)


def test_hooks_and_offloading_are_seen() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    layer = nn.Linear(2, 2)
    assert not compat.is_watched(layer) and not compat.is_offloaded(layer)
    add_hook_to_module(layer, ModelHook())
    assert compat.is_watched(layer) and compat.is_offloaded(layer)
    remove_hook_from_module(layer)
    assert not compat.is_watched(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert compat.is_watched(layer) and not compat.is_offloaded(layer)
        handle.remove()
    assert not compat.is_watched(layer)


@pytest.mark.parametrize("name", [name for name in vars(compat.PrivateHooks) if not name.startswith("__")])
def test_what_we_override_is_there_to_override(name: str) -> None:
    assert any(name in vars(kind) for parent in (PreTrainedModel, GenerationMixin) for kind in parent.__mro__), name
    ours, stock = getattr(compat.PrivateHooks, name), getattr(PreTrainedModel, name, None)
    stock = getattr(GenerationMixin, name) if stock is None and hasattr(GenerationMixin, name) else stock
    if callable(ours):
        theirs = inspect.signature(stock).parameters  # type: ignore[arg-type]
        named = [
            its.name for its in inspect.signature(ours).parameters.values() if its.kind is its.POSITIONAL_OR_KEYWORD
        ]
        assert set(named) <= set(theirs)


def test_the_overrides_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = tah(policy="always"), []
    for name in ("prepare_cache", "arguments_of_assistant"):
        plain = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda *args, plain=plain, name=name: (called.append(name), plain(*args))[1], raising=False
        )
    assistant = tiny("llama")
    model.generate(token_ids(1), max_new_tokens=3, assistant_model=assistant, do_sample=False)
    assert set(called) == {"prepare_cache", "arguments_of_assistant"}
    assert model._can_set_experts_implementation() is model.base._can_set_experts_implementation() is False
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.init_weights()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_replayed_layers_run_at_their_depth() -> None:
    contexts = []
    model = tah()
    model._set_gradient_checkpointing(True, gradient_checkpointing_func=lambda *args, **kwargs: contexts.append(kwargs))
    layer = model.base.model.layers[0]
    layer._gradient_checkpointing_func(None)
    assert contexts == [{"context_fn": model.replay_contexts}]


def test_a_renamed_checkpoint_is_saved_under_its_present_names(tmp_path: Path) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "old")
    state = load_file(tmp_path / "old" / "model.safetensors")
    save_file(
        {name.replace("lm_head", "former"): its for name, its in state.items()}, tmp_path / "old" / "model.safetensors"
    )
    former = {"^former": "lm_head"}
    for dropped in (False, True):
        model = type(base).from_pretrained(tmp_path / "old", key_mapping=dict(former))
        assert torch.equal(model.lm_head.weight, base.lm_head.weight)
        if dropped:
            compat.drop_renaming(model, former)
        model.save_pretrained(tmp_path / f"new-{dropped}")
        names = load_file(tmp_path / f"new-{dropped}" / "model.safetensors").keys()
        assert ("lm_head.weight" in names) == dropped  # else there was nothing to drop


def test_trainer_saves_where_it_is_told_and_restores(tmp_path: Path) -> None:
    """`TrainerHooks` and `restore`, on transformers' own Trainer."""
    base, staged = tiny("llama"), []

    class Staging(compat.TrainerHooks, Trainer):
        def targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return targets_of(batch["labels"], None)

        def save_checkpoint(self, run: Path, save: Callable[[Path], None]) -> None:
            staged.append(run)
            save(run / "aside")

    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    rows = [{"input_ids": token_ids(1)[0], "labels": token_ids(1)[0]}]
    with torch.enable_grad():
        trainer = Staging(base, arguments, train_dataset=rows)
        trainer.train()
    saved = tmp_path / "aside" / "checkpoint-1"
    assert staged == [tmp_path] and (saved / "model.safetensors").exists() and not (tmp_path / "checkpoint-1").exists()
    trained = base.lm_head.weight.clone()
    with torch.no_grad():
        base.lm_head.weight.zero_()
    compat.restore(trainer, str(saved))
    assert torch.equal(base.lm_head.weight, trained)
