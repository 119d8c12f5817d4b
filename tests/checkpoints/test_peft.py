"""PEFT directories: read with a checkpoint of the original implementation, and exchanged with PEFT itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers.originals import GOLDEN, Command, converted, copied, cut_in_half, edit, edit_tensors, refusal
from tah import TaHForCausalLM, load_peft, save_peft
from tah.checkpoints.peft import read_adapter, tensors_of
from tah.core.depth import at_depth


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A writable copy of checkpoint S."""
    return copied("S", tmp_path)


# -- the adapter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, "none"])
def test_checkpoint_without_an_adapter(src: Path, tmp_path: Path, adapter: str | None) -> None:
    shutil.rmtree(src / "lora")
    edit(src / "tah_config.json", adapter=adapter)
    _, model = converted(src, tmp_path)
    assert model.config.lora_rank == 0 and tensors_of(model) == {}


def test_adapter_must_be_where_the_config_says(src: Path, tmp_path: Path) -> None:
    edit(src / "tah_config.json", adapter=None)
    assert refusal(src, tmp_path) == f"tah_config.json: adapter is None, but {src / 'lora'} is there"
    edit(src / "tah_config.json", "adapter")
    shutil.rmtree(src / "lora")
    assert refusal(src, tmp_path) == f"tah_config.json: adapter is 'lora', but {src / 'lora'} is missing"


def test_adapter_must_agree_with_the_config(src: Path, tmp_path: Path) -> None:
    edit(src / "lora" / "adapter_config.json", lora_alpha=32)
    assert refusal(src, tmp_path) == "lora_alpha is 32 in lora/, but 16 in tah_config.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["w"]),
        ("init_lora_weights", "pissa"),
        ("some_later_option", True),
    ],
)
def test_adapter_that_cannot_be_represented_is_refused(src: Path, tmp_path: Path, key: str, value: Any) -> None:
    path = src / "lora" / "adapter_config.json"
    edit(path, **{key: value})
    assert refusal(src, tmp_path) == f"{path}: {key}={value!r} is more than a depth adapter can represent"


def test_other_peft_methods_are_refused(src: Path, tmp_path: Path) -> None:
    path = src / "lora" / "adapter_config.json"
    edit(path, peft_type="IA3")
    assert refusal(src, tmp_path) == f"{path} does not describe a LoRA adapter (peft_type LORA)"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [("r", value, "an integer >= 1") for value in (0, "8", None, True, 8.0)]
    + [(key, value, "a number") for key in ("lora_alpha", "lora_dropout") for value in (None, "2", True)],
)
def test_settings_must_be_numbers(src: Path, tmp_path: Path, key: str, value: Any, kind: str) -> None:
    path = src / "lora" / "adapter_config.json"
    edit(path, **{key: value})
    assert refusal(src, tmp_path) == f"{path}: {key}={value!r} is not {kind}"


A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: t.pop(A),
            f" has {B} but not {A}",
        ),
        (
            lambda t: t.pop(B),
            f" has {A} but not {B}",
        ),
        (
            lambda t: (t.pop(A), t.pop(B)),
            " lacks model.layers.1.mlp.up_proj.lora_A.weight, unlike the adapter of the model",
        ),
        (
            lambda t: t.update({A.replace(".1.", ".9."): t[A].clone(), B.replace(".1.", ".9."): t[B].clone()}),
            " adapts model.layers.9.mlp.up_proj.lora_A.weight, unlike the adapter of the model",
        ),
        (
            lambda t: t.update({A: t[A][:4].clone()}),
            ": model.layers.1.mlp.up_proj.lora_A.weight is [4, 64], the model needs [8, 64]",
        ),
        (lambda t: t.clear(), " holds no tensors"),
        (
            lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(2)}),
            ": base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector does not belong to a LoRA adapter of"
            " linear layers",
        ),
        (
            lambda t: t.update({f"other.{name}": t.pop(name) for name in (A, B)}),
            f": other.{A} does not belong to a LoRA adapter of linear layers",
        ),
    ],
)
def test_adapter_tensors_must_fit(src: Path, tmp_path: Path, change: Any, expected: str) -> None:
    path = src / "lora" / "adapter_model.safetensors"
    edit_tensors(path, change)
    edit(src / "lora" / "adapter_config.json", target_modules="all-linear")
    assert refusal(src, tmp_path) == f"{path}{expected}"


