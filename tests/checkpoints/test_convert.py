"""Checkpoints of the original implementation: converted, or refused with one line and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.originals import (
    GOLDEN,
    Command,
    converted,
    copied,
    cut_in_half,
    edit,
    edit_decider_kwargs,
    edit_pickle,
    edit_tensors,
    refusal,
)
from tah import TaHForCausalLM, convert

DTYPE = {"__dtype__": True, "__str__": "torch.bfloat16"}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A writable copy of checkpoint S."""
    return copied("S", tmp_path)


# -- what is converted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["S", "L"])
def test_converted_model_holds_the_tensors_of_the_original(name: str, tmp_path: Path) -> None:
    source = GOLDEN / name / "ckpt"
    report, model = converted(source, tmp_path)
    state = model.state_dict()
    for key, tensor in load_file(source / "model.safetensors").items():
        assert torch.equal(state[f"base.{key}"], tensor), key
    lora = load_file(source / "lora" / "adapter_model.safetensors")
    for key, tensor in lora.items():
        assert torch.equal(state[key.replace("base_model.model.", "base.")], tensor), key
    decider = torch.load(source / "iter_decider.bin", weights_only=True)["state_dict"]
    for key, tensor in decider.items():
        assert key == "threshold" or torch.equal(state[f"decider.{key}"], tensor), key
    assert {key for key in state if ".lora_" in key} == {key.replace("base_model.model.", "base.") for key in lora}
    assert {key for key in state if key.startswith("decider.")} == {f"decider.{k}" for k in decider if k != "threshold"}
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.notes == [] and report.unknown_keys == [] and report.dtype == "float32"


@pytest.mark.parametrize("name", ["S", "L"])
def test_converted_model_answers_as_the_original_did(name: str, tmp_path: Path) -> None:
    _, model = converted(GOLDEN / name / "ckpt", tmp_path)
    inputs = load_file(GOLDEN / name / "inputs.safetensors")
    recorded = load_file(GOLDEN / name / "eval_right.safetensors")
    with torch.no_grad():
        out = model(inputs["right_input_ids"], attention_mask=inputs["right_attention_mask"])
    valid = recorded["valid"].bool()
    assert torch.equal(out.depth_count, recorded["iter_count"])
    torch.testing.assert_close(out.logits[valid], recorded["final_logits"][valid], atol=3e-4, rtol=1e-4)


def test_config_and_report(src: Path, tmp_path: Path) -> None:
    edit(src / "lora" / "adapter_config.json", lora_dropout=0.25)
    report, model = converted(src, tmp_path)
    config = model.config
    assert (config.max_depth, config.mix_topk, config.policy) == (2, 20, "decider")
    assert config.threshold == torch.tensor(0.415, dtype=torch.float32).item()
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (8, 16, 0.25)
    assert config.lora_targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config.decider == {
        "kind": "mlp",
        "layers": [0, 2, 4],
        "hidden_dims": [32, 48, 32],
        "expansion": 2,
        "topk": 20,
        "normalize_input": False,
        "dropout": 0.0,
    }
    assert model.generation_config.eos_token_id == 490
    assert report.base_family == "qwen3" and report.max_depth == 2 and report.threshold == config.threshold
    assert str(report).splitlines() == [
        "base       qwen3, float32",
        f"parameters {report.parameters:,} in all",
        "max_depth  2",
        "threshold  0.415",
    ]


def test_normalised_input_and_untied_head_are_kept(tmp_path: Path) -> None:
    _, model = converted(GOLDEN / "L" / "ckpt", tmp_path)
    assert model.config.decider["normalize_input"] is True and model.config.mix_topk == 10
    assert model.base.lm_head.weight is not model.base.model.embed_tokens.weight


