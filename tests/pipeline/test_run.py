"""The chain of steps: what is skipped, what is made again and why, who may work in a directory, and the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import save_file

pytest.importorskip("datasets")

import tah.checkpoints.contents
import tah.pipeline.run
from helpers.notes import Notes
from tah.checkpoints.contents import contents, sizes_of, wrong
from tah.pipeline.run import Run, Step, flat
from tah.progress import Reporter
from tah.training.recipe import Recipe
from tah_cli.app import run

ROOT = Path(__file__).parents[2]


SHARED = ("label", "train")


class Chain:
    """data -> base; data -> label; base, label -> train. Each step writes a file that says how often it ran."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.ran, self.notes = directory, [], []
        self.reads = {name: {f"{name}.x": 1} for name in ("data", "base", "label", "train")}
        self.broken: dict[str, BaseException] = {}
        self.mistakes: dict[str, str] = {}  # what a step's check finds
        self.seed = 42
        self.barrier: threading.Barrier | None = None  # steps made together wait for each other, as training does

    def make(self, *names: str) -> Run:
        recipe = Recipe(name="x", seed=self.seed, base={"model": "b"}, data={"source": "d"}, label={"reference": "r"})
        needs = {"data": (), "base": ("data",), "label": ("data",), "train": ("base", "label")}
        steps = [
            Step(
                *(name, name, self.work(name), self.reads[name], needs[name], name in SHARED, name == "train"),
                check=self.check(name),
            )
            for name in needs
        ]
        chain = Run(recipe, self.directory, steps, Notes(self.notes))
        chain.make(names or list(needs))
        return chain

    def work(self, name: str):
        def make(recipe: Recipe, run: Path, progress: Reporter) -> None:
            self.ran.append(name)
            if self.barrier is not None and name in SHARED:
                self.barrier.wait(10)
            if name in self.broken and not (run / name).exists() and not isinstance(self.broken[name], OSError):
                raise self.broken[name]
            (run / name).mkdir(exist_ok=True)
            with open(run / name / "file", "a") as file:
                file.write("x")
            if self.barrier is not None and name in SHARED:  # what the first process records is all there
                self.barrier.wait(10)
            if name in self.broken:
                raise self.broken[name]

        return make

    def check(self, name: str):
        def check(recipe: Recipe, run: Path) -> None:
            if name in self.mistakes:
                raise ValueError(self.mistakes[name])

        return check

    def again(self, *names: str) -> list[str]:
        """The steps that a further call makes."""
        self.ran.clear()
        self.notes.clear()
        self.make(*names)
        return self.ran


@pytest.fixture
def chain(tmp_path) -> Chain:
    return Chain(tmp_path / "run")


# -- skipping and making again ---------------------------------------------------------------------------------------


def test_finished_steps_are_skipped(chain):
    assert chain.again() == ["data", "base", "label", "train"]
    assert chain.again() == [] and chain.notes == [f"{name}: done before" for name in chain.reads]
    assert (chain.directory / "train" / "file").read_text() == "x"
    saved = yaml.safe_load((chain.directory / "recipe.yaml").read_text())
    assert saved["seed"] == 42 and saved["base"]["model"] == "b"
    record = json.loads((chain.directory / "steps" / "train.json").read_text())
    assert (
        record["finished"] and set(record["needs"]) == {"base", "label"} and record["tah"] == tah.pipeline.run.RESULTS
    )


def test_only_what_is_asked_for_and_what_it_needs(chain):
    assert chain.again("label") == ["data", "label"]
    assert chain.again("train") == ["base", "train"]


def test_a_change_reaches_what_depends_on_it_and_nothing_else(chain):
    chain.make()
    chain.reads["label"] = {"label.x": 2, "label.rule": "top1"}
    assert chain.again() == ["label", "train"]
    label, train = chain.notes[2:]
    assert label.startswith('label: again, label.x was 1, is 2; label.rule was null, is "top1"; what was there is now')
    assert train.startswith("train: again, label has changed; what was there is now in")
    kept = sorted(path.name.partition("-")[0] for path in (chain.directory / "old").iterdir())
    assert kept == ["label", "train"]  # nothing that took long to make is deleted
    assert all((path / "file").read_text() == "x" for path in (chain.directory / "old").iterdir())
    assert (chain.directory / "label" / "file").read_text() == "x" and chain.again() == []


