"""Checkpoints of the original TaH2: converted, or refused with one line and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.families import config_of
from helpers.golden_tah2 import side_modules
from helpers.originals import (
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

UPDATER = "input_updater.bin"
BFLOAT16 = {"__dtype__": True, "__str__": "torch.bfloat16"}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A writable copy of checkpoint T, in the authors' layout."""
    return copied("T", tmp_path)


def edit_updater_kwargs(source: Path, **changes: Any) -> None:
    edit(source / "tah_config.json", input_updater_kwargs={"hidden_size": 64, "intermediate_size": 96, **changes})


# -- what is converted -------------------------------------------------------------------------------------------------


def test_converted_model_holds_the_tensors_of_the_original(src: Path, tmp_path: Path) -> None:
    report, model = converted(src, tmp_path)
    state = model.state_dict()
    for name, tensor in load_file(src / "model.safetensors").items():
        assert torch.equal(state[f"base.{name}"], tensor), name
    networks = side_modules()
    assert {name for name in state if not name.startswith("base.")} == networks.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in networks.items())
    config = model.config
    assert (config.max_depth, config.policy, config.decision, config.lora_rank) == (4, "decider", "threshold", 0)
    assert (config.attention, config.output, config.next_input) == ("duo", "mixture", "mlp")
    assert (config.next_input_width, config.next_input_norms) == (96, [True, True])
    assert config.decider == {"kind": "tah2", "width": 80}
    assert report.threshold == config.threshold == pytest.approx(0.47)
    assert report.notes == [] and report.unknown_keys == [] and report.dtype == "float32"
    assert report.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("norms", "missing"),
    [([False, True], ["norm_pre_mlp"]), ([True, False], ["norm_out"]), ([False, False], ["norm_pre_mlp", "norm_out"])],
)
def test_optional_norms(src: Path, tmp_path: Path, norms: list[bool], missing: list[str]) -> None:
    edit_updater_kwargs(src, enable_norm_pre_mlp=norms[0], enable_norm_out=norms[1])
    message = refusal(src, tmp_path)
    assert message.startswith("input_updater.bin does not fit its arguments: ") and "is not a parameter" in message
    edit_pickle(src, lambda data: [data["state_dict"].pop(f"{name}.weight") for name in missing], UPDATER)
    _, model = converted(src, tmp_path)
    assert model.config.next_input_norms == norms
    assert torch.equal(model.next_input_mlp.proj.weight, side_modules()["next_input_mlp.proj.weight"])


def test_fixed_depth_model(src: Path, tmp_path: Path) -> None:
    """Its decider has no weights, and its file is never opened."""
    edit(
        src / "tah_config.json",
        iter_decider="AlwaysIterDecider",
        iter_decider_kwargs={},
        iter_attention_mode="causal",
        weighted_hidden_method="even_mix",
        max_iter=2,
    )
    torch.save(Command(f"touch {tmp_path / 'ran'}"), src / "iter_decider.bin")
    report, model = converted(src, tmp_path)
    assert (model.config.policy, model.config.max_depth, model.decider) == ("always", 2, None)
    assert (model.config.attention, model.config.output, model.config.next_input) == ("own", "even", "mlp")
    assert report.notes == [] and not (tmp_path / "ran").exists()
    out = model(torch.arange(3, 9)[None])
    assert out.depth_count.tolist() == [[2] * 6]
    assert torch.equal(out.mixture_weights, torch.full((1, 6, 2), 0.5))


def test_one_pass_needs_no_updater(src: Path, tmp_path: Path) -> None:
    changes = {"iter_decider": "TrivialIterDecider", "iter_decider_kwargs": {}, "input_updater_kwargs": {}}
    edit(src / "tah_config.json", input_updater="IdentityUpdater", **changes)
    expected = "tah_config.json: input_updater is 'IdentityUpdater', which needs max_iter 1"
    assert refusal(src, tmp_path) == expected
    edit(src / "tah_config.json", max_iter=1)
    report, model = converted(src, tmp_path)
    assert (model.config.policy, model.config.max_depth, report.notes) == ("never", 1, [])
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.base(ids).logits.float().log_softmax(-1))


def test_classes_of_the_files_stand_for_null(src: Path, tmp_path: Path) -> None:
    nothing = {"iter_decider": None, "iter_decider_kwargs": {}, "input_updater": None, "input_updater_kwargs": None}
    edit(src / "tah_config.json", **nothing)
    report, model = converted(src, tmp_path)
    assert (model.config.decider, model.config.next_input_width) == ({"kind": "tah2", "width": 80}, 96)
    assert report.notes == [
        "tah_config.json has no iter_decider_kwargs; the arguments saved in iter_decider.bin are used"
    ]


