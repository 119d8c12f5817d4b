"""The authors' checkpoints wherever MODEL is taken: by hub id or directory, converted once, never taken for a base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.hub_cache import SECOND, publish, use
from helpers.originals import Command, copied, edit
from tah import TaHForCausalLM, UnsupportedBase, convert
from tah.checkpoints.contents import contents as file_hash
from tah.checkpoints.convert import files_read
from tah.checkpoints.hub import Snapshot, hub_reachable
from tah.load import find, load_tah
from tah.session import Session
from tah.tracing.tune import check_tunable
from tah_cli.app import run

NAME = "nics-efc/TaH-tiny"


@pytest.fixture
def original(request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path) -> Path:
    """A checkpoint that the authors' code wrote, with a tokenizer, as theirs on the hub have one."""
    source = copied(getattr(request, "param", "S"), tmp_path).rename(tmp_path / "original")
    for path in [*tiny_base.glob("*token*"), tiny_base / "chat_template.jinja"]:
        shutil.copy(path, source)
    return source


@pytest.fixture
def hub(tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with that checkpoint as `NAME`, and nothing of ours."""
    use(tmp_path / "hub", tmp_path / "ours", monkeypatch)
    publish(tmp_path / "hub", NAME, original)
    return tmp_path / "hub"


def made(tmp_path: Path) -> list[str]:
    """What our cache holds apart from lock files."""
    ours = tmp_path / "ours"
    return sorted(path.name for path in ours.iterdir() if path.suffix != ".lock") if ours.is_dir() else []


def by_hand(original: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files that `tah convert` writes."""
    convert(original, tmp_path / "by_hand")
    return contents(tmp_path / "by_hand")


def contents(directory: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def works(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run([str(word) for word in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run([str(word) for word in arguments]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and len(line) < 500, line
    return line


@pytest.mark.parametrize("original", ["S", "L", "T"], indirect=True)
def test_a_hub_id_is_what_converting_by_hand_makes(hub: Path, original: Path, tmp_path: Path) -> None:
    path, kind = find(NAME)
    assert kind == "tah" and made(tmp_path) == [f"nics-efc--TaH-tiny-{'1' * 12}-tah-v1"]
    assert contents(path) == by_hand(original, tmp_path)


def test_a_directory_is_what_converting_by_hand_makes(hub: Path, original: Path, tmp_path: Path) -> None:
    path, kind = find(str(original))
    assert kind == "tah" and len(made(tmp_path)) == 1 and not Path(path).is_relative_to(original)
    assert contents(path) == by_hand(original, tmp_path)


@pytest.mark.parametrize("where", ["hub", "directory"])
def test_converted_once(hub: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    source = NAME if where == "hub" else str(original)
    first = find(source)
    before = {path: path.stat().st_mtime_ns for path in Path(first[0]).iterdir()}
    monkeypatch.setattr(sys.modules["tah.checkpoints.convert"], "convert", lambda *_: pytest.fail("converted again"))
    assert find(source) == first
    assert {path: path.stat().st_mtime_ns for path in Path(first[0]).iterdir()} == before


def test_each_revision_is_converted(hub: Path, original: Path, tmp_path: Path) -> None:
    first = find(NAME)[0]
    edit(original / "tah_config.json", max_iter=1)
    publish(hub, NAME, original, SECOND)
    second = find(NAME)[0]
    assert first != second and len(made(tmp_path)) == 2
    assert (load_tah(first).config.max_depth, load_tah(second).config.max_depth) == (2, 1)
    old = TaHForCausalLM.from_pretrained(NAME, revision="1" * 40)
    assert old.config.max_depth == 2 and len(made(tmp_path)) == 2


def test_a_directory_that_changed_is_converted_again(hub: Path, original: Path, tmp_path: Path) -> None:
    assert load_tah(find(str(original))[0]).config.max_depth == 2
    edit(original / "tah_config.json", max_iter=1)
    assert load_tah(find(str(original))[0]).config.max_depth == 1 and len(made(tmp_path)) == 2


@pytest.mark.parametrize(
    "beside", ["train.log", "optimizer.pt", "notes.json", "lora/README.md", "checkpoints/x", "iter_decider.bin.old"]
)
def test_what_is_not_converted_does_not_matter(hub: Path, original: Path, tmp_path: Path, beside: str) -> None:
    first = find(str(original))
    (original / beside).parent.mkdir(exist_ok=True)
    (original / beside).write_text("step 1")
    assert find(str(original)) == first and len(made(tmp_path)) == 1


@pytest.mark.parametrize(
    "changed",
    ["model.safetensors", "iter_decider.bin", "lora/adapter_model.safetensors", "lora/adapter_config.json"]
    + ["config.json", "tah_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
)
def test_what_is_converted_matters(hub: Path, original: Path, tmp_path: Path, changed: str) -> None:
    before = files_read(original)
    key = file_hash(str(original), before)
    (original / changed).write_bytes((original / changed).read_bytes() + b"\n")
    assert changed in before and file_hash(str(original), files_read(original)) != key


def test_all_shards_and_a_moved_decider_matter(original: Path) -> None:
    (original / "deciders").mkdir()
    (original / "iter_decider.bin").rename(original / "deciders" / "iter_decider.bin")
    config = json.loads((original / "tah_config.json").read_text())
    moved = {**(config.get("iter_decider_kwargs") or {}), "load_path": "deciders"}
    edit(original / "tah_config.json", iter_decider_kwargs=moved)
    (original / "model.safetensors").rename(original / "model-00001-of-00001.safetensors")
    shards = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (original / "model.safetensors.index.json").write_text(json.dumps(shards))
    found = files_read(original)
    wanted = {"deciders/iter_decider.bin", "model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert wanted <= set(found)
    for name in wanted:
        key = file_hash(str(original), found)
        (original / name).write_bytes((original / name).read_bytes() + b"\n")
        assert file_hash(str(original), found) != key, name


@pytest.mark.parametrize("where", ["hub", "directory"])
@pytest.mark.parametrize("damage", ["cut", "lacks a tensor", "config.json"])
def test_a_damaged_conversion_says_what_to_delete(
    capsys: pytest.CaptureFixture[str], hub: Path, original: Path, where: str, damage: str
) -> None:
    source = NAME if where == "hub" else str(original)
    path = Path(find(source)[0])
    if damage == "cut":
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-50])
    elif damage == "config.json":
        edit(path / "config.json", threshold="high")
    else:
        tensors = load_file(path / "model.safetensors")
        tensors.pop(max(tensors))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    line = fails(capsys, "generate", source, "Hi", "--max-new-tokens", 2)
    assert str(path) in line and line.endswith("; delete that directory, and it is converted again\n")
    with pytest.raises(ValueError, match="delete that directory, and it is converted again"):
        TaHForCausalLM.from_pretrained(source)
    shutil.rmtree(path)
    works(capsys, "generate", source, "Hi", "--max-new-tokens", 2)


def test_other_directories_are_not_to_be_deleted(capsys: pytest.CaptureFixture[str], hub: Path, tmp_path: Path) -> None:
    own = shutil.copytree(find(NAME)[0], tmp_path / "mine-tah-v1")
    (own / "model.safetensors").write_bytes((own / "model.safetensors").read_bytes()[:-50])
    capsys.readouterr()
    assert "delete" not in fails(capsys, "generate", own, "Hi")


def test_damaged_and_half_written_conversions_are_made_again(hub: Path, tmp_path: Path) -> None:
    path = Path(find(NAME)[0])
    whole = contents(path)
    (path / "model.safetensors").unlink()
    left = path.with_name(f".{path.name}.1.tmp")
    left.mkdir()
    (left / "config.json").write_text("{}")
    assert contents(find(NAME)[0]) == whole and made(tmp_path) == [path.name]


@pytest.mark.parametrize("original", ["S", "L"], indirect=True)
def test_in_python(hub: Path, original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "by_hand")
    wanted, ids = TaHForCausalLM.from_pretrained(tmp_path / "by_hand"), torch.arange(1, 25).view(2, 12)
    for source in (NAME, original, str(original)):
        model = TaHForCausalLM.from_pretrained(source)
        assert model.name_or_path == str(source)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, wanted(ids).logits), source


@pytest.mark.parametrize("where", ["hub", "directory"])
def test_never_a_base(hub: Path, original: Path, where: str) -> None:
    with pytest.raises(UnsupportedBase, match="this is a TaH model already"):
        TaHForCausalLM.from_base(NAME if where == "hub" else str(original))


@pytest.mark.parametrize("where", ["hub", "directory"])
def test_commands(capsys: pytest.CaptureFixture[str], hub: Path, original: Path, tmp_path: Path, where: str) -> None:
    source = NAME if where == "hub" else original
    convert(original, tmp_path / "by_hand")
    answers = [
        json.loads(works(capsys, "generate", name, "Hi", "--json", "--max-new-tokens", 5))
        for name in (source, tmp_path / "by_hand")
    ]
    for answer in answers:
        del answer["model"], answer["seconds"], answer["tokens_per_second"]
    assert answers[0] == answers[1] and answers[0]["new_tokens"] == 5
    found = json.loads(works(capsys, "inspect", source, "--json"))
    assert found["kind"] == "tah" and found["base"]["family"] == "qwen3" and found["decider"]["kind"] == "mlp"
    (tmp_path / "text.txt").write_text("Six times seven is 42.")
    assert "## Policies" in works(capsys, "trace", source, tmp_path / "text.txt")
    assert "not a base model" in fails(capsys, "inspect", tmp_path / "by_hand", "--against", source)
    shutil.rmtree(tmp_path / "by_hand")
    works(capsys, "convert", source, tmp_path / "by_hand")
    assert contents(tmp_path / "by_hand") == contents(find(str(source))[0])


def test_serve_gets_the_converted_checkpoint(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(sys.modules["tah_cli.serve"], "find_spec", lambda name: True)
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    assert run(["serve", NAME, "--port", "8001"]) == 0
    assert started[0][3:6] == [find(NAME)[0], "--served-model-name", NAME]


def test_tune_leaves_the_cache_alone(hub: Path, original: Path) -> None:
    for source in (NAME, str(original)):
        before = contents(find(source)[0])
        with pytest.raises(ValueError, match="which tah tune does not change: copy .*, then tune the copy"):
            check_tunable(source)
        assert contents(find(source)[0]) == before


@pytest.mark.slow
def test_two_processes_convert_once(hub: Path, tmp_path: Path) -> None:
    code = f"from tah.load import find; print(find({NAME!r})[0])"
    variables = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "TAH_CACHE": str(tmp_path / "ours")}
    variables["PYTHONPATH"] = str(Path(sys.modules["tah"].__file__ or "").parents[1])
    two = [
        subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=-1, stderr=-1, text=True) for _ in range(2)
    ]
    done = [process.communicate() for process in two]
    assert [process.returncode for process in two] == [0, 0], done
    assert done[0][0] == done[1][0] and len(made(tmp_path)) == 1
    assert sum("Converting nics-efc/TaH-tiny" in said for _, said in done) == 1
    assert Session.open(NAME).model.config.max_depth == 2


# -- refused -----------------------------------------------------------------------------------------------------------


def test_without_network(capsys: pytest.CaptureFixture[str], hub: Path, tmp_path: Path) -> None:
    line = fails(capsys, "generate", "nics-efc/TaH-plus-1.7B", "Hi")
    assert (
        line
        == "tah: no model 'nics-efc/TaH-plus-1.7B': there is no such directory, and the model hub cannot be reached\n"
    )
    assert "the model hub cannot be reached" in fails(capsys, "convert", "nics-efc/TaH-plus-1.7B", tmp_path / "new")
    with pytest.raises(ValueError, match="the model hub cannot be reached"):
        TaHForCausalLM.from_pretrained("nics-efc/TaH-plus-1.7B")


@pytest.mark.parametrize(
    "gone", ["iter_decider.bin", "model.safetensors", "lora/adapter_model.safetensors", "config.json"]
)
def test_a_part_that_is_not_in_the_cache(
    capsys: pytest.CaptureFixture[str], hub: Path, tmp_path: Path, gone: str
) -> None:
    (hub / "models--nics-efc--TaH-tiny" / "snapshots" / ("1" * 40) / gone).unlink()
    assert Path(gone).name in fails(capsys, "generate", NAME, "Hi")
    assert made(tmp_path) == []


def test_what_cannot_be_converted_is_one_line(capsys: pytest.CaptureFixture[str], original: Path, hub: Path) -> None:
    marker = hub.parent / "ran"
    torch.save(Command(f"touch {marker}"), original / "iter_decider.bin")
    publish(hub, "someone/evil", original)
    assert "which is not data; refused" in fails(capsys, "generate", "someone/evil", "Hi")
    assert "which is not data; refused" in fails(capsys, "inspect", original)
    edit(original / "tah_config.json", iter_attention_mode="same_iter")
    publish(hub, "nics-efc/TaH2", original)
    assert "iter_attention_mode is 'same_iter', which a" in fails(capsys, "generate", "nics-efc/TaH2", "Hi")
    assert "iter_attention_mode is 'same_iter', which a" in fails(capsys, "inspect", original)
    (original / "tah_config.json").write_text("{")
    assert "tah_config.json is not JSON" in fails(capsys, "generate", original, "Hi")
    assert made(hub.parent) == [] and not marker.exists()


@pytest.mark.parametrize(
    "name", ["a/b/c", "../no-such-model", "/nowhere", "~/x", "./x", "nics efc/x", "nics-efc/", "x\ny", "-/…"]
)
def test_what_is_no_id_is_not_asked_for(capsys: pytest.CaptureFixture[str], hub: Path, name: str) -> None:
    assert "there is no such directory" in fails(capsys, "generate", "--", name, "Hi")


# -- other models of the hub -------------------------------------------------------------------------------------------


def test_a_base_and_a_checkpoint_of_ours_on_the_hub(hub: Path, tiny_base: Path, tiny_checkpoint: Path) -> None:
    base, ours = publish(hub, "someone/base", tiny_base), publish(hub, "someone/ours", tiny_checkpoint)
    assert find("someone/base") == (str(base), "base") and find("someone/ours") == (str(ours), "tah")
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        wanted = TaHForCausalLM.from_pretrained(tiny_checkpoint)(ids).logits
        assert torch.equal(TaHForCausalLM.from_pretrained("someone/ours")(ids).logits, wanted)
        plain = TaHForCausalLM.from_base(str(tiny_base))(ids).logits
        assert torch.equal(TaHForCausalLM.from_base("someone/base")(ids).logits, plain)


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    """By huggingface_hub's own rule for its patterns, over the files of a repository."""
    from huggingface_hub.utils import filter_repo_objects

    asked: list[dict[str, Any]] = []
    folder = hub / "models--nics-efc--TaH-tiny" / "snapshots" / ("1" * 40)
    monkeypatch.setattr(
        "tah.checkpoints.hub.snapshot_download", lambda name, **options: asked.append(options) or str(folder)
    )
    Snapshot(NAME, subfolder="sub")
    Snapshot(NAME)
    small = ["config.json", "generation_config.json", "model.safetensors.index.json", "tah_config.json"]
    small += ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model", "qwen.tiktoken"]
    small += ["chat_template.jinja", "additional_chat_templates/rag.jinja", "model.safetensors.index.fp16.json"]
    other = ["huge.json", "pytorch_model.bin", "model.safetensors", "mine.py", "notes.txt", "onnx/config.json.onnx"]
    other += ["data/train.json", "trainer_state.json", "README.md", "original/consolidated.00.pth", "training_args.bin"]
    for options, inside in zip(asked, ("sub/", ""), strict=True):
        assert options.get("ignore_patterns") is None
        files = [inside + name for name in (*small, *other)]
        found = list(filter_repo_objects(files, allow_patterns=options["allow_patterns"]))
        assert found == [inside + name for name in small]


@pytest.mark.parametrize(
    ("value", "offline"), [("0", False), ("no", False), ("", False), ("1", True), ("true", True), ("ON", True)]
)
def test_offline_as_huggingface_hub_reads_it(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    code = "from huggingface_hub import constants; print(bool(constants.HF_HUB_OFFLINE))"
    variables = os.environ | {"HF_HUB_OFFLINE": value}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(offline)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # so that no name is looked up
    assert hub_reachable() is not offline
