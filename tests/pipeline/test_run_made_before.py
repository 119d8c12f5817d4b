"""Run directories that tah 0.1 made before the fields `reembed` and `combine` got their names of today.

`run_made_before/` has what `tah run recipe.yaml` left, without logs: `finished`, and `stopped`, killed after 3 of 6
steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("datasets")

from tah.config import current_tensor
from tah.training.trainer import TaHTrainer
from tah_cli.app import run

FORMER = Path(__file__).with_name("run_made_before")


@pytest.fixture
def made_before(tmp_path, monkeypatch) -> Path:
    """A working directory with the old runs, the recipe, base and rows they were made from."""
    shutil.copytree(FORMER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def notes_of(capfd, *arguments: str) -> list[str]:
    capfd.readouterr()
    code = run([*arguments])
    err = capfd.readouterr().err
    assert code == 0, err
    return [line.removeprefix("tah: ") for line in err.splitlines() if line.startswith("tah: ")]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {current_tensor(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}


def test_a_finished_run_is_done(capfd, made_before):
    before = {path: path.read_bytes() for path in (made_before / "finished").rglob("*") if path.is_file()}
    notes = notes_of(capfd, "run", "recipe.yaml", "--output", "finished")
    assert notes == [f"{name}: done before" for name in ("label", "backbone", "decider")]
    assert all(path.read_bytes() == content for path, content in before.items() if path.name != "recipe.yaml")
    Path("recipe.yaml").write_text(
        Path("recipe.yaml").read_text().replace("reembed", "next_input").replace("combine", "output")
    )
    assert notes_of(capfd, "run", "recipe.yaml", "--output", "finished") == notes
    again = notes_of(capfd, "run", "recipe.yaml", "--output", "finished", "model.next_input=topk")
    assert again[0] == notes[0]
    assert again[1].startswith('backbone: again, model.next_input was "hidden", is "topk"; what was there')
    assert again[2].startswith("decider: again, backbone has changed")


def test_a_stopped_run_continues_to_the_same_result(capfd, made_before, monkeypatch):
    real, steps = TaHTrainer.training_step, []
    monkeypatch.setattr(TaHTrainer, "training_step", lambda *a, **k: (steps.append(1), real(*a, **k))[1])
    notes = notes_of(capfd, "train", "recipe.yaml", "--output", "stopped", "--resume")
    assert notes == ["label: done before", "backbone: continues"]
    assert len(steps) == 4  # the checkpoint is of step 2 of 6
    notes = notes_of(capfd, "run", "recipe.yaml", "--output", "stopped")
    assert notes == ["label: done before", "backbone: done before", "decider: begins"]
    for stage in ("backbone", "decider"):
        once, whole = weights(made_before / "stopped" / stage), weights(made_before / "finished" / stage)
        assert once.keys() == whole.keys() and "next_input_map.weight" in once
        for name, tensor in whole.items():
            torch.testing.assert_close(once[name], tensor, atol=1e-6, rtol=1e-5)
    record = json.loads((made_before / "stopped" / "steps" / "backbone.json").read_text())
    assert record["finished"] and record["reads"]["model.next_input"] == "hidden"
    assert all("done before" in note for note in notes_of(capfd, "run", "recipe.yaml", "--output", "stopped"))
