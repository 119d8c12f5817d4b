"""Training a stage: what is trained and what is left alone, the files, stopping and resuming."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

pytest.importorskip("datasets")
pytest.importorskip("pydantic")

from datasets import Dataset

from tah import TaHForCausalLM
from tah.load import load_tah
from tah.names import METHODS
from tah.progress import SILENT
from tah.training.recipe_file import load_recipe
from tah.training.run_files import TrainingProgress, read_metrics
from tah.training.train import prepare_model, train
from tah.training.trainer import CHECKPOINTS, Objective, last_checkpoint

HERE = Path(__file__).parent
SECTION = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 3e-3,
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
}
TAH2 = {"max_depth": 3, "lora_rank": 0, "next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}}


def labelled(directory: Path, rows: int = 12, ranks: bool = True, seed: int = 0) -> None:
    """Rows of random letters; every third supervised token is hard."""
    generator = np.random.default_rng(seed)
    records = []
    for row in range(rows):
        length = int(generator.integers(8, 20))
        supervised = [False] * 4 + [True] * (length - 4)
        record = {"input_ids": generator.integers(40, 80, length).tolist(), "supervised": supervised, "row": row}
        if ranks:
            hard = generator.random(length) < 1 / 3
            record |= {
                "ref_rank": hard.astype(int).tolist(),
                "ref_prob": np.where(hard, 0.1, 0.9).tolist(),
                "ref_entropy": [0.5] * length,
            }
        records.append(record)
    (directory / "data").mkdir(parents=True)
    Dataset.from_list(records).to_parquet(str(directory / "data" / "00000.parquet"))
    (directory / "settings.json").write_text(json.dumps({"made by": "test_train", "seed": seed}))
    (directory / "complete.json").write_text("{}")


@pytest.fixture
def run(tmp_path):
    """A run directory with labels."""
    labelled(tmp_path / "run" / "labels" / "train")
    labelled(tmp_path / "run" / "labels" / "validation", rows=6, seed=1)
    return tmp_path / "run"


@pytest.fixture
def recipe_of(tmp_path, tiny_base):
    """Writes and loads a recipe for `tiny_base`."""

    def make(method="paper", overrides=(), **sections):
        values = {
            "name": "test",
            "base": {"model": str(tiny_base), "dtype": "float32"},
            "model": {"max_depth": 2, "lora_rank": 4, "mix_topk": 16, "decider": {"kind": "lean", "width": 8}},
            "data": {"source": "unused.jsonl", "max_length": 40},
            "label": {"reference": str(tiny_base)} if method == "paper" else None,
            "backbone": {"method": method, "training": SECTION},
            "decider": {"training": SECTION} if method in ("paper", "lookahead", "blind") else None,
        }
        if method == "tah2":
            values["model"] = TAH2
        for name, section in sections.items():
            values[name] = {**(values[name] or {}), **section} if isinstance(section, dict) else section
        path = tmp_path / f"{method}.yaml"
        path.write_text(json.dumps(values))
        return load_recipe(str(path), overrides)

    return make


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return TaHForCausalLM.from_pretrained(directory).state_dict()


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("stage", ["backbone", "decider"])
def test_training_looks_at_the_tokenizer_like_every_command(stage, run, recipe_of, tiny_base, tiny_checkpoint):
    """Its code is not run, nor asked about, and its chat template is tried."""
    source = run / "backbone" if stage == "decider" else run / "base"
    shutil.copytree(tiny_checkpoint if stage == "decider" else tiny_base, source)
    recipe = recipe_of(base={"model": str(source), "dtype": "float32"})
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "evil.py").write_text("raise SystemExit('ran')")
    try:  # transformers may do without the class, but never with its code
        prepare_model(recipe, stage, run)
    except ValueError as error:
        assert "has no usable tokenizer" in str(error)
    (source / "tokenizer_config.json").write_text((tiny_base / "tokenizer_config.json").read_text())
    prepare_model(recipe, stage, run)
    (source / "chat_template.jinja").write_text("{% for a in range(10 ** 9) %}{% endfor %}")
    with pytest.raises(ValueError, match="the chat template takes more than a template may"):
        prepare_model(recipe, stage, run)


@pytest.mark.parametrize("method", [*METHODS])
def test_every_method_trains_and_loads(method, run, recipe_of):
    """Both stages where there are two; the checkpoint answers and has the method's policy."""
    extra = {"backbone": {"method": method, "share": 0.3, "training": SECTION}} if method == "random" else {}
    recipe = recipe_of(method, **extra)
    directory = train(recipe, "backbone", run)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and all(np.isfinite(losses))
    shares = [line["iterated_share"] for line in lines if "iterated_share" in line]
    expected = {"standard": 0, "always": 1, "lookahead": 1, "blind": 1}
    if method in expected:
        assert set(shares) == {expected[method]}
    elif method != "confidence":
        assert 0 < np.mean(shares) < 0.7
    facts = json.loads((directory / "run.json").read_text())
    assert facts["recipe"]["backbone"]["method"] == method and facts["versions"]["torch"] == torch.__version__
    assert (directory / "curves.png").stat().st_size > 1000 and list((directory / "tensorboard").rglob("events*"))
    policies = {"always": "always", "random": "random", "standard": "never", "paper": "never", "tah2": "decider"}
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.policy == policies.get(method, "confidence")
    assert model.config.attention == ("blind" if method == "blind" else "duo")
    if recipe.decider is not None:
        directory = train(recipe, "decider", run)
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert model.config.policy == "decider"
        found = json.loads((directory / "quality.json").read_text())
        assert found["iterated_share"] == pytest.approx(0.07, abs=0.03) and found["threshold"] == model.config.threshold
    tokenizer = AutoTokenizer.from_pretrained(directory)
    out = model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 3