def test_seed_and_version_change_everything(chain, monkeypatch):
    chain.make()
    chain.seed = 43
    assert chain.again() == ["data", "base", "label", "train"]
    assert chain.notes[0].startswith("data: again, seed was 42, is 43")
    monkeypatch.setattr(tah.pipeline.run, "RESULTS", "99")
    assert chain.again() == ["data", "base", "label", "train"] and 'is "99"' in chain.notes[0]


def test_a_deleted_result_is_made_again(chain):
    chain.make()
    shutil.rmtree(chain.directory / "label")
    assert chain.again() == ["label"]


@pytest.mark.parametrize(("name", "left", "note"), [("base", "x", "starts over"), ("train", "xx", "continues")])
def test_a_killed_step_goes_on_or_starts_over(chain, name, left, note):
    chain.broken[name] = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        chain.make()
    del chain.broken[name]
    assert name in chain.again() and (chain.directory / name / "file").read_text() == left
    assert any(line.startswith(f"{name}: {note}") for line in chain.notes)


def test_a_killed_step_of_another_recipe_does_not_go_on(chain):
    chain.broken["train"] = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"):
        chain.make()
    chain.broken.clear()
    chain.reads["train"] = {"train.x": 2}
    assert chain.again() == ["train"] and (chain.directory / "train" / "file").read_text() == "x"


def test_input_refused_at_the_start_leaves_no_directory(chain, tmp_path):
    chain.directory = tmp_path / "a" / "b"
    chain.broken["data"] = ValueError("no such data")
    with pytest.raises(ValueError, match="no such data"):
        chain.make()
    assert list(tmp_path.iterdir()) == []
    del chain.broken["data"]
    chain.make("data")
    chain.broken["base"] = ValueError("no such base")
    with pytest.raises(ValueError, match="no such base"):
        chain.make()
    assert sorted(path.name for path in chain.directory.iterdir()) == [".lock", "data", "recipe.yaml", "steps"]
    assert [path.name for path in (chain.directory / "steps").iterdir()] == ["data.json"]


def test_what_the_chain_did_not_make_is_not_touched(chain):
    (chain.directory / "base").mkdir(parents=True)
    (chain.directory / "base" / "thesis.txt").write_text("kept")
    with pytest.raises(ValueError, match="was not made by this chain"):
        chain.make()
    assert (chain.directory / "base" / "thesis.txt").read_text() == "kept"
    (chain.directory.parent / "file").write_text("")
    chain.directory = chain.directory.parent / "file"
    with pytest.raises(ValueError, match="is a file"):
        chain.make()


def test_a_damaged_record_is_named(chain):
    chain.make()
    (chain.directory / "steps" / "base.json").write_text("{")
    with pytest.raises(ValueError, match=r"base\.json is damaged"):
        chain.make()


def test_a_directory_in_use(chain):
    chain.make("data")
    said = rf"{chain.directory} is in use by another process, which has locked {chain.directory / '.lock'}"
    with FileLock(chain.directory / ".lock"), pytest.raises(ValueError, match=said):
        chain.make()
    assert chain.again("base") == ["base"]


def test_a_lock_ends_with_its_process(chain):
    chain.make("data")
    code = "import sys, time, filelock as f\nwith f.FileLock(sys.argv[1]): print(flush=True), time.sleep(60)"
    command = [sys.executable, "-c", code, str(chain.directory / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="in use"):
            chain.make()
        holder.kill()
        holder.wait()
    assert (chain.directory / ".lock").exists() and chain.again("base") == ["base"]


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "/dev/null/x"])
def test_a_directory_that_cannot_be_made(chain, place):
    chain.directory = Path(place)
    with pytest.raises(ValueError, match=rf"^{place} cannot be written to \(.*\); choose another --output$"):
        chain.make()


