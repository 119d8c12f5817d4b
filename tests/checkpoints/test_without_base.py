"""Load a checkpoint that contains the adapter alone, by our class and by the Auto classes; and `base=` elsewhere."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from helpers.families import tiny
from helpers.hub_cache import publish, use
from helpers.models import shake, tah, token_ids
from tah import TaHConfig, TaHForCausalLM
from tah.checkpoints.adapter import BASE
from tah.checkpoints.publish import AUTO_MAP

pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization import Int8WeightOnlyConfig  # noqa: E402

NAME = "someone/tiny"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub with the base `NAME`."""
    place = tmp_path_factory.mktemp("hub")
    tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(place / "base")
    publish(place / "cache", NAME, place / "base")
    return place / "cache"


@pytest.fixture
def in_use(hub, tmp_path, monkeypatch):
    use(hub, tmp_path / "ours", monkeypatch)


def quantised(dtype: torch.dtype = torch.float32, **options) -> TaHForCausalLM:
    options = {"policy": "always", "mix_topk": 16, "lora_rank": 4} | options
    return shake(
        TaHForCausalLM.from_base(
            NAME, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=dtype, **options
        )
    )


def test_auto_classes_load_it_on_its_base(in_use, hub, tmp_path):
    model, ids = quantised(), token_ids(2)
    model.save_pretrained(tmp_path / "made", auto_map=True)
    wanted = model(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made", trust_remote_code=True, dtype="auto")
    assert isinstance(loaded, TaHForCausalLM) and torch.equal(loaded(ids).logits, wanted)
    assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path / "made")
    assert loaded.config.auto_map == AUTO_MAP
    never = AutoModelForCausalLM.from_pretrained(tmp_path / "made", policy="never", attn_implementation="eager")
    assert never.config.policy == "never" and never.base.config._attn_implementation == "eager"
    assert not torch.equal(never(ids).logits, wanted)
    config = TaHConfig.from_pretrained(tmp_path / "made", policy="never")
    given = TaHForCausalLM.from_pretrained(tmp_path / "made", config=config, quantization_config=None, dtype="auto")
    assert torch.equal(given(ids).logits, model(ids, policy="never").logits)

    publish(hub, "someone/tah", tmp_path / "made")
    assert TaHForCausalLM.from_pretrained("someone/tah").config.name_or_path == "someone/tah"  # not the snapshot


def test_a_float32_adapter_beside_a_bfloat16_base_is_not_rounded(in_use, tmp_path):
    model, ids = quantised(torch.bfloat16), token_ids(2)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = torch.randn(weight.shape) / 8
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for options in ({}, {"base": NAME}, {"base": quantised(torch.bfloat16, lora_rank=0).base}):
        loaded = TaHForCausalLM.from_pretrained(tmp_path, **options)
        for name, weight in loaded.named_parameters():
            lora = ".lora_" in name
            assert not (lora or name.startswith("decider.")) or torch.equal(weight, model.get_parameter(name))
            assert not lora or (weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float()))
        assert loaded.decider.input.weight.dtype == torch.bfloat16
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    exact = TaHForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)  # the rest has the dtype of the base
    assert exact.decider.input.weight.dtype == exact(ids).logits.dtype == torch.float32


def test_options_of_the_hub_hold_for_the_base(in_use, hub, tmp_path, monkeypatch):
    model, ids = quantised(), token_ids(1)
    model.save_pretrained(tmp_path / "made")
    use(tmp_path / "empty", tmp_path / "ours", monkeypatch)
    with pytest.raises(ValueError, match=f"no model '{NAME}'"):
        TaHForCausalLM.from_pretrained(tmp_path / "made")
    loaded = TaHForCausalLM.from_pretrained(tmp_path / "made", cache_dir=hub, local_files_only=True)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_base_is_refused_for_a_whole_checkpoint(tmp_path):
    model, other = tah(), tiny("llama", seed=5)
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for base in (other, str(tmp_path)):
        with pytest.raises(ValueError, match="this checkpoint contains its base; remove base="):
            TaHForCausalLM.from_pretrained(tmp_path, base=base)
    assert before.keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_options_for_a_base_that_is_loaded_already_are_refused(in_use, tmp_path):
    quantised().save_pretrained(tmp_path)
    assert (tmp_path / BASE).is_file()
    base = quantised(lora_rank=0).base
    with pytest.raises(ValueError, match="there is nothing to load with attn_implementation, max_memory"):
        TaHForCausalLM.from_pretrained(tmp_path, base=base, attn_implementation="eager", max_memory={0: "1GB"})
    loaded = TaHForCausalLM.from_pretrained(tmp_path, base=base, policy="never", token=None, local_files_only=True)
    assert loaded.config.policy == "never"