def test_lookahead_on_uncertain_tokens(run, recipe_of):
    """Of the supervised ones; the decider's stage reads all of them."""
    section = {"method": "lookahead", "uncertain": True, "tau": 2.0, "training": SECTION}
    recipe = recipe_of("lookahead", backbone=section)
    lines = (train(recipe, "backbone", run) / "metrics.jsonl").read_text().splitlines()
    shares = [line["iterated_share"] for line in map(json.loads, lines) if "iterated_share" in line]
    assert 0 < np.mean(shares) < 1
    model = AutoModelForCausalLM.from_pretrained(run / "backbone")
    assert model.config.policy == "confidence" and model.config.threshold == pytest.approx(1 - math.exp(-2.0))
    lines = (train(recipe, "decider", run) / "metrics.jsonl").read_text().splitlines()
    shares = [line["iterated_share"] for line in map(json.loads, lines) if "iterated_share" in line]
    assert set(shares) == {1}


def test_stages_train_their_own_parts(run, recipe_of, tiny_base):
    """LoRA only leaves the base bit for bit; the decider's stage leaves everything else."""
    recipe = recipe_of(overrides=["backbone.train=lora"])
    first = weights(train(recipe, "backbone", run))
    base = AutoModelForCausalLM.from_pretrained(tiny_base).state_dict()
    assert all(torch.equal(first[f"base.{name}"], value) for name, value in base.items())
    assert any(value.any() for name, value in first.items() if "lora_B" in name)
    second = weights(train(recipe, "decider", run))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all(name.startswith("decider.") for name in changed)