def test_an_evaluation_decider_by_class(src: Path, tmp_path: Path) -> None:
    edit(src / "tah_config.json", eval_iter_decider="AlwaysIterDecider")
    _, model = converted(src, tmp_path / "always")
    assert model.config.policy == "always" and model.decider is not None
    edit(src / "tah_config.json", eval_iter_decider="Qwen3MLPIterDecider", eval_iter_decider_kwargs={"threshold": 0.6})
    report, model = converted(src, tmp_path / "fresh")
    assert model.config.policy == "decider" and report.threshold == pytest.approx(0.6)
    assert report.notes[0].startswith("eval_iter_decider names a class, which the original would build untrained")


def test_files_of_both_implementations_are_ignored(src: Path, tmp_path: Path) -> None:
    """Training settings, kernels and resume files change nothing."""
    edit(src / "tah_config.json", train_loss=None, iter_attention_impl="triton", attn_implementation="x/y", zeta=1)
    edit_decider_kwargs(src, base_warmup_steps=100, uniform_init=True)
    (src / "simple_trainer_state.pt").write_bytes(b"never read")
    report, model = converted(src, tmp_path)
    assert report.unknown_keys == ["zeta"] and report.notes == []
    assert torch.equal(model.decider.score.weight, side_modules()["decider.score.weight"])


# -- the traps of the original -----------------------------------------------------------------------------------------


def test_mode_is_causal_when_absent(src: Path, tmp_path: Path) -> None:
    edit(src / "tah_config.json", "iter_attention_mode")
    report, model = converted(src, tmp_path)
    assert model.config.attention == "own"
    assert report.notes == ["tah_config.json has no iter_attention_mode: it is causal, the original's default"]


def test_threshold_is_the_configs_else_the_weights(src: Path, tmp_path: Path) -> None:
    """The authors' server reads the argument in the file, their model the configuration."""
    edit_pickle(src, lambda data: data["state_dict"].update(threshold=torch.tensor(0.3)))
    edit_pickle(src, lambda data: data["init_args"].update(threshold=0.8))
    report, _ = converted(src, tmp_path / "config")
    assert report.threshold == pytest.approx(0.47)
    assert report.notes == [
        "the threshold among the weights, 0.3, is not used: 0.47 is",
        "the threshold among the arguments in the file, 0.8, is not used: 0.47 is",
    ]
    edit_decider_kwargs(src, "threshold")
    report, _ = converted(src, tmp_path / "weights")
    assert report.threshold == pytest.approx(0.3)
    edit_pickle(src, lambda data: data["state_dict"].pop("threshold"))
    assert converted(src, tmp_path / "default")[0].threshold == 0.5


def test_threshold_can_be_given(src: Path, tmp_path: Path) -> None:
    assert converted(src, tmp_path, threshold=0.75)[1].config.threshold == 0.75


@pytest.mark.parametrize("value", [1.5, float("nan"), True])
def test_threshold_out_of_range_is_refused(src: Path, tmp_path: Path, value: Any) -> None:
    assert refusal(src, tmp_path, threshold=value) == f"threshold={value!r} must be a number in [0, 1]"


