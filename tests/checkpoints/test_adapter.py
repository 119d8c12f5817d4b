"""What a model has beside its base, saved and loaded on its own."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tah import TaHForCausalLM, load_adapter, save_adapter
from tah.checkpoints.adapter import SETTINGS, WEIGHTS

SEAMS = {"next_input": "hidden", "output": "zero_init", "attention": "own", "lora_rank": 4, "threshold": 0.3}


@pytest.fixture
def base(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base)


@pytest.fixture
def model(tiny_base):
    torch.manual_seed(3)
    made = TaHForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(tiny_base), **SEAMS)
    for name, parameter in made.named_parameters():
        if not name.startswith("base.") or ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # or the second pass would add nothing
    return made.eval()


def test_base_and_adapter_are_the_model_again(model, base, tmp_path):
    ids = torch.randint(3, 50, (2, 9))
    wanted = model(ids, policy="always").logits
    save_adapter(model, tmp_path / "made", dtype=torch.float32)
    loaded = load_adapter(base, tmp_path / "made").eval()
    assert torch.equal(loaded(ids, policy="always").logits, wanted)
    assert not torch.equal(loaded(ids, policy="never").logits, wanted)
    settings = ("max_depth", "decider", "policy", "lora_targets", *SEAMS)
    assert {n: getattr(loaded.config, n) for n in settings} == {n: getattr(model.config, n) for n in settings}
    assert not [name for name in (tmp_path / "made").iterdir() if name.name not in (SETTINGS, WEIGHTS)]


def test_by_default_they_are_bfloat16_and_without_the_base(model, tmp_path):
    save_adapter(model, tmp_path)
    own = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("base.") or ".lora_" in n)
    assert 2 * own <= (tmp_path / WEIGHTS).stat().st_size < 2 * own + 20_000


def test_what_does_not_fit_is_refused(model, tiny_base, tmp_path):
    def load_onto_a_base(**options):
        return load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base, **options), tmp_path)

    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    wrong = {
        "belongs to a base with hidden_size=7, not hidden_size=": {"base": settings["base"] | {"hidden_size": 7}},
        "does not fit its additions.json: ": {"lora_rank": 5},
    }
    for message, change in wrong.items():
        (tmp_path / SETTINGS).write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=message):
            load_onto_a_base()
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    other = AutoModelForCausalLM.from_config(model.base.config)
    with pytest.raises(ValueError, match="a base of the same shape with other weights"):
        load_adapter(other, tmp_path)
    assert load_onto_a_base(dtype=torch.bfloat16).dtype == torch.bfloat16
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is not what additions.json was written with; copy both again"):
        load_onto_a_base()
    for damaged in ("{", '{"base": [1]}', "[]"):
        (tmp_path / SETTINGS).write_text(damaged)
        with pytest.raises(ValueError, match="holds no adapter, or a damaged one"):
            load_onto_a_base()


def test_a_plain_base_has_none(base, tmp_path):
    plain = TaHForCausalLM.from_base(base, lora_rank=0, decider=None, policy="never")
    with pytest.raises(ValueError, match="nothing beside its base"):
        save_adapter(plain, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_rank": 10**9},
        {"lora_rank": "4"},
        {"lora_rank": -4},
        {"lora_alpha": None},
        {"lora_targets": ["nowhere"]},
        {"decider": {"kind": "lean", "width": 10**12}},
        {"decider": {"kind": "mlp", "hidden_dims": [10**9, 10**9]}},
        {"decider": {"kind": "mlp", "hidden_dims": [8] * 10**5}},
        {"decider": None},
        {"max_depth": 10**9},
        {"next_input": "topk"},
        {"unheard": 1},
    ],
)
def test_settings_of_another_size_are_refused_before_anything_is_made(model, base, tmp_path, change):
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError) as error:
        load_adapter(base, tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not [name for name, _ in base.named_parameters() if ".lora_" in name]  # the base is as it was


def test_weights_that_are_no_safetensors_are_refused(model, base, tmp_path):
    save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    torch.save({"x": torch.ones(1)}, tmp_path / WEIGHTS)
    digest = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    (tmp_path / SETTINGS).write_text(json.dumps(settings | {"sha256": digest}))
    with pytest.raises(ValueError, match="additions.safetensors is damaged"):
        load_adapter(base, tmp_path)