def test_both_stages_train_beside_a_quantised_base(run, recipe_of, tiny_base, tmp_path):
    quantization = pytest.importorskip("torchao", reason="torchao is not installed").quantization
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=config, dtype=torch.float32)
    base.save_pretrained(tmp_path / "int8")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "int8")
    quantised = {"model": str(tmp_path / "int8"), "dtype": "float32"}
    with pytest.raises(ValueError, match="is quantised, so its weights cannot be trained; set backbone.train: lora"):
        train(recipe_of(base=quantised), "backbone", run)
    recipe, ids = recipe_of(base=quantised, backbone={"train": "lora"}), torch.randint(40, 80, (2, 9))
    losses = []
    for stage in ("backbone", "decider"):
        made = train(recipe, stage, run)
        losses.append([line["loss"] for line in read_metrics(made / "metrics.jsonl") if "loss" in line])
        assert (made / "model.safetensors").stat().st_size < 200_000  # without the base
    assert all(each and all(map(math.isfinite, each)) for each in losses)
    first, last = (load_tah(str(run / stage), base=str(tmp_path / "int8")) for stage in ("backbone", "decider"))
    assert torch.equal(last(ids, policy="never").logits, base(ids).logits)
    assert torch.equal(first(ids, policy="always").logits, last(ids, policy="always").logits)
    start, _ = prepare_model(recipe, "backbone", run)
    assert not torch.equal(start(ids, policy="always").logits, last(ids, policy="always").logits)
    assert not torch.equal(first.decider.output.weight, last.decider.output.weight)


def test_joint_decider_and_schedule(run, recipe_of):
    recipe = recipe_of(
        "lookahead",
        model={"max_depth": 3, "lora_rank": 4, "mix_topk": 16, "decider": {"kind": "lean", "width": 8}},
        backbone={"method": "lookahead", "depth_schedule": [[0, 2], [0.5, 3]], "training": SECTION},
        decider={"joint": True, "training": SECTION},
    )
    directory = train(recipe, "backbone", run)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert ["loss_depth_3" in line for line in lines if "loss" in line] == [False, False, True, True]
    assert weights(directory)["decider.output.weight"].any()  # it starts at zero


def test_half_precision_weights_are_trained_in_float32(run, recipe_of):
    """bfloat16 rounds an update of 1e-4 of a weight away; the checkpoint keeps the base's precision."""
    recipe = recipe_of(
        base={"dtype": "bfloat16"}, backbone={"training": SECTION | {"learning_rate": 1e-4, "bf16": True}}
    )
    start, model = prepare_weights(recipe, run), train(recipe, "backbone", run)
    after = weights(model)
    assert after["base.model.embed_tokens.weight"].dtype == torch.bfloat16
    moved = [n for n, p in start.items() if "proj.weight" in n and not torch.equal(p, after[n])]
    assert len(moved) > 10
    kinds = set()
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        kinds.update(p.dtype for group in self.param_groups for p in group["params"])
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        train(recipe, "decider", run)
    assert kinds == {torch.float32}


def prepare_weights(recipe, run):
    return {name: p.clone() for name, p in prepare_model(recipe, "backbone", run)[0].state_dict().items()}


def test_dropout_of_the_decider_only(run, recipe_of, monkeypatch):
    """Stage 2: the authors' decider trains with its dropout, the frozen rest without."""
    mlp = {"kind": "mlp", "hidden_dims": [8], "topk": 16, "dropout": 0.5}
    model = {"max_depth": 2, "lora_rank": 4, "mix_topk": 16, "lora_dropout": 0.5, "decider": mlp}
    recipe = recipe_of(model=model)
    train(recipe, "backbone", run)
    seen = set()
    forward = TaHForCausalLM.forward

    def spy(self, *args, **kwargs):
        seen.add((self.training, self.decider.training, torch.is_grad_enabled()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TaHForCausalLM, "forward", spy)
    train(recipe, "decider", run)
    assert seen == {(False, True, True), (False, False, False)}  # training, then the choice of the threshold


def test_evaluation_has_metrics_of_its_own(run, recipe_of):
    training = SECTION | {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 4}
    directory = train(recipe_of("lookahead", backbone={"method": "lookahead", "training": training}), "backbone", run)
    lines = read_metrics(directory / "metrics.jsonl")
    evaluated = [line for line in lines if "eval_loss" in line]
    assert len(evaluated) == 2 and all("eval_loss_depth_2" in line and "loss_depth_2" not in line for line in evaluated)
    trained = [line for line in lines if "loss" in line]
    assert len(trained) == 1 and "loss_depth_2" in trained[0] and "eval_loss_depth_2" not in trained[0]


def test_killed_after_the_last_step(run, recipe_of):
    """Nothing is trained beyond the end (Trainer would take one more step), and a metrics line cut short is no harm."""
    recipe = recipe_of()
    directory = train(recipe, "backbone", run)
    before = digest(directory)
    (directory / "config.json").unlink()  # as if killed before the end
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    train(recipe, "backbone", run, resume=True)
    assert digest(directory) == before
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]