def test_half_precision_base_rounds_the_rest(src: Path, tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    edit_tensors(src / "model.safetensors", halve)
    edit(src / "config.json", dtype="bfloat16")
    report, model = converted(src, tmp_path)
    assert report.dtype == "bfloat16" and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert report.threshold == model.config.threshold == 0.470703125
    assert report.notes == [
        "threshold 0.47 is 0.4707031 in the decider's precision, as in the original",
        "the updater is rounded to the base's torch.bfloat16; the original computes it in float32",
        "the decider is rounded to torch.float32 and to the base's torch.bfloat16, as in the original",
    ]


def test_decider_dtype_rounds_even_a_float32_base(src: Path, tmp_path: Path) -> None:
    edit_decider_kwargs(src, dtype=BFLOAT16)
    report, model = converted(src, tmp_path)
    saved = side_modules()
    assert torch.equal(model.decider.score.weight, saved["decider.score.weight"].bfloat16().float())
    assert torch.equal(model.next_input_mlp.proj.weight, saved["next_input_mlp.proj.weight"])
    assert report.notes == [
        "the decider is rounded to torch.bfloat16 and to the base's torch.float32, as in the original"
    ]


@pytest.mark.parametrize(("model", "decider", "depth"), [(4, None, 4), (4, 3, 3), (2, 4, 2), (1, 1, 1)])
def test_maximum_depth_is_the_smaller_one(
    src: Path, tmp_path: Path, model: int, decider: int | None, depth: int
) -> None:
    edit(src / "tah_config.json", max_iter=model)
    edit_decider_kwargs(src, **({} if decider is None else {"max_iter": decider}))
    report, native = converted(src, tmp_path)
    assert native.config.max_depth == depth
    if decider == 3:
        assert report.notes == ["max_iter is 4, but the decider stops at its own 3: max_depth is 3"]
    elif decider == 4:
        assert report.notes[0].startswith("the decider's max_iter is 4, but the model's is 2: the original loses")
    else:
        assert report.notes == []


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("iter_attention_mode", "same_iter", "'duo' or 'causal'"),
        ("iter_attention_mode", None, "'duo' or 'causal'"),
        ("weighted_hidden_method", "last", "'stop_prob_mix' or 'even_mix'"),
        ("input_updater", "GRUUpdater", "'Qwen3MLPUpdater' or 'IdentityUpdater' or None"),
        (
            "iter_decider",
            "MLPIterDecider",
            "'Qwen3MLPIterDecider' or 'AlwaysIterDecider' or 'TrivialIterDecider' or None",
        ),
    ],
)
def test_settings_without_a_counterpart(src: Path, tmp_path: Path, key: str, value: Any, allowed: str) -> None:
    edit(src / "tah_config.json", **{key: value})
    expected = f"tah_config.json: {key} is {value!r}, which a TaH2 model cannot represent; only {allowed}"
    assert refusal(src, tmp_path) == expected


@pytest.mark.parametrize(
    ("argument", "value", "only"),
    [("stochastic_sampling", True, "False"), ("hidden_act", "gelu", "'silu'"), ("rms_norm_eps", 1e-5, "1e-06")],
)
def test_arguments_without_a_counterpart(src: Path, tmp_path: Path, argument: str, value: Any, only: str) -> None:
    edit_decider_kwargs(src, **{argument: value})
    found = f"iter_decider_kwargs.{argument} is {value!r}, which a TaH model cannot represent; only {only}"
    fix = "; set it to false, then set decision to 'sample' in the converted config.json"
    assert refusal(src, tmp_path) == f"tah_config.json: {found}{fix if value is True else ''}"


def test_sampling_in_the_files_arguments_is_refused(src: Path, tmp_path: Path) -> None:
    """Where the configuration has no arguments, those of the file count."""
    edit_pickle(src, lambda data: data["init_args"].update(stochastic_sampling=True))
    converted(src, tmp_path / "not_read")
    edit(src / "tah_config.json", iter_decider_kwargs={})
    assert "stochastic_sampling is True, which a TaH model cannot represent" in refusal(src, tmp_path)


@pytest.mark.parametrize("value", [63, "64", 64.0, True])
def test_wrong_sizes_are_refused(src: Path, tmp_path: Path, value: Any) -> None:
    edit_decider_kwargs(src, topk=value)
    assert f"iter_decider_kwargs.topk is {value!r}" in refusal(src, tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "entry"),
    [("iter_decider", "use_depth"), ("input_updater", "residual")],
)
def test_unknown_arguments_are_refused(src: Path, tmp_path: Path, kwargs: str, entry: str) -> None:
    if kwargs == "iter_decider":
        edit_decider_kwargs(src, **{entry: True})
    else:
        edit_updater_kwargs(src, **{entry: True})
    assert f"tah_config.json: {kwargs}_kwargs.{entry} is not an argument of Qwen3MLP" in refusal(src, tmp_path)


@pytest.mark.parametrize("name", ["iter_decider", "iter_decider.base", ["iter_decider"], "MLPIterDecider"])
def test_other_evaluation_deciders_are_refused(src: Path, tmp_path: Path, name: Any) -> None:
    edit(src / "tah_config.json", eval_iter_decider=name)
    if name == "iter_decider":
        assert converted(src, tmp_path)[1].config.policy == "decider"
    else:
        assert f"tah_config.json: eval_iter_decider is {name!r}, which a TaH" in refusal(src, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"iter_decider_kwargs": {"dtype": {"__type__": True, "__module__": "os", "__name__": "system"}}},
        {"unknown": [{"__type__": True, "__module__": "os", "__name__": "system"}]},
    ],
)
def test_config_that_asks_for_an_object_is_refused(src: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    edit(src / "tah_config.json", **change)
    assert refusal(src, tmp_path).startswith("tah_config.json requires os.system at ")


@pytest.mark.parametrize("name", ["iter_decider.bin", UPDATER])
@pytest.mark.parametrize("place", ["top", "state_dict", "init_args"])
def test_code_in_a_pickle_never_runs(src: Path, tmp_path: Path, name: str, place: str) -> None:
    marker = tmp_path / "ran"
    data = torch.load(src / name, weights_only=True)
    evil = Command(f"touch {marker}")
    torch.save(evil if place == "top" else data | {place: {"x": evil}}, src / name)
    torch.load(src / name, weights_only=False)
    assert marker.exists(), "the payload itself does not work"
    marker.unlink()
    assert refusal(src, tmp_path) == f"{name} requires posix.system, which is not data; refused"
    assert not marker.exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["iter_decider.bin", UPDATER])