def test_target_that_has_no_tensors_is_refused(src: Path, tmp_path: Path) -> None:
    path = src / "lora" / "adapter_config.json"
    edit(path, target_modules=["q_proj", "w_proj"])
    assert refusal(src, tmp_path) == f"{path} targets w_proj, but adapter_model.safetensors has no such layer"


def test_target_that_the_base_does_not_have_is_refused(src: Path, tmp_path: Path) -> None:
    path = src / "lora" / "adapter_model.safetensors"
    edit_tensors(
        path, lambda t: t.update({n.replace("up_proj", "w_proj"): t.pop(n) for n in list(t) if "up_proj" in n})
    )
    edit(src / "lora" / "adapter_config.json", target_modules="all-linear")
    assert "['w_proj']: the base has no linear layer of that name" in refusal(src, tmp_path)


def test_adapted_head_is_refused(src: Path, tmp_path: Path) -> None:
    head = {f"base_model.model.lm_head.lora_{k}.weight": torch.ones(s) for k, s in (("A", (8, 64)), ("B", (512, 8)))}
    edit_tensors(src / "lora" / "adapter_model.safetensors", lambda tensors: tensors.update(head))
    assert "['lm_head']: the base has no linear layer of that name" in refusal(src, tmp_path)


def test_truncated_adapter_is_refused(src: Path, tmp_path: Path) -> None:
    cut_in_half(src / "lora" / "adapter_model.safetensors")
    assert refusal(src, tmp_path).startswith(f"the adapter in {src / 'lora'} is damaged or truncated: ")


def test_pickled_adapter_is_not_read(src: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save(Command(f"touch {marker}"), src / "lora" / "adapter_model.bin")
    (src / "lora" / "adapter_model.safetensors").unlink()
    expected = f"{src / 'lora'} has no adapter_model.safetensors; a pickled adapter is not read"
    assert refusal(src, tmp_path) == expected
    assert not marker.exists()


# -- PEFT, both ways ---------------------------------------------------------------------------------------------------


def randomised(model: TaHForCausalLM, seed: int = 0) -> TaHForCausalLM:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.normal_(std=0.1, generator=generator)
    return model


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def base_of(name: str) -> Any:
    return tiny_gpt2() if name == "gpt2" else AutoModelForCausalLM.from_pretrained(GOLDEN / name / "ckpt")


def assert_same_as_peft(model: TaHForCausalLM, base: Any, directory: Path) -> None:
    """PEFT with this adapter computes what our base does at depth 2, and not what it does at depth 1."""
    peft = pytest.importorskip("peft")
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        want = peft.PeftModel.from_pretrained(base, directory).eval()(ids).logits
        with at_depth(2):
            got = model.base(ids).logits
        plain = model.base(ids).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["S", "L"])
def test_converted_adapter_is_what_peft_computes(name: str, tmp_path: Path) -> None:
    source = GOLDEN / name / "ckpt"
    _, model = converted(source, tmp_path)
    assert_same_as_peft(model, base_of(name), source / "lora")


@pytest.mark.parametrize("name", ["S", "L", "gpt2"])
@pytest.mark.parametrize("targets", [None, "some"])
def test_saved_adapter_is_what_peft_computes(name: str, targets: str | None, tmp_path: Path) -> None:
    leaves = {"gpt2": ["c_attn", "c_fc"]}.get(name, ["q_proj", "down_proj"]) if targets else None
    model = randomised(TaHForCausalLM.from_base(base_of(name), lora_rank=4, lora_alpha=6, lora_targets=leaves))
    save_peft(model, tmp_path / "adapter")
    assert_same_as_peft(model, base_of(name), tmp_path / "adapter")


class Special(torch.nn.Linear):
    """A linear layer of a kind of its own, which gets no adapter."""


def with_special_layer() -> Any:
    base = base_of("S")
    base.model.layers[0].self_attn.q_proj.__class__ = Special
    return base