def test_learns(run, recipe_of):
    """The loss of every depth falls on data that can be learnt by heart."""
    training = SECTION | {"max_steps": 60, "save_strategy": "no", "learning_rate": 5e-3}
    recipe = recipe_of("lookahead", backbone={"method": "lookahead", "training": training})
    directory = train(recipe, "backbone", run)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss_depth_1", "loss_depth_2"):
        values = [line[name] for line in lines if name in line]
        assert np.mean(values[-6:]) < 0.7 * np.mean(values[:6])


@pytest.mark.parametrize("method", ["paper", "lookahead", "tah2"])
def test_packed_and_accumulated_equal_plain(method, run, recipe_of):
    """One update from a batch = the same update from accumulated parts; packed rows give the same weights.

    Parts have labels of their own in TaH2, so there accumulation gives other weights.
    """
    step = SECTION | {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "save_strategy": "no"}
    whole = step | {"per_device_train_batch_size": 12}
    parts = step | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    packed = {"packed": True, "training": step | {"per_device_train_batch_size": 99}}
    sections = {"whole": {"training": whole}, "parts": {"training": parts}, "packed": packed}
    got = {}
    for name, section in sections.items():
        recipe = recipe_of(method, backbone={"method": method} | section)
        got[name] = weights(train(recipe, "backbone", run, name=name))
    start = AutoModelForCausalLM.from_pretrained(recipe.base.model).state_dict()
    assert any(not torch.equal(got["whole"][f"base.{name}"], value) for name, value in start.items())
    if method == "tah2":
        score = "decider.score.weight"
        assert not torch.allclose(got["parts"][score], got["whole"][score], atol=1e-6)
    for name, value in got["whole"].items():
        for other in ("packed",) if method == "tah2" else ("parts", "packed"):
            torch.testing.assert_close(got[other][name], value, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["paper", "tah2"])
def test_checkpointing_of_activations_changes_nothing(method, run, recipe_of):
    plain = recipe_of(method, backbone={"method": method, "training": SECTION | {"save_strategy": "no"}})
    saving = SECTION | {"save_strategy": "no", "gradient_checkpointing": True}
    replayed = recipe_of(method, backbone={"method": method, "training": saving})
    assert digest(train(plain, "backbone", run, name="a")) == digest(train(replayed, "backbone", run, name="b"))


def test_progress_keeps_the_newest_of_each_value():
    progress = TrainingProgress(lambda steps, done: SILENT.work("x", steps, "steps", done))
    progress.on_train_begin(None, SimpleNamespace(max_steps=9, global_step=0), None)
    for logs in ({"loss": 2.0, "iterated_share": 0.1}, {"eval_loss": 3.0}, {"loss": 1.5}, {"train_runtime": 1.0}, None):
        progress.on_log(None, None, None, logs=logs)
    assert str(progress.work).endswith("9 steps, loss 1.5, validation loss 3, iterated 0.1")
    progress = TrainingProgress(lambda steps, done: SILENT.work("x", steps, "steps", done), iterates=False)
    progress.on_train_begin(None, SimpleNamespace(max_steps=9, global_step=0), None)
    progress.on_log(None, None, None, logs={"loss": 2.0, "iterated_share": 0.0})
    assert str(progress.work).endswith("9 steps, loss 2")


# -- stopping and resuming ---------------------------------------------------------------------------------------