def test_mistakes_of_later_steps_are_found_before_the_first(chain):
    chain.mistakes["train"] = "there are no such layers"
    with pytest.raises(ValueError, match="no such layers"):
        chain.make()
    assert chain.ran == chain.notes == [] and not chain.directory.exists()
    assert chain.again("label") == ["data", "label"]  # which does not need that step
    chain.mistakes.clear()
    chain.make()
    chain.mistakes["label"] = "no such data"  # is not asked about what is there already
    assert chain.again() == []
    chain.reads["base"] = {"base.x": 2}
    chain.reads["label"] = {"label.x": 2}
    with pytest.raises(ValueError, match="no such data"):
        chain.make()
    assert not (chain.directory / "old").exists()


def test_a_result_that_was_damaged_afterwards_is_made_again(chain):
    chain.make()
    files = chain.directory / "base"
    (files / "file").write_text("")
    assert chain.again() == ["base"] and (files / "file").read_text() == "x"
    said = f"base: again, {files / 'file'} has 0 bytes, not 1; what was there is now in {chain.directory / 'old'}"
    assert chain.notes[1].startswith(said)
    (files / "file").unlink()
    assert chain.again() == ["base"] and f"{files / 'file'} is missing" in chain.notes[1]
    (files / "checkpoints").mkdir()  # what nobody builds on may come and go
    (files / "checkpoints" / "state").write_text("")
    (files / "prune.md").write_text("")
    assert chain.again() == []


def test_what_is_wrong_with_a_file(tmp_path):
    weights, facts = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_file({"w": torch.zeros(8)}, weights)
    facts.write_text('{"threshold": 0.5}')
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_text("x")
    sizes = sizes_of(tmp_path)
    assert set(sizes) == {"model.safetensors", "config.json"}
    assert wrong(weights, sizes[weights.name]) is None
    content = weights.read_bytes()
    weights.write_bytes(bytes(len(content)))  # what a power cut may leave
    assert wrong(weights, sizes[weights.name]) == "is damaged"
    weights.write_bytes(content[:-4])
    assert wrong(weights, sizes[weights.name]) == "is damaged"
    facts.write_text('{"threshold": 0.123}')  # as `tah tune` does
    assert wrong(facts, sizes[facts.name]) is None
    facts.write_text('{"thresh')
    assert wrong(facts, sizes[facts.name]) == "is damaged"


# -- several processes -----------------------------------------------------------------------------------------------


def together(chain: Chain, monkeypatch, ranks: int = 2) -> list[Chain]:
    """The chain in several threads, as torchrun's processes; the others start first."""
    chains, threads, barrier = [], [], threading.Barrier(ranks)
    for rank in reversed(range(ranks)):
        own = Chain(chain.directory)
        own.reads, own.barrier = chain.reads, barrier
        monkeypatch.setenv("RANK", str(rank))
        built = threading.Event()
        real = Run.make

        def make(self: Run, names, built=built, real=real) -> None:
            built.set()
            real(self, names)

        monkeypatch.setattr(Run, "make", make)
        threads.append(threading.Thread(target=own.make, daemon=True))
        threads[-1].start()
        assert built.wait(10)
        monkeypatch.setattr(Run, "make", real)
        chains.append(own)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return chains[::-1]


def test_one_process_works_the_others_wait_or_take_part(chain, monkeypatch):
    monkeypatch.setattr(tah.pipeline.run, "POLL", 0.01)
    first, second = together(chain, monkeypatch)
    assert first.ran == ["data", "base", "label", "train"] and second.ran == ["label", "train"]
    assert len(first.notes) == 4 and second.notes == []
    first, second = together(chain, monkeypatch)
    assert first.ran == second.ran == []
    chain.reads["label"] = {"label.x": 5}
    first, second = together(chain, monkeypatch)
    assert first.ran == second.ran == ["label", "train"]
    (chain.directory / "label" / "file").unlink()
    first, second = together(chain, monkeypatch)
    assert first.ran == second.ran == ["label"]


# -- fingerprints ----------------------------------------------------------------------------------------------------