def test_only_a_native_checkpoint_is_written(src: Path, tmp_path: Path) -> None:
    files = {"tokenizer.json": b"{1}", "tokenizer_config.json": b"\xff2", "chat_template.jinja": b"{{3}}\r\n"}
    for name, data in files.items():
        (src / name).write_bytes(data)
    (src / "training_config.yaml").write_text("left: behind")
    (src / "modeling_evil.py").write_text("left behind")
    convert(src, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"README.md", "config.json", "generation_config.json", "model.safetensors", *files}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_hub_snapshot_of_links_becomes_plain_files(src: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    (snapshot / "lora").mkdir(parents=True)
    (src / "tokenizer.json").write_text("{}")
    for path in src.rglob("*.*"):
        (snapshot / path.relative_to(src)).symlink_to(path)
    convert(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_sharded_base(src: Path, tmp_path: Path) -> None:
    whole = load_file(src / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(src).save_pretrained(src, max_shard_size="200KB")
    (src / "model.safetensors").unlink(missing_ok=True)
    assert len(list(src.glob("model-*.safetensors"))) > 1
    _, model = converted(src, tmp_path)
    assert all(torch.equal(model.state_dict()[f"base.{name}"], tensor) for name, tensor in whole.items())
    shutil.rmtree(tmp_path / "out")
    next(src.glob("model-00002-*.safetensors")).unlink()
    assert "model.safetensors.index.json is damaged or incomplete: model-00002-of" in refusal(src, tmp_path)


# -- the traps of the original -----------------------------------------------------------------------------------------


def test_threshold_is_the_configs_and_never_the_weights(src: Path, tmp_path: Path) -> None:
    edit_pickle(src, lambda data: data["state_dict"].update(threshold=torch.tensor(0.9)))
    report, model = converted(src, tmp_path)
    assert model.config.threshold == pytest.approx(0.415)
    assert report.notes == ["the threshold among the weights, 0.9, is not used: the config's 0.415 is"]


def test_threshold_is_one_half_when_absent(src: Path, tmp_path: Path) -> None:
    edit_decider_kwargs(src, "threshold")
    report, _ = converted(src, tmp_path)
    assert report.threshold == 0.5
    assert report.notes == ["the threshold among the weights, 0.415, is not used: the config's 0.5 is"]


def test_threshold_can_be_given(src: Path, tmp_path: Path) -> None:
    report, model = converted(src, tmp_path, threshold=0.75)
    assert report.threshold == model.config.threshold == 0.75


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), True, "0.9"])
def test_threshold_out_of_range_is_refused(src: Path, tmp_path: Path, value: Any) -> None:
    assert refusal(src, tmp_path, threshold=value) == f"threshold={value!r} must be a number in [0, 1]"


