"""Recipes: every packaged one is sound, and what is wrong in one is named with its place and the nearest valid word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

from tah import TaHConfig
from tah.names import RECIPE_FILES, RECIPES
from tah.training.recipe import Recipe
from tah.training.recipe_file import load_recipe

ACCELERATE = sorted((RECIPES / "accelerate").glob("*.yaml"))
TRAINING = "backbone.training"
PAPER = {"learning_rate": 4e-5, "weight_decay": 0.01, "max_grad_norm": 0.2, "num_train_epochs": 5}
TEXT = """
base: {model: smollm2}
data: {source: rows.jsonl}
label: {reference: smollm2}
backbone: {training: {learning_rate: 4e-5, eval_strategy: no}}
decider: {}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


# -- packaged recipes ------------------------------------------------------------------------------------------------


def test_the_recipes_are_there():
    named = {"qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "llama-3.2-1b", "smollm2-135m", "smollm2-135m-lookahead"}
    assert named | {"tiny", "tiny-paper", "tiny-lookahead", "tiny-tah2"} <= set(RECIPE_FILES)


@pytest.mark.parametrize("name", RECIPE_FILES)
def test_every_recipe_parses_and_makes_a_config(name):
    recipe = load_recipe(name)
    base = AutoConfig.for_model("qwen3", num_hidden_layers=27)  # the fewest layers of the bases named, one pruned
    config = TaHConfig(base_config=base, policy="never", **recipe.model)
    assert config.max_depth == 2 and recipe.name == name and recipe.directory() == Path("runs") / name
    assert (config.decider is not None) == (recipe.decider is not None or recipe.backbone.method == "tah2")
    header = [line for line in RECIPE_FILES[name].read_text().splitlines() if line.startswith("#")]
    assert all(any(word in line for line in header) for word in ("Hardware:", "Time:", "Result:"))


def test_no_recipe_types_a_width_of_its_base():
    for path in RECIPE_FILES.values():
        recipe = yaml.safe_load(path.read_text())
        assert recipe["base"].get("scratch") or "hidden_size" not in path.read_text()


@pytest.mark.parametrize(("name", "rank", "weight"), [("qwen3-0.6b", 16, 4.8), ("qwen3-1.7b", 32, 5.4)])
def test_the_papers_settings(name, rank, weight):
    recipe = load_recipe(name)
    training = recipe.backbone.training
    assert PAPER.items() <= training.items() and training["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * 8 == 128
    assert [recipe.model[f"lora_{name}"] for name in ("rank", "alpha", "dropout")] == [rank, 2 * rank, 0.1]
    assert recipe.decider.pos_weight == weight and recipe.decider.training["learning_rate"] == 3e-5
    assert recipe.base.prune_layers == 1 and recipe.uses_labels and recipe.makes_base
    plus = load_recipe(name, ["base.prune_layers=0", f"name={name}-plus"])
    assert not plus.makes_base and plus.directory() == Path(f"runs/{name}-plus")


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_launch_knows_every_key(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    given = load_config_from_file(str(path))  # refuses unknown keys at the top
    known = vars(launch_command_parser().parse_args(["-m", "tah"]))
    for section in (given.fsdp_config, given.deepspeed_config):
        assert set(section) <= set(known)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "--num_processes", "2", "-m", "tah"])
    arguments, _, _ = _validate_launch_command(arguments)
    kind = path.stem.rstrip("23")
    assert arguments.num_processes == 2 and arguments.mixed_precision == "no"
    chosen = (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed)
    assert chosen == (kind == "ddp", kind == "fsdp", kind == "zero")
    if kind == "zero":  # sharding while loading would leave no weights to run a base's 8 tokens with
        assert arguments.zero_stage == int(path.stem[-1]) and str(arguments.zero3_init_flag) in ("None", "False")


def test_fsdp2_reaches_the_plugin(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = str(RECIPES / "accelerate" / "fsdp2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, "-m", "tah"])
    arguments, _, _ = _validate_launch_command(arguments)
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("FSDP") and name not in os.environ:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading and not plugin.activation_checkpointing


# -- reading and writing ---------------------------------------------------------------------------------------------


def test_defaults_overrides_and_save(file, tmp_path):
    recipe = load_recipe(file, ["seed=7", "label.rule=prob<0.3", "backbone.training.bf16=true", "output=a b"])
    assert recipe.name == "mine" and recipe.seed == 7 and recipe.label.rule == "prob<0.3"
    assert recipe.backbone.training == {"learning_rate": 4e-5, "eval_strategy": "no", "bf16": True}
    assert recipe.directory() == Path("a b") and recipe.max_depth == 2 and recipe.base_path(tmp_path) == "smollm2"
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "saved.yaml"]


def test_a_section_may_be_added_or_dropped_by_override(file):
    bare = load_recipe(file, ["label=null", "backbone.method=lookahead", "decider=null"])
    assert bare.label is None and bare.decider is None and not bare.uses_labels and bare.by_gain
    file.write_text(TEXT.replace("label: {reference: smollm2}\n", ""))
    assert load_recipe(file, ["label.reference=here"]).label.reference == "here"


def test_blind_sets_the_attention_and_standard_runs_one_pass(file):
    assert load_recipe(file, ["backbone.method=blind"]).model == {"attention": "blind"}
    assert load_recipe(file).model == {}
    standard = load_recipe(file, ["backbone.method=standard", "decider=null", "model.max_depth=4"])
    assert standard.max_depth == 1


def test_paths_of_base_and_tokenizer(file, tmp_path):
    pruned = load_recipe(file, ["base.prune_layers=1", "base.tokenizer=other"])
    assert pruned.base_path(tmp_path) == str(tmp_path / "base") and pruned.tokenizer_path(tmp_path) == "other"
    assert load_recipe(file).tokenizer_path(tmp_path) == "smollm2"


def test_sections_are_not_shared_between_recipes():
    sections = {"base": {"model": "b"}, "data": {"source": "d"}, "label": {"reference": "r"}}
    first, second = Recipe(name="x", **sections), Recipe(name="x", **sections)
    first.backbone.training["learning_rate"] = 1.0
    assert second.backbone.training == {}


# -- what the user can put right -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("bakbone.x=1", ["mine.yaml: bakbone is unknown", "did you mean backbone?"]),
        ("backbone.trainng={}", ["backbone.trainng is unknown", "did you mean training?"]),
        ("label.referense=x", ["label.referense is unknown", "did you mean reference?"]),
        ("backbone.training.lerning_rate=1", ["backbone.training.lerning_rate", "did you mean learning_rate?"]),
        ("backbone.training.learning_rate=fast", ["backbone.training.learning_rate='fast'", "valid number"]),
        ("backbone.training.max_steps=-1", ["backbone.training.max_steps=-1: must be greater than 0"]),
        ("backbone.training.num_train_epochs=0", ["num_train_epochs=0: must be greater than 0"]),
        ("decider.training.learning_rate=-1e-4", ["decider.training.learning_rate=-0.0001: must be greater than 0"]),
        ("backbone.training.learning_rate=.nan", ["learning_rate=nan"]),
        ("backbone.training.per_device_train_batch_size=0", ["per_device_train_batch_size=0: must be greater than 0"]),
        ("controls.equal_compute=true", ["controls are trained from base.scratch"]),
        ("controls.blnd=true", ["controls.blnd is unknown", "did you mean blind?"]),
        ("backbone.training.bf16=1", ["backbone.training.bf16=1", "valid boolean"]),
        ("backbone.training.eval_strategy=step", ["eval_strategy='step'", "did you mean steps?"]),
        ("decider.training.output_dir=x", ["decider.training.output_dir", "use output"]),
        ("model.lora_rnk=3", ["model.lora_rnk is unknown", "did you mean lora_rank?"]),
        ("model.max_depth=two", ["model.max_depth='two'", "must be an integer"]),
        ("model.max_depth=0", ["max_depth=0"]),
        ("model.policy=always", ["model.policy", "chosen by training"]),
        ("model.decider.width=3", ["model.decider.kind is required"]),
        ("model.decider={kind: lean, wdth: 3}", ["wdth", "width"]),
        ("model.decider=null", ["model.decider is null"]),
        ("backbone.method=lookahed", ["backbone.method='lookahed'", "did you mean lookahead?"]),
        ("backbone.method=always", ["backbone.method=always", "decider=null"]),
        ("label=null", ["label is required", "lookahead"]),
        ("label.rule=prob<2", ["prob<2", "prob<P"]),
        ("label.reference=trained", ["label.reference=trained", "base.scratch"]),
        ("backbone.share=0.5", ["backbone.share=0.5", "lookahead"]),
        ("backbone.uncertain=true", ["backbone.uncertain=true is for lookahead, blind, not paper"]),
        ("backbone.share=0", ["backbone.share=0", "greater than 0"]),
        ("backbone.method=random decider=null", ["backbone.share", "always"]),
        ("backbone.train=lora model.lora_rank=0", ["lora_rank=0", "nothing to train"]),
        ("backbone.train=lora backbone.method=standard decider=null", ["adapter is off at depth 1"]),
        ("backbone.loss_weights=[1.0]", ["loss_weights=[1.0] must be 2 numbers"]),
        ("backbone.depth_schedule=[[0,2],[0.5,1]]", ["depth_schedule=[[0.0, 2], [0.5, 1]]", "rise"]),
        ("backbone.depth_schedule=[[0,1],[0.5,3]]", ["depth 2 (model.max_depth) at most"]),
        ("backbone.depth_schedule=[[0.5,2]]", ["from share 0"]),
        ("model.max_depth=1", ["model.max_depth=1", "nothing to iterate"]),
        ("decider.joint=true", ["decider.joint", "lookahead or blind"]),
        ("decider.target_share=null", ["decider.target_share", "decider.target=loss"]),
        ("backbone.method=blind model.attention=own", ["model.attention='own'", "blind"]),
        ("base.model=null", ["base.model is required"]),
        ("base.prune_layers=1 backbone.init=x", ["backbone.init", "base.prune_layers"]),
        ("data.source=tiny", ["data.generate"]),
        ("data.validation_split=train", ["data.validation_split=train"]),
        ("data.max_length=yes", ["data.max_length='yes'", "valid integer"]),
        ("data={}", ["data.source is required"]),
        ("data=3", ["data=3", "mapping of keys to values"]),
        ("name=a/b", ["name='a/b'"]),
        ("seed", ["'seed' is not KEY=VALUE"]),
        ("base.model.x=1", ["base.model is 'smollm2'"]),
        (f"{TRAINING}.report_to=[1]", [f"mine.yaml: {TRAINING}.report_to=[1]: must be a valid string"]),
        (f"{TRAINING}.debug=[unknown,3]", [f"{TRAINING}.debug=['unknown', 3]: must be a valid string"]),
        (f"{TRAINING}.deepspeed=[1]", [f"{TRAINING}.deepspeed=[1]: must be a mapping of keys to values"]),
        (f"{TRAINING}.optim_target_modules={{a: 1}}", [f"{TRAINING}.optim_target_modules={{'a': 1}}: must be a"]),
        ("data.columns={a: 1}", ["data.columns.a=1: must be a valid string"]),
        ("backbone.loss_weights=[-1,a]", ["backbone.loss_weights.0=-1: must be greater", "(and 1 more)"]),
        ("label.rule=top2", ["mine.yaml: label.rule='top2' is not one of top1, prob<P"]),
        ("seed=[1", ["'seed=[1'", "YAML"]),
    ],
)
def test_one_line_names_place_and_fix(file, overrides, words):
    split = overrides.split(" ") if "{" not in overrides else [overrides]
    with pytest.raises(ValueError) as error:
        load_recipe(file, split)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: {model: a", ["bad.yaml:1", "not valid YAML"]),
        ("seed: 1\nseed: 2", ["bad.yaml:2", "'seed' is given twice"]),
        ("[a]: 1", ["bad.yaml:1", "a key must be a word"]),
        ("- 1", ["not one"]),
        ("", ["not one"]),
        ("a: !!python/object:os.system {}", ["not valid YAML"]),
        ("{}", ["base is required", "and 1 more"]),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(tmp_path / "bad.yaml")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("value", ["[1]", "{1: [2]}", "3"])
@pytest.mark.parametrize(
    "name",
    "report_to lr_scheduler_kwargs fsdp_config accelerator_config gradient_checkpointing_kwargs optim_target_modules "
    "debug deepspeed".split(),
)
def test_one_mistake_in_a_value_of_many_kinds_is_one(file, name, value):
    """pydantic reports each kind that it tried, and puts the kind's name into the place."""
    try:
        load_recipe(file, [f"{TRAINING}.{name}={value}"])
    except ValueError as error:
        assert str(error).startswith(f"mine.yaml: {TRAINING}.{name}={value}: must be a "), error
        assert "more" not in str(error)
    else:
        assert value.startswith("{")


def test_unknown_recipes(tmp_path):
    with pytest.raises(ValueError, match="did you mean qwen3-0.6b?"):
        load_recipe("qwen3-0.6")
    with pytest.raises(ValueError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "tiny.yaml").write_text(TEXT)
    for path in ("accelerate/ddp", str(tmp_path / "tiny")):  # the name of a recipe has no slash, a file its ending
        with pytest.raises(ValueError, match="no such file"):
            load_recipe(path)


def test_what_is_missing_to_read_recipes_is_named():
    """And only what reads recipes needs it: `tah bench` and labelling do not."""
    code = """
import sys
sys.modules["pydantic"] = None
import tah.training.label, tah.benchmarks.bench_train
for name in ("training.recipe", "training.recipe_file", "pipeline.pruned", "pipeline.steps"):
    try:
        __import__(f"tah.{name}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["recipes need pydantic and pyyaml: pip install 'tah[train]'"] * 4, done.stderr