def test_contents_of_files(tmp_path, monkeypatch):
    assert contents(None) is None and contents("owner/name") == "owner/name"
    file = tmp_path / "rows.jsonl"
    file.write_text("a")
    before = contents(str(file))
    os.utime(file, (1, 1))
    assert contents(str(file)) == before and contents(str(tmp_path)) != before
    file.write_text("b")
    assert contents(str(file)) != before
    whole = contents(str(tmp_path))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("hidden")
    assert contents(str(tmp_path)) == whole
    monkeypatch.setattr(tah.checkpoints.contents, "LARGE", 0)  # large files: size and time
    before = contents(str(file))
    os.utime(file, (2, 2))
    assert contents(str(file)) != before


def test_contents_of_named_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    of = {names: contents(str(tmp_path), names) for names in ((), ("a",), ("b",), ("a", "b"))}
    assert len(set(of.values())) == 4 and of["a", "b"] == contents(str(tmp_path), ["b", "a", "b", "missing"])
    (tmp_path / "train.log").write_text("step 1")
    assert contents(str(tmp_path), ["a", "b"]) == of["a", "b"] != contents(str(tmp_path))
    (tmp_path / "a").write_text("c")
    assert contents(str(tmp_path), ["b"]) == of["b",] and contents(str(tmp_path), ["a", "b"]) != of["a", "b"]


def test_flat():
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}, "x") == {"x.a.b": 1, "x.a.c": {}, "x.d": [1]}
    assert flat(None, "x") == {"x": None}


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tiny_base, tmp_path, monkeypatch) -> Path:
    """A working directory with a recipe and its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
    rows = [(f"{n % 7}+{n % 5}", str(n % 7 + n % 5)) for n in range(24)]
    lines = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in rows]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "report_to": "none", "use_cpu": True}
    recipe = {
        "base": {"model": str(tiny_base), "prune_layers": 1, "prune_texts": 2},
        "data": {"source": "rows.jsonl", "max_length": 60, "validation_share": 0.1},
        "label": {"reference": str(tiny_base)},
        "model": {"lora_rank": 4},
        "backbone": {"training": training},
        "decider": {"target_share": 0.2, "training": training},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def works(capfd, *arguments) -> tuple[str, list[str]]:
    """The last line of stdout, and our notes on stderr."""
    capfd.readouterr()
    code = run([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    assert code == 0, err
    return out.splitlines()[-1], [line for line in err.splitlines() if line.startswith("tah: ")]


def fails(capfd, *arguments) -> str:
    """The one line, but for progress, of a command that fails and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    capfd.readouterr()
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    progress = (": done before", "tokens/s")
    lines = [line for line in err.splitlines() if not line.endswith(progress)]
    assert len(lines) == 1 and lines[0].startswith("tah: ") and out == "", err
    assert sorted(Path.cwd().rglob("*")) == before
    return lines[0]


def test_the_whole_chain_with_real_steps(capfd, work):
    result, notes = works(capfd, "run", "mine.yaml", "--output", "out")
    assert result == "out/decider" and notes == [f"tah: {n}: begins" for n in ("base", "label", "backbone", "decider")]
    for name in ("base", "backbone", "decider"):
        assert (work / "out" / name / "config.json").is_file() and (work / "out" / name / "tokenizer.json").is_file()
    assert (work / "out/base/prune.md").is_file() and (work / "out/labels/train/README.md").is_file()
    _, notes = works(capfd, "run", "mine.yaml", "--output", "out")
    assert all("done before" in note for note in notes) and len(notes) == 4
    _, notes = works(capfd, "run", "mine.yaml", "--output", "out", "decider.target_share=0.3")
    assert [note.split(": ")[2].split(",")[0] for note in notes] == ["done before"] * 3 + ["again"]
    assert "decider.target_share was 0.2, is 0.3" in notes[-1]
    result, notes = works(capfd, "train", "mine.yaml", "--output", "out", "--stage", "backbone")
    assert result == "out/backbone" and all("done before" in note for note in notes)
    line = fails(capfd, "train", "mine.yaml", "--output", "out", "--resume", "backbone.training.learning_rate=0.5")
    assert "backbone.training.learning_rate was null, is 0.5" in line and "--resume" in line
    (work / "rows.jsonl").write_text("".join((work / "rows.jsonl").read_text().splitlines(keepends=True)[:20]))
    assert "data.source was" in fails(capfd, "train", "mine.yaml", "--output", "out", "--resume")
    record = work / "out" / "steps" / "label.json"
    assert json.loads(record.read_text())["finished"]
    with FileLock(work / "out" / ".lock"):
        assert "in use" in fails(capfd, "label", "mine.yaml", "--output", "out")