def test_half_precision_base_rounds_threshold_decider_and_adapter(src: Path, tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    edit_tensors(src / "model.safetensors", halve)
    edit(src / "config.json", torch_dtype="bfloat16")
    report, model = converted(src, tmp_path, threshold=0.9)
    assert report.dtype == "bfloat16" and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.threshold == model.config.threshold == 0.8984375
    saved = torch.load(src / "iter_decider.bin", weights_only=True)["state_dict"]
    name = "backbone.blocks.0.mlp.0.weight"
    assert torch.equal(model.decider.state_dict()[name], saved[name].bfloat16())
    assert report.notes == [
        "threshold 0.9 is 0.8984375 in the decider's precision, as in the original",
        "the decider is rounded to the base's torch.bfloat16, as in the original",
        "the adapter is rounded to the base's torch.bfloat16; the original computes it in float32",
    ]
    assert all(note in str(report) for note in report.notes)


def test_dtype_of_the_base_is_read_off_its_weights_when_the_config_has_none(src: Path, tmp_path: Path) -> None:
    edit(src / "config.json", "torch_dtype")
    assert converted(src, tmp_path)[0].dtype == "float32"


@pytest.mark.parametrize("drop", [["dtype"], []])
def test_decider_dtype_rounds_even_a_float32_base(src: Path, tmp_path: Path, drop: list[str]) -> None:
    """bfloat16 is what the original's decider class builds its threshold and first projections in by default."""
    edit_decider_kwargs(src, *drop, **({} if drop else {"dtype": DTYPE}), threshold=0.9)
    report, model = converted(src, tmp_path)
    assert report.dtype == "float32" and report.threshold == 0.8984375
    saved, own = torch.load(src / "iter_decider.bin", weights_only=True)["state_dict"], model.decider.state_dict()
    for name, tensor in own.items():
        rounds = name.startswith(("logits_projection", "combined_projection"))
        assert torch.equal(tensor, saved[name].bfloat16().float() if rounds else saved[name]), name
    assert "the decider's first projections are rounded to torch.bfloat16, as in the original" in report.notes


@pytest.mark.parametrize(("model", "decider", "effective"), [(5, None, 3), (4, 2, 2), (2, None, 2), (2, 5, 2)])
def test_decider_stops_at_its_own_max_iter(
    src: Path, tmp_path: Path, model: int, decider: int | None, effective: int
) -> None:
    edit(src / "tah_config.json", max_iter=model)
    edit_decider_kwargs(src, "max_iter", **({} if decider is None else {"max_iter": decider}))
    report, converted_model = converted(src, tmp_path)
    assert report.max_depth == converted_model.config.max_depth == effective
    expected = f"max_iter is {model}, but the decider stops at its own {effective}: max_depth is {effective}"
    assert report.notes == ([expected] if effective < model else [])


@pytest.mark.parametrize("empty", [None, {}])
def test_class_and_arguments_of_the_file_fill_an_empty_config(src: Path, tmp_path: Path, empty: Any) -> None:
    edit(src / "tah_config.json", iter_decider=None, iter_decider_kwargs=empty)
    report, model = converted(src, tmp_path)
    assert model.config.decider["hidden_dims"] == [32, 48, 32] and report.threshold == pytest.approx(0.415)
    assert report.notes == [
        "tah_config.json has no iter_decider_kwargs; the arguments saved in iter_decider.bin are used"
    ]


def test_arguments_of_the_file_do_not_complete_a_config(src: Path, tmp_path: Path) -> None:
    edit_decider_kwargs(src, "hidden_dims")  # the class default is (256, 512, 256); the file says (32, 48, 32)
    message = refusal(src, tmp_path)
    assert message.startswith("iter_decider.bin does not fit its arguments: ")
    assert "backbone.blocks.0.dim_change.bias is [48], not [512]" in message


def test_class_of_the_config_beats_the_files(src: Path, tmp_path: Path) -> None:
    edit_pickle(src, lambda data: data.update({"class": "SomethingElse"}))
    assert converted(src, tmp_path)[1].config.policy == "decider"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("logits_projection.bias"), "logits_projection.bias is missing"),
        (lambda s: s.update({"extra.weight": torch.ones(2)}), "extra.weight is not a parameter of this decider"),
        (
            lambda s: s.update({"combined_projection.bias": torch.ones(3)}),
            "combined_projection.bias is [3], not [32]",
        ),
    ],
)
def test_decider_state_must_fit(src: Path, tmp_path: Path, change: Any, expected: str) -> None:
    edit_pickle(src, lambda data: change(data["state_dict"]))
    assert refusal(src, tmp_path) == f"iter_decider.bin does not fit its arguments: {expected}"


def test_state_named_like_an_argument_is_dropped(src: Path, tmp_path: Path) -> None:
    want = converted(src, tmp_path / "plain")[1].state_dict()
    edit_pickle(src, lambda data: data["state_dict"].update(topk=torch.ones(1)))
    got = converted(src, tmp_path / "edited")[1].state_dict()
    assert set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("topk", 0.5),
        ("topk", True),
        ("hidden_dims", [32, "48", 32]),
        ("hidden_dims", 32),
        ("hidden_states_layer_nums", []),
        ("dtype", "bfloat16"),
        ("normalize_input", 1),
        ("threshold", None),
    ],
)
def test_decider_arguments_of_the_wrong_kind_are_refused(src: Path, tmp_path: Path, entry: str, value: Any) -> None:
    edit_decider_kwargs(src, **{entry: value})
    expected = f"tah_config.json: iter_decider_kwargs.{entry} is {value!r}, which MLPIterDecider does not take"
    assert refusal(src, tmp_path) == expected


def test_unknown_decider_argument_is_refused(src: Path, tmp_path: Path) -> None:
    edit_decider_kwargs(src, use_depth=True)
    expected = "tah_config.json: iter_decider_kwargs.use_depth is not an argument of MLPIterDecider"
    assert refusal(src, tmp_path) == expected