def start(recipe_path: Path, run: Path, *flags: str) -> subprocess.Popen:
    """Training in a process of its own, slowed down so that it can be stopped in between."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tah.training.recipe_file import load_recipe\n"
        "from tah.training import train as t, trainer\n"
        "original = trainer.TaHTrainer.compute_loss\n"
        "def slow(self, *a, **k):\n"
        "    time.sleep(0.3)\n"
        "    return original(self, *a, **k)\n"
        "trainer.TaHTrainer.compute_loss = slow\n"
        "try:\n"
        "    t.train(load_recipe(sys.argv[1]), 'backbone', Path(sys.argv[2]), resume='--resume' in sys.argv)\n"
        "except t.Stopped as error:\n"
        "    sys.exit(f'stopped: {error}')\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(recipe_path), str(run), *flags]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(run: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 100
    while last_checkpoint(run / "backbone" / CHECKPOINTS) is None:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("method", [pytest.param("paper", marks=pytest.mark.slow), "tah2"])
def test_killed_and_resumed_equals_uninterrupted(method, run, recipe_of, tmp_path):
    """SIGKILL somewhere, then SIGTERM somewhere, then to the end: the weights of a run that was left alone.

    Dropout, shuffling and an optimizer with state are on, so that every part of the state matters.
    """
    training = SECTION | {"max_steps": 24, "save_steps": 2, "save_total_limit": 2}
    model = {
        "max_depth": 2,
        "lora_rank": 4,
        "mix_topk": 16,
        "lora_dropout": 0.3,
        "decider": {"kind": "lean", "width": 8},
    }
    recipe = recipe_of(model=model, backbone={"training": training})
    if method == "tah2":
        recipe = recipe_of(method, model={"lora_rank": 4, "lora_dropout": 0.3}, backbone={"training": training})
    recipe_path = tmp_path / "resolved.yaml"
    recipe.save(recipe_path)
    train(recipe, "backbone", run, name="whole")

    process = start(recipe_path, run)
    wait_for_checkpoint(run, process)
    time.sleep(float(np.random.default_rng().random()))
    process.kill()
    process.wait()
    at = last_checkpoint(run / "backbone" / CHECKPOINTS)
    assert at is not None and not (run / "backbone" / "config.json").exists()

    process = start(recipe_path, run, "--resume")
    while last_checkpoint(run / "backbone" / CHECKPOINTS) == at and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    stopped = last_checkpoint(run / "backbone" / CHECKPOINTS)
    assert process.returncode and "stopped at step" in said, said
    assert int(at.name.split("-")[1]) < int(stopped.name.split("-")[1]) < 24
    train(recipe, "backbone", run, resume=True)
    assert digest(run / "backbone") == digest(run / "whole")
    steps = [json.loads(x)["step"] for x in (run / "backbone" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 25))
    assert len(list((run / "backbone" / CHECKPOINTS).glob("checkpoint-*"))) == 2


def test_other_seed_gives_other_weights(run, recipe_of):
    """Control of the above: the hash tells runs apart."""
    one = digest(train(recipe_of(), "backbone", run, name="one"))
    assert one == digest(train(recipe_of(), "backbone", run, name="again"))
    assert one != digest(train(recipe_of(overrides=["seed=43"]), "backbone", run, name="other"))


FAILURES = {  # in the middle of writing the second checkpoint
    "full disk": (
        "        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    ),
    "killed": "        original(self, *a, **k), os.kill(os.getpid(), signal.SIGKILL)\n",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_save_leaves_the_last_checkpoint(failure, run, recipe_of):
    """A half-written checkpoint is never loaded; the run resumes from the one before, as if nothing had been."""
    recipe = recipe_of(backbone={"training": SECTION | {"max_steps": 6}})
    path = run / "recipe.yaml"
    recipe.save(path)
    code = (
        "import os, sys, resource, signal\n"
        "from pathlib import Path\n"
        "from tah.training.recipe_file import load_recipe\n"
        "from tah.training import train as t, trainer\n"
        "original = trainer.TaHTrainer.save_model\n"
        "def limited(self, *a, **k):\n"
        "    if self.state.global_step == 4:\n"
        f"{FAILURES[failure]}"
        "    return original(self, *a, **k)\n"
        "trainer.TaHTrainer.save_model = limited\n"
        "t.train(load_recipe(sys.argv[1]), 'backbone', Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(run)], capture_output=True, text=True)
    if failure == "killed":
        assert done.returncode == -signal.SIGKILL
        assert list((run / "backbone" / CHECKPOINTS / ".saving").glob("checkpoint-4/model.safetensors"))  # it had begun
    else:
        said = done.stderr
        assert done.returncode != 0 and ("File too large" in said or "os error 27" in said), said[-800:]
    kept = last_checkpoint(run / "backbone" / CHECKPOINTS)
    assert kept.name == "checkpoint-2"
    directory = train(recipe, "backbone", run, resume=True)
    assert digest(directory) == digest(train(recipe, "backbone", run, name="whole"))


# -- bad input ---------------------------------------------------------------------------------------------------


def test_refusals(run, recipe_of, tmp_path):
    recipe = recipe_of()
    with pytest.raises(ValueError, match="train --stage backbone before --stage decider"):
        train(recipe, "decider", run)
    with pytest.raises(ValueError, match="no labelled data; run `tah label`"):
        train(recipe, "backbone", tmp_path / "elsewhere")
    train(recipe, "backbone", run)
    with pytest.raises(ValueError, match="contains a finished run"):
        train(recipe, "backbone", run)
    other = recipe_of(overrides=["backbone.training.learning_rate=0.1"])
    with pytest.raises(ValueError, match=r"learning_rate=0.003 \(now 0.1\)"):
        train(other, "backbone", run, resume=True)
    with open(run / "labels" / "train" / "settings.json", "a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="data.train/settings.json"):
        train(recipe, "backbone", run, resume=True)


def test_continuing_from_another_kind_of_model(run, recipe_of):
    first = train(recipe_of("lookahead"), "backbone", run)
    again = {"method": "blind", "init": str(first), "training": SECTION}
    with pytest.raises(ValueError, match="has attention='duo' but the recipe has 'blind'"):
        train(recipe_of("blind", backbone=again), "backbone", run, name="blind")
    more = recipe_of("lookahead", backbone=again | {"method": "lookahead"})
    assert digest(train(more, "backbone", run, name="more")) != digest(first)


def test_labels_are_needed_for_the_paper(tmp_path, recipe_of):
    run = tmp_path / "run"
    labelled(run / "labels" / "train", ranks=False)
    with pytest.raises(ValueError, match="no labels of a reference model"):
        train(recipe_of(), "backbone", run)


def test_nan_loss_names_step_and_rows(run, recipe_of):
    recipe = recipe_of(overrides=["backbone.training.learning_rate=1e30", "backbone.training.max_grad_norm=0"])
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+ \(rows \[\d+, \d+\]\)"):
        train(recipe, "backbone", run)
    assert not (run / "backbone" / "config.json").exists()


def test_sampled_share_of_lookahead():
    """A share of the supervised tokens, another one at every step."""
    ids = torch.randint(40, 80, (4, 200))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    objective = Objective("backbone", "lookahead", 2, share=0.25, seed=3)
    chosen = [objective.arguments(batch, step, 2)["depth_labels"] > 1 for step in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert 0.2 < chosen[0].float().mean() < 0.3


def test_the_card_of_a_trained_model(run, recipe_of, tmp_path):
    """The card has the facts of the training wherever the model is saved, and the quality of the trained weights only.

    Saving elsewhere is what an upload does.
    """
    recipe = recipe_of("paper")
    train(recipe, "backbone", run)
    directory = train(recipe, "decider", run)
    quality = json.loads((directory / "quality.json").read_text())
    model = TaHForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "elsewhere")
    measured = f"| iterated share | {100 * quality['iterated_share']:.1f} % of {quality['tokens']} held-out"
    for place in (directory, tmp_path / "elsewhere"):
        card = (place / "README.md").read_text()
        assert f"| method | paper (trained weights: {recipe.backbone.train}), last stage decider |" in card
        assert measured in card
        assert "changed after that" not in card
    with torch.no_grad():
        next(model.decider.parameters()).add_(1)
    model.save_pretrained(directory)
    card = (directory / "README.md").read_text()
    assert "| method | paper" in card and "iterated share" not in card and "weights were changed after that" in card