def test_lookahead_trains_without_a_label_pass(capfd, work):
    options = ("backbone.method=lookahead", "label=null", "base.prune_layers=0", "decider=null")
    result, notes = works(capfd, "train", "mine.yaml", *options)
    assert result == "runs/mine/backbone" and notes == ["tah: label: begins", "tah: backbone: begins"]


def test_a_model_that_iterates_can_be_the_reference(capfd, work, tiny_checkpoint):
    result, notes = works(capfd, "label", "mine.yaml", f"label.reference={tiny_checkpoint}", "base.prune_layers=0")
    assert result == "runs/mine/labels" and notes == ["tah: label: begins"]


def test_what_is_missing_is_named(capfd, work):
    assert "tah label" in fails(capfd, "train", "mine.yaml", "--output", "out")
    assert "--stage backbone first" in fails(capfd, "train", "mine.yaml", "--output", "out", "--stage", "decider")
    assert "no decider section" in fails(capfd, "train", "mine.yaml", "--stage", "decider", "decider=null")
    assert "did you mean decider?" in fails(capfd, "train", "mine.yaml", "--stage", "decidr")
    assert "did you mean backbone?" in fails(capfd, "run", "mine.yaml", "bakbone.x=1")
    assert "no recipe 'qwen3-0.6'" in fails(capfd, "run", "qwen3-0.6")
    assert "RECIPE" in fails(capfd, "run")


def test_an_unfinished_training_needs_resume(capfd, work, monkeypatch):
    import tah.pipeline.steps
    import tah.training.train

    works(capfd, "label", "mine.yaml", "--output", "out")
    real = tah.training.train.train

    def stops(*args, **kwargs):
        kept = real(*args, **kwargs)
        (kept / "config.json").unlink()
        raise tah.training.train.Stopped("stopped at step 1")

    monkeypatch.setattr(tah.pipeline.steps, "train_stage", stops)
    assert run(["train", "mine.yaml", "--output", "out"]) == 143
    assert "tah: stopped at step 1" in capfd.readouterr().err
    monkeypatch.setattr(tah.pipeline.steps, "train_stage", real)
    assert "unfinished training; add --resume" in fails(capfd, "train", "mine.yaml", "--output", "out")
    facts = Path("out/backbone/run.json")
    kept = facts.read_text()
    facts.write_text("{")
    line = fails(capfd, "train", "mine.yaml", "--output", "out", "--resume")
    assert "out/backbone/run.json is missing or damaged" in line
    facts.write_text(kept)
    _, notes = works(capfd, "train", "mine.yaml", "--output", "out", "--resume")
    assert notes[-1] == "tah: backbone: continues" and (work / "out" / "backbone" / "config.json").is_file()