def test_missing_decider_is_refused(src: Path, tmp_path: Path) -> None:
    (src / "iter_decider.bin").unlink()
    expected = "tah_config.json requires a trained MLPIterDecider, but iter_decider.bin is missing"
    assert refusal(src, tmp_path) == expected


@pytest.mark.parametrize("name", ["TrivialIterDecider", "AlwaysWrapperIterDecider", "iter_decider.base", 7])
@pytest.mark.parametrize("entry", ["iter_decider", "eval_iter_decider"])
def test_other_deciders_are_refused_by_name(src: Path, tmp_path: Path, entry: str, name: Any) -> None:
    edit(src / "tah_config.json", **{entry: name})
    expected = f"tah_config.json: {entry} is {name!r}, which a TaH model does not have; only MLPIterDecider or Iter"
    assert refusal(src, tmp_path).startswith(expected)


def test_labels_decide_in_a_first_stage_checkpoint(src: Path, tmp_path: Path) -> None:
    torch.save(
        {"class": "IterLabelDecider", "state_dict": {"threshold": torch.tensor(0.5)}, "init_args": {"max_iter": 2}},
        src / "iter_decider.bin",
    )
    edit(src / "tah_config.json", iter_decider="IterLabelDecider", iter_decider_kwargs={"max_iter": 2})
    report, model = converted(src, tmp_path)
    assert (model.config.policy, model.config.decider, model.decider) == ("oracle", None, None)
    assert report.max_depth == 2 and report.threshold == 0.5 and report.notes == []


@pytest.mark.parametrize(("has_file", "effective"), [(True, 3), (False, 4)])
def test_labels_without_a_max_iter(src: Path, tmp_path: Path, has_file: bool, effective: int) -> None:
    """With a file the original rebuilds the decider with its default of 3; without one it keeps the model's."""
    torch.save({"class": "IterLabelDecider", "state_dict": {}, "init_args": {}}, src / "iter_decider.bin")
    if not has_file:
        (src / "iter_decider.bin").unlink()
    edit(src / "tah_config.json", iter_decider="IterLabelDecider", iter_decider_kwargs={}, max_iter=4)
    assert converted(src, tmp_path)[0].max_depth == effective


def test_labels_at_evaluation_keep_the_trained_decider(src: Path, tmp_path: Path) -> None:
    edit(src / "tah_config.json", eval_iter_decider="IterLabelDecider", eval_iter_decider_kwargs={})
    _, model = converted(src, tmp_path)
    assert model.config.policy == "oracle" and model.config.decider["kind"] == "mlp"


def test_evaluation_decider_by_class_takes_its_own_arguments(src: Path, tmp_path: Path) -> None:
    edit(src / "tah_config.json", eval_iter_decider="MLPIterDecider", eval_iter_decider_kwargs={"threshold": 0.75})
    report, model = converted(src, tmp_path)
    assert model.config.policy == "decider" and report.threshold == 0.75
    assert (
        "eval_iter_decider names a class, which the original would build untrained; this one is trained" in report.notes
    )


@pytest.mark.parametrize("alias", [None, "", "iter_decider"])
def test_alias_ignores_the_evaluation_arguments(src: Path, tmp_path: Path, alias: Any) -> None:
    edit(src / "tah_config.json", eval_iter_decider=alias, eval_iter_decider_kwargs={"threshold": 0.75, "max_iter": 1})
    report, _ = converted(src, tmp_path)
    assert report.threshold == pytest.approx(0.415) and report.max_depth == 2


def test_evaluation_decider_nobody_trained_is_refused(src: Path, tmp_path: Path) -> None:
    edit(
        src / "tah_config.json",
        iter_decider="IterLabelDecider",
        iter_decider_kwargs={},
        eval_iter_decider="MLPIterDecider",
    )
    expected = "tah_config.json requires a trained MLPIterDecider, but iter_decider is IterLabelDecider"
    assert refusal(src, tmp_path) == expected