def test_numbers_that_are_not_finite_are_refused(src: Path, tmp_path: Path, name: str, number: float) -> None:
    edit_pickle(src, lambda data: data["state_dict"]["mlp.up_proj.weight"][0].fill_(number), name)
    assert refusal(src, tmp_path).startswith(f"{name} has numbers that are not finite in mlp.up_proj.weight")


@pytest.mark.parametrize("value", [2.5, float("nan")])
def test_a_threshold_of_the_files_out_of_range_is_named(src: Path, tmp_path: Path, value: Any) -> None:
    wrong = f"{value!r}, not a number in [0, 1]"
    edit_decider_kwargs(src, threshold=value)
    assert refusal(src, tmp_path) == f"tah_config.json: iter_decider_kwargs.threshold is {wrong}"
    edit_decider_kwargs(src, threshold=0.5)
    kwargs = {"eval_iter_decider": "Qwen3MLPIterDecider", "eval_iter_decider_kwargs": {"threshold": value}}
    edit(src / "tah_config.json", **kwargs)
    assert refusal(src, tmp_path) == f"tah_config.json: eval_iter_decider_kwargs.threshold is {wrong}"


@pytest.mark.parametrize("name", ["iter_decider.bin", UPDATER])
def test_damaged_or_missing_files_are_refused(src: Path, tmp_path: Path, name: str) -> None:
    cut_in_half(src / name)
    assert refusal(src, tmp_path) == f"{name} is damaged or truncated: torch.load cannot read it"
    (src / name).unlink()
    assert refusal(src, tmp_path).endswith(f"but {name} is missing")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (UPDATER, lambda s: s.pop("projection.weight"), "its arguments: projection.weight is missing"),
        (UPDATER, lambda s: s.update({"bias": torch.ones(2)}), "its arguments: bias.weight is not a parameter of it"),
        (
            "iter_decider.bin",
            lambda s: s.update({"norm_l.weight": torch.ones(63)}),
            "the base: norm_l.weight is [63], not [64]",
        ),
        (
            "iter_decider.bin",
            lambda s: s.update({"mlp.gate_proj.weight": torch.tensor(1.0)}),
            "its arguments: mlp.gate_proj.weight is a number",
        ),
        (
            "iter_decider.bin",
            lambda s: s.update({"mlp.gate_proj.weight": torch.ones(81, 64)}),
            "the base: mlp.down_proj.weight is [64, 80], not [64, 81] and mlp.up_proj",
        ),
    ],
)
def test_tensors_must_fit(src: Path, tmp_path: Path, name: str, change: Any, expected: str) -> None:
    edit_pickle(src, lambda data: change(data["state_dict"]), name)
    assert refusal(src, tmp_path).startswith(f"{name} does not fit {expected}".split(" and mlp")[0])


def test_a_base_of_another_width_is_refused(src: Path, tmp_path: Path) -> None:
    small = config_of("qwen3", vocab_size=384)
    AutoModelForCausalLM.from_config(small).save_pretrained(src)
    assert refusal(src, tmp_path).startswith(
        "input_updater.bin does not fit the base: mlp.down_proj.weight is [64, 96]"
    )


@pytest.mark.parametrize("sign", ["file", "iter_decider", "input_updater", "weighted_hidden_method"])
def test_each_sign_of_tah2_suffices(tmp_path: Path, sign: str) -> None:
    """A TaH checkpoint with one sign of TaH2 is not converted as TaH."""
    source = copied("S", tmp_path)
    if sign == "file":
        torch.save({}, source / UPDATER)
    else:
        named = {"iter_decider": "Qwen3MLPIterDecider", "input_updater": "Qwen3MLPUpdater"}
        edit(source / "tah_config.json", **{sign: named.get(sign, "even_mix")})
    message = refusal(source, tmp_path)
    assert "TaH2 model" in message or "Qwen3MLP" in message or UPDATER in message, message