@pytest.mark.parametrize(("name", "transposed"), [("S", False), ("gpt2", True), ("special", False)])
def test_saved_settings_name_the_adapted_layers_and_no_others(name: str, transposed: bool, tmp_path: Path) -> None:
    make = with_special_layer if name == "special" else lambda: base_of(name)
    targets = ["c_attn"] if transposed else ["q_proj"]
    model = randomised(TaHForCausalLM.from_base(make(), lora_rank=4, lora_alpha=6, lora_targets=targets))
    save_peft(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    if name == "special":
        targets = [f"model.layers.{k}.self_attn.q_proj" for k in (1, 2, 3)]
    assert settings["target_modules"] == targets and settings["fan_in_fan_out"] is transposed
    assert_same_as_peft(model, make(), tmp_path)
    load_peft(model, tmp_path)


def test_adapter_round_trip(tmp_path: Path) -> None:
    model = randomised(TaHForCausalLM.from_base(base_of("S"), lora_rank=4, lora_alpha=6, lora_dropout=0.2))
    save_peft(model, tmp_path)
    other = TaHForCausalLM.from_base(base_of("S"), **read_adapter(tmp_path).fields(base_of("S")))
    load_peft(other, tmp_path)
    assert (other.config.lora_alpha, other.config.lora_dropout) == (6, 0.2)
    assert tensors_of(other).keys() == tensors_of(model).keys()
    for key, tensor in tensors_of(model).items():
        assert torch.equal(tensors_of(other)[key], tensor), key


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_made_by_peft_is_loaded(tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "mlp.up_proj"], use_rslora=rslora)
    theirs = peft.get_peft_model(base_of("S"), config)
    torch.manual_seed(0)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    fields = read_adapter(tmp_path).fields(base_of("S"))
    assert fields["lora_targets"] == ["q_proj", "up_proj"] and fields["lora_alpha"] == (12 if rslora else 6)
    model = TaHForCausalLM.from_base(base_of("S"), **fields)
    load_peft(model, tmp_path)
    assert_same_as_peft(model, base_of("S"), tmp_path)


@pytest.mark.parametrize("other", [{"lora_rank": 8}, {"lora_alpha": 7}, {"lora_rank": 0}, {"lora_targets": ["q_proj"]}])
def test_adapter_of_another_kind_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    fields = {"lora_rank": 4, "lora_alpha": 6, "lora_targets": ["q_proj", "v_proj"]}
    save_peft(TaHForCausalLM.from_base(base_of("S"), **fields), tmp_path)
    model = randomised(TaHForCausalLM.from_base(base_of("S"), **(fields | other)))
    before = {key: tensor.clone() for key, tensor in tensors_of(model).items()}
    with pytest.raises(ValueError) as error:
        load_peft(model, tmp_path)
    assert str(error.value) == (
        f"the adapter in {tmp_path} does not fit the model's; it fits from_base(base, lora_rank=4, lora_alpha=6.0, "
        "lora_dropout=0.0, lora_targets=['q_proj', 'v_proj'])"
    )
    assert all(torch.equal(before[key], tensor) for key, tensor in tensors_of(model).items())


def test_model_without_an_adapter_saves_none(tmp_path: Path) -> None:
    model = TaHForCausalLM.from_base(base_of("S"), lora_rank=0)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- adapters that take some layers ------------------------------------------------------------------------------------

SOME = {
    "a regular expression of two layers": ({"target_modules": r".*\.layers\.[02]\.self_attn\.(q|v)_proj"}, 4),
    "a regular expression of all": ({"target_modules": r".*\.(q_proj|up_proj)"}, 8),
    "a regular expression of one": ({"target_modules": r"model\.layers\.3\.mlp\.down_proj"}, 1),
    "excluded by leaf": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, 4),
    "excluded by name": ({"target_modules": ["q_proj"], "exclude_modules": ["model.layers.1.self_attn.q_proj"]}, 3),
    "excluded by a regular expression": (
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.layers\.[01]\..*"},
        4,
    ),
    "excluded of a regular expression": (
        {"target_modules": r".*\.mlp\..*_proj", "exclude_modules": ["gate_proj", "up_proj"]},
        4,
    ),
    "excluded of all": ({"target_modules": "all-linear", "exclude_modules": ["lm_head", "down_proj"]}, 24),
    "names of layers": ({"target_modules": ["layers.0.mlp.up_proj", "layers.3.self_attn.o_proj"]}, 2),
    "a name and a leaf": ({"target_modules": ["layers.0.mlp.up_proj", "o_proj"]}, 5),
    "a leaf within a part": ({"target_modules": ["mlp.up_proj", "self_attn.k_proj"]}, 8),
    "leaves": ({"target_modules": ["up_proj", "k_proj"]}, 8),
}