@pytest.mark.parametrize("path", ["stage2", "./stage2/../stage2/iter_decider.bin"])
def test_load_path_inside_the_checkpoint_is_followed(src: Path, tmp_path: Path, path: str) -> None:
    (src / "stage2").mkdir()
    (src / "iter_decider.bin").rename(src / "stage2" / "iter_decider.bin")
    edit_decider_kwargs(src, load_path=path)
    assert converted(src, tmp_path)[1].config.policy == "decider"


@pytest.mark.parametrize("path", ["..", "../stage2", "/etc", "a/../../b", 5])
def test_load_path_out_of_the_checkpoint_is_refused(src: Path, tmp_path: Path, path: Any) -> None:
    edit_decider_kwargs(src, load_path=path)
    expected = f"tah_config.json: iter_decider_kwargs.load_path is {path!r}, not a path inside the checkpoint"
    assert refusal(src, tmp_path) == expected


def test_load_path_to_nothing_is_refused(src: Path, tmp_path: Path) -> None:
    edit_decider_kwargs(src, load_path="stage2")
    expected = "tah_config.json: iter_decider_kwargs.load_path is 'stage2', but there is no decider"
    assert refusal(src, tmp_path) == expected


# -- the base ----------------------------------------------------------------------------------------------------------


def test_missing_base_tensor_is_refused(src: Path, tmp_path: Path) -> None:
    edit_tensors(src / "model.safetensors", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    expected = (
        f"{src}: not a complete base: missing tensors model.layers.2.mlp.up_proj.weight; copy or download it again"
    )
    assert refusal(src, tmp_path) == expected


def test_unexpected_base_tensors_are_refused(src: Path, tmp_path: Path) -> None:
    extra = {f"model.layers.{k}.extra.weight": torch.ones(1) for k in range(5)}
    edit_tensors(src / "model.safetensors", lambda tensors: tensors.update(extra))
    names = ", ".join(f"model.layers.{k}.extra.weight" for k in range(3))
    assert f"not a complete base: unexpected tensors {names} and 2 more" in refusal(src, tmp_path)


def test_base_tensor_of_another_shape_is_refused(src: Path, tmp_path: Path) -> None:
    edit_tensors(src / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    assert "wrongly shaped tensors model.norm.weight is [3], not [64]" in refusal(src, tmp_path)


def test_truncated_base_is_refused(src: Path, tmp_path: Path) -> None:
    cut_in_half(src / "model.safetensors")
    assert refusal(src, tmp_path).startswith(f"{src}/model.safetensors is damaged or incomplete: ")


def test_base_without_safetensors_is_refused_and_its_pickle_not_read(src: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save(Command(f"touch {marker}"), src / "pytorch_model.bin")
    (src / "model.safetensors").unlink()
    assert refusal(src, tmp_path).startswith(f"{src} has no model.safetensors")
    assert not marker.exists()


@pytest.mark.parametrize("entry", ["auto_map", "quantization_config"])
def test_base_that_needs_more_than_transformers_is_refused(src: Path, tmp_path: Path, entry: str) -> None:
    edit(src / "config.json", **{entry: {"AutoModelForCausalLM": "modeling_evil.Model"}})
    assert refusal(src, tmp_path).startswith(f"config.json has {entry}; only plain weights")


def test_adapter_config_at_the_root_is_refused(src: Path, tmp_path: Path) -> None:
    shutil.copy(src / "lora" / "adapter_config.json", src)
    assert refusal(src, tmp_path).endswith("has an adapter_config.json of its own; the adapter belongs in lora/")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "never_heard_of"}'])
def test_malformed_base_config_is_refused(src: Path, tmp_path: Path, text: str) -> None:
    (src / "config.json").write_text(text)
    assert refusal(src, tmp_path).startswith(f"{src}/config.json")


def test_missing_base_config_is_refused(src: Path, tmp_path: Path) -> None:
    (src / "config.json").unlink()
    assert refusal(src, tmp_path) == f"{src} is not a model: it has no config.json"


@pytest.mark.parametrize("key", ["lm_head", "model.norm", "transformer.wte", ""])
def test_embedding_key_must_name_the_input_embedding(src: Path, tmp_path: Path, key: str) -> None:
    edit(src / "tah_config.json", embedding_key=key)
    expected = f"tah_config.json: embedding_key is {key!r}, not the input embedding of the base"
    assert refusal(src, tmp_path) == expected


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("kernel", ["evil/kernel", {"": "evil/kernel@main"}])
def test_kernel_named_by_the_base_config_is_refused(src: Path, tmp_path: Path, entry: str, kernel: Any) -> None:
    edit(src / "config.json", **{entry: kernel})
    assert f"config.json names the kernel {kernel!r}, which is code to download" in refusal(src, tmp_path)


# -- all or nothing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["file", "directory"])
def test_existing_destination_is_kept(src: Path, tmp_path: Path, make: str) -> None:
    if make == "directory":
        (tmp_path / "out").mkdir()
    kept = tmp_path / "out" / "mine" if make == "directory" else tmp_path / "out"
    kept.write_text("precious")
    expected = f"{tmp_path / 'out'} exists and is not an empty directory; choose another destination"
    assert refusal(src, tmp_path) == expected
    assert kept.read_text() == "precious"


def test_source_is_not_its_own_destination(src: Path) -> None:
    before = {path: path.read_bytes() for path in src.rglob("*.*")}
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        convert(src, src)
    assert {path: path.read_bytes() for path in src.rglob("*.*")} == before


def test_missing_source_is_refused(tmp_path: Path) -> None:
    expected = "nics-efc/TaH-plus-1.7B is not a directory; convert reads a checkpoint that has been downloaded"
    assert refusal(Path("nics-efc/TaH-plus-1.7B"), tmp_path) == expected


def test_empty_or_deep_destination_is_fine(src: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("link", "not/yet/there"):
        convert(str(src), str(tmp_path / name))
        assert (tmp_path / name / "config.json").is_file()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("stage", ["weights", "tokenizer"])
def test_full_disk_leaves_nothing(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise full

    def half_saved(self: TaHForCausalLM, directory: Path, **kwargs: Any) -> None:
        (Path(directory) / "config.json").write_text("{}")
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise full

    (src / "tokenizer.json").write_text("{}")
    if stage == "weights":
        monkeypatch.setattr(TaHForCausalLM, "save_pretrained", half_saved)
    else:
        monkeypatch.setattr(shutil, "copyfile", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError) as error:
        convert(src, tmp_path / "out")
    assert error.value is full
    assert sorted(tmp_path.iterdir()) == before


def test_interrupted_conversion_leaves_nothing(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TaHForCausalLM, "save_pretrained", interrupt)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"hidden_dims": [10**9, 10**9]},
        {"hidden_dims": [8] * 10**5},
        {"hidden_dims": [0]},
        {"hidden_dims": [-8]},
        {"expansion_factor": 10**9},
        {"expansion_factor": 0},
        {"topk": 10**9},
        {"topk": 0},
        {"hidden_states_layer_nums": [0] * 10**5},
        {"dropout_rate": float("nan")},
        {"dropout_rate": 2.0},
    ],
)
def test_decider_of_another_size_is_refused_before_it_is_made(src: Path, tmp_path: Path, arguments: Any) -> None:
    edit_decider_kwargs(src, **arguments)
    refusal(src, tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**7},
        {"hidden_size": 2**30},
        {"vocab_size": 10**9},
        {"intermediate_size": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": None},
        {"hidden_size": "64"},
        {"model_type": ["qwen3"]},
        {"transformers_weights": "iter_decider.bin"},
        {"transformers_weights": "../model.safetensors"},
    ],
)
def test_base_of_another_size_is_refused_before_it_is_made(src: Path, tmp_path: Path, entries: Any) -> None:
    edit(src / "config.json", **entries)
    refusal(src, tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/model.safetensors", "iter_decider.bin", "x/y.safetensors", 3]
)
def test_index_that_leads_elsewhere_is_refused(src: Path, tmp_path: Path, name: Any) -> None:
    (src / "model.safetensors").rename(src / "part.safetensors")
    (src / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    assert "not a .safetensors file of its own directory; it is not followed" in refusal(src, tmp_path)