def test_bad_data_leaves_nothing(capfd, work, tiny_base):
    Path("empty.jsonl").write_text("")
    Path("strange.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    Path("user.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 4)
    shutil.copytree(tiny_base, "other")
    tokenizer = json.loads(Path("other/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    Path("other/tokenizer.json").write_text(json.dumps(tokenizer))
    options = ("label", "mine.yaml", "--output", "out")
    assert "no.jsonl" in fails(capfd, *options, "data.source=no.jsonl")
    assert "empty" in fails(capfd, *options, "data.source=empty.jsonl")
    assert "strange.jsonl has the columns a" in fails(capfd, *options, "data.source=strange.jsonl")
    Path("cut.jsonl").write_text('{"text": "a"}\n{"text": "b')
    assert "data 'cut.jsonl' cannot be read" in fails(capfd, *options, "data.source=cut.jsonl")
    assert "'said'" in fails(capfd, *options, "data.columns={messages: said}")
    assert "no assistant tokens" in fails(capfd, *options, "data.source=user.jsonl")
    assert "another tokenizer" in fails(capfd, *options, "label.reference=other")
    assert "nowhere" in fails(capfd, *options, "label.reference=./nowhere")
    assert "nowhere" in fails(capfd, "run", "mine.yaml", "--output", "out", "base.model=./nowhere")
    assert "of the 64 held-out texts" in fails(capfd, "run", "mine.yaml", "--output", "out", "base.prune_texts=64")


def test_mistakes_are_found_before_any_step(capfd, work, tiny_base, tiny_checkpoint):
    """`fails` allows no line that says a step begins."""
    options = ("run", "mine.yaml", "--output", "out")
    line = fails(capfd, *options, "model.decider={kind: lean, layers: [2]}")
    assert "decider layers [2] must be hidden-state indices in 0..1" in line  # of a base with one of two layers dropped
    assert "layers=2 must be from 1 to 1" in fails(capfd, *options, "base.prune_layers=2")
    assert "lora_targets ['nope']" in fails(capfd, *options, "model.lora_targets=[nope]")
    line = fails(capfd, *options, f"base.model={tiny_checkpoint}")
    assert "is a TaH checkpoint, not a base model, so it cannot be pruned" in line
    line = fails(capfd, *options, f"base.model={tiny_checkpoint}", "base.prune_layers=0", "model.max_depth=3")
    assert "has max_depth=2 but the recipe has 3" in line
    shutil.copytree(tiny_base, "strange")
    config = json.loads(Path("strange/config.json").read_text())
    Path("strange/config.json").write_text(json.dumps(config | {"model_type": "mamba", "architectures": None}))
    assert "Mamba" in fails(capfd, *options, "base.model=strange")
    Path("out/backbone").mkdir(parents=True)
    Path("out/backbone/thesis.txt").write_text("kept")
    assert "out/backbone exists and was not made by this chain" in fails(capfd, *options)
    assert "out/backbone exists" in fails(capfd, "train", "mine.yaml", "--output", "out", "backbone.method=lookahead")
    line = fails(capfd, "run", "mine.yaml", "--output", "/proc/x")
    assert line.startswith("tah: /proc/x cannot be written to")
    rows = ("--data", "rows.jsonl", "--texts", "2", "--output", "/proc/x")
    assert "/proc/x cannot be written to" in fails(capfd, "prune", tiny_base, *rows)


def test_damaged_files_are_not_built_on(capfd, work):
    options = ("mine.yaml", "--output", "out", "base.prune_layers=0")
    works(capfd, "run", *options)
    weights = work / "out" / "backbone" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    line = fails(capfd, "train", *options, "--stage", "decider")
    assert "out/backbone/model.safetensors is damaged; train --stage backbone first" in line
    _, notes = works(capfd, "run", *options)
    assert [note.split(": ")[2].split(",")[0] for note in notes] == ["done before", "again", "done before"]
    assert weights.read_bytes() == whole
    weights.write_bytes(whole[: len(whole) // 2])
    assert any(weights.parent.glob("checkpoints/checkpoint-*"))  # of a training that was finished
    _, notes = works(capfd, "train", *options)
    assert "backbone: again, out/backbone/model.safetensors is damaged; what was there is now in" in notes[-1]
    next((work / "out" / "labels" / "train" / "data").glob("*.parquet")).unlink()
    line = fails(capfd, "train", *options)
    assert ".parquet is missing; run `tah label`" in line


def test_help_imports_no_torch():
    code = "from tah_cli.app import main; main()"
    for verb in ("label", "prune", "train", "run"):
        env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONPROFILEIMPORTTIME": "1"}
        command = [sys.executable, "-c", code, verb, "--help"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and f"Usage: tah {verb}" in done.stdout
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not imported & {"torch", "transformers", "numpy", "datasets", "tah"}