@pytest.fixture
def made_by_peft(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """An adapter that PEFT has written of these settings, and of how many layers."""
    peft = pytest.importorskip("peft")
    settings, count = SOME[request.param]
    theirs = peft.get_peft_model(base_of("S"), peft.LoraConfig(r=4, lora_alpha=6, **settings))
    torch.manual_seed(0)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", count


@pytest.mark.parametrize("made_by_peft", SOME, indirect=True)
def test_adapter_of_some_layers_is_what_peft_computes(made_by_peft: tuple[Path, int], tmp_path: Path) -> None:
    directory, count = made_by_peft
    adapter = read_adapter(directory)
    for base in (base_of("S"), TaHForCausalLM.from_base(base_of("S")).base):
        model = TaHForCausalLM.from_base(base_of("S"), **adapter.fields(base))
        load_peft(model, directory)
        assert len(tensors_of(model)) == 2 * count
        assert_same_as_peft(model, base_of("S"), directory)
    model.save_pretrained(tmp_path / "model")
    again = TaHForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids, policy="always").logits, model(ids, policy="always").logits)
    save_peft(again, tmp_path / "back")
    assert_same_as_peft(again, base_of("S"), tmp_path / "back")


@pytest.mark.parametrize("made_by_peft", SOME, indirect=True)
def test_what_is_said_to_fit_does_fit(made_by_peft: tuple[Path, int]) -> None:
    """The message names the very arguments with which it works, and never those that failed."""
    directory, _ = made_by_peft
    other = TaHForCausalLM.from_base(base_of("S"), lora_rank=4, lora_alpha=6, lora_targets=["gate_proj"])
    with pytest.raises(ValueError, match="it fits from_base") as error:
        load_peft(other, directory)
    given = str(error.value).partition("from_base(base, ")[2].removesuffix(")")
    model = TaHForCausalLM.from_base(base_of("S"), **eval(f"dict({given})"))  # noqa: S307  # our own words
    load_peft(model, directory)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"exclude_modules": ["q_proj"]}, "leaves model.layers.0.self_attn.q_proj out (exclude_modules), but"),
        (
            {"exclude_modules": ["model.layers.2.mlp.up_proj"]},
            "leaves model.layers.2.mlp.up_proj out (exclude_modules)",
        ),
        ({"exclude_modules": 3}, "exclude_modules=3 is neither a list of names nor a regular expression"),
        ({"exclude_modules": [1]}, "exclude_modules=[1] is neither a list of names nor a regular expression"),
        ({"exclude_modules": {"q_proj": 1}}, "is neither a list of names nor a regular expression"),
        ({"target_modules": 3}, "target_modules=3 is neither a list of names nor a regular expression"),
        ({"target_modules": ["q_proj", None]}, "is neither a list of names nor a regular expression"),
        ({"target_modules": ["q_proj", ""]}, "is neither a list of names nor a regular expression"),
        ({"target_modules": ["roj"]}, "targets roj, but adapter_model.safetensors has no such layer"),
        ({"target_modules": ["layers.9.mlp.up_proj"]}, "targets layers.9.mlp.up_proj, but"),
        ({"r": 10**9}, "[8, 128], the model needs [1000000000, 128]"),
        ({"r": 7}, "[8, 128], the model needs [7, 128]"),
    ],
)
def test_settings_that_disagree_with_the_tensors(src: Path, tmp_path: Path, settings: Any, expected: str) -> None:
    edit(src / "lora" / "adapter_config.json", **settings)
    if "r" in settings:
        adapter_kwargs = json.loads((src / "tah_config.json").read_text())["adapter_kwargs"]
        edit(src / "tah_config.json", adapter_kwargs=adapter_kwargs | settings)
    assert expected in refusal(src, tmp_path)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
def test_adapter_of_integers_is_refused(src: Path, tmp_path: Path, kind: torch.dtype) -> None:
    edit_tensors(src / "lora" / "adapter_model.safetensors", lambda t: t.update({A: t[A].to(kind)}))
    assert "not a matrix of floating point numbers" in refusal(src, tmp_path)


def test_a_regular_expression_of_a_stranger_is_not_run(src: Path, tmp_path: Path) -> None:
    """It could take for ever; what it took is known by the tensors."""
    edit(src / "lora" / "adapter_config.json", target_modules="(.*)*(.*)*(.*)*(.*)*(.*)*x", exclude_modules="((a*)*)*b")
    _, model = converted(src, tmp_path)
    assert model.config.lora_targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
