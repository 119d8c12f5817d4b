"""The command line before torch: groups of commands, their help, former spellings, and errors that need no model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import tah.checkpoints.hub
from tah import names
from tah.load import find
from tah_cli.app import app, run
from tah_cli.checks import check_model
from tah_cli.names import words

ROOT = Path(__file__).parents[2]
PROBE = """
import sys
from tah_cli.app import run
code = run(sys.argv[1:])
assert not {"torch", "transformers", "numpy", "datasets"} & sys.modules.keys(), "torch was imported"
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """No network, and a working directory of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.delenv("TAH_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


def without_torch(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that must not import torch."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def command_help(capsys, *arguments: str) -> str:
    assert run([*arguments, "--help"]) == 0
    return capsys.readouterr().out


# -- without torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["Usage: tah", "Evaluate:"]),
        ("--help", ["Usage: tah", "also compare, regrade.", "also train, trace, serve."]),
        ("--version", ["tah "]),
        ("generate --help", ["Usage: tah generate"]),
        ("eval --help", ["Usage: tah eval", "--tasks", "compare", "regrade"]),
        ("eval compare --help", ["Usage: tah eval compare"]),
        ("bench --help", ["Usage: tah bench", "[default: smollm2]", "--repeats", "train", "trace", "serve"]),
        ("bench serve -h", ["Usage: tah bench serve"]),
    ],
)
def test_what_only_informs_imports_no_torch(arguments, words):
    code, out, err = without_torch(*arguments.split())
    assert (code, err) == (0, "") and all(word in out for word in words), out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generat", ["unknown command 'generat'", "did you mean generate?", "choose from generate, chat"]),
        ("eval-compar a b", ["unknown command 'eval-compar'"]),
        ("bench trian", ["unknown command 'trian'", "did you mean train?", "choose from train, trace, serve"]),
        ("bench trian --help", ["unknown command 'trian'"]),
        ("eval compre a b", ["unknown command 'compre'", "did you mean compare?"]),
        ("eval ./compre -o out", ["no model './compre'"]),
        ("generate m hi --polcy never", ["--polcy", "--policy"]),
        ("generate m hi --policy nevr", ["--policy", "unknown policy 'nevr'", "did you mean never?"]),
        ("generate m hi --threshold 2", ["--threshold", "2 must be a number from 0 to 1"]),
        ("generate m hi --dtype floot32", ["--dtype", "unknown dtype 'floot32'", "did you mean float32?"]),
        ("generate follow-thah hi", ["no model 'follow-thah'", "did you mean follow-tah?"]),
        ("chat smolm2", ["no model 'smolm2'", "did you mean smollm2?"]),
        ("inspect ./nowhere", ["no model './nowhere': there is no such directory"]),
        ("inspect a/b/c", ["no model 'a/b/c': there is no such directory"]),
        ("inspect smollm2 --against ./nowhere", ["no model './nowhere'"]),
        ("convert ./nowhere new", ["no model './nowhere'"]),
        ("bench smollm2 --dtype float16", ["unknown dtype 'float16'", "choose from float32, bfloat16"]),
        ("bench train smolm2", ["did you mean smollm2?"]),
        ("bench trace ./nowhere", ["no model './nowhere'"]),
        ("bench serve --tasks 8,streem", ["unknown task 'streem'", "did you mean stream?"]),
        ("serve ./nowhere", ["no model './nowhere'"]),
        ("eval", ["MODEL"]),
        ("eval smollm2 -o out", ["--tasks"]),
        ("eval smollm2 --tasks gsm9k -o out", ["unknown task 'gsm9k'", "did you mean gsm8k?", "lm_eval:NAME"]),
        ("eval smollm2 --tasks , -o out", ["no tasks"]),
        (
            "eval smollm2 --tasks gsm8k -o out --policy never,allways",
            ["unknown policy 'allways'", "did you mean always?"],
        ),
        ("eval smollm2 --tasks gsm8k -o out --protocol papr", ["unknown protocol 'papr'", "did you mean paper?"]),
        ("eval smollm2 --tasks gsm8k -o out --backend vlm", ["unknown backend 'vlm'", "did you mean vllm?"]),
        ("eval smollm2 --tasks gsm8k -o out --data gsm8k=no.jsonl", ["no.jsonl cannot be read: there is no such file"]),
        ("eval smollm2 --tasks gsm8k -o out --reference ./nowhere", ["no model './nowhere'"]),
        ("eval smollm2 --tasks gsm8k -o out --greedy --top-k 5", ["--top-k 5"]),
        ("eval compare nowhere:never other", ["nowhere has no evaluation"]),
        ("eval regrade nowhere", ["nowhere has no evaluation"]),
        ("run tinny", ["no recipe 'tinny'", "did you mean tiny?"]),
        ("train tinny --stage decider", ["no recipe 'tinny'", "did you mean tiny?"]),
        ("train tiny --stage decidr", ["unknown stage 'decidr'", "did you mean decider?"]),
        ("label missing.yaml", ["no recipe 'missing.yaml': there is no such file"]),
        ("prune smollm2 --data no.jsonl --output new", ["data 'no.jsonl' cannot be read"]),
        ("trace smollm2 no.jsonl", ["data 'no.jsonl' cannot be read: there is no such file or directory"]),
        ("trace smollm2 ./texts", ["data './texts' cannot be read: there is no such file or directory"]),
        ("trace smollm2 no.jsonl --policy orackle", ["unknown policy 'orackle'", "did you mean oracle?"]),
        ("trace smollm2 nodir/no.jsonl", ["data 'nodir/no.jsonl' cannot be read: there is no such file or directory"]),
        ("tune smollm2 . --target share=2", ["target 'share=2' is not one of loss, share=X"]),
        ("eval smollm2 --tasks nine -o out --data arc_c=.", ["arc_c is not among the tasks aime25, "]),
        ("tune ./nowhere no.jsonl --target loss", ["no model './nowhere'"]),
        ("report no.jsonl", ["trace no.jsonl does not exist"]),
        ("report .", ["holds no trace.jsonl"]),
    ],
)
def test_an_error_that_needs_no_torch_imports_none(arguments, words):
    code, out, err = without_torch(*arguments.split())
    assert (code, out) == (2, "") and err.startswith("tah: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_the_probe_sees_torch(tiny_checkpoint):
    """Control."""
    code, _, err = without_torch("inspect", str(tiny_checkpoint))
    assert code == 1 and "torch was imported" in err


def test_names_are_those_of_the_library():
    assert words is not names
    assert {name: value for name, value in vars(words).items() if name.isupper()} == {
        name: value for name, value in vars(names).items() if name.isupper()
    }


@pytest.mark.parametrize("module", ["tah", "tah_cli"])
def test_both_packages_run(module):
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("tah ")


# -- words that are nearly ours ----------------------------------------------------------------------------------------


def test_a_repository_whose_name_resembles_a_word_of_ours_is_let_through(monkeypatch):
    with pytest.raises(ValueError, match=r"no model 'smollm3'.*did you mean smollm2\?"):
        check_model("smollm3")
    monkeypatch.setattr("huggingface_hub.model_info", lambda name, timeout: {"id": name})
    assert check_model("smollm3") == "smollm3"


def test_a_directory_whose_name_resembles_a_word_of_ours_is_let_through(tmp_path):
    (tmp_path / "smollm3").mkdir()
    assert check_model("smollm3") == "smollm3"
    with pytest.raises(ValueError, match="smollm3 is not a model: it has no config.json"):
        find("smollm3")


@pytest.mark.parametrize("name", ["gpt2", "nothing-xyz", "nobody/smollm2"])
def test_the_hub_is_not_asked_for_other_names(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.model_info", lambda *args, **kwargs: pytest.fail("the Hub was asked"))
    assert check_model(name) == name


def test_the_library_names_the_nearest_word_too():
    for name in ("smolm2", "./smolm2"):
        with pytest.raises(ValueError, match=rf"no model '{name}'.*; did you mean smollm2\?"):
            find(name)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "/no/where"])
def test_the_message_is_that_of_the_library(name):
    for check in (check_model, find):
        with pytest.raises(ValueError) as error:
            check(name)
        assert str(error.value) == f"no model {name!r}: there is no such directory"
    assert not tah.checkpoints.hub.is_repository(name)


# -- groups ------------------------------------------------------------------------------------------------------------

FORMER = {
    "eval-compare": ("eval", "compare"),
    "eval-regrade": ("eval", "regrade"),
    "bench-train": ("bench", "train"),
    "bench-trace": ("bench", "trace"),
    "bench-serve": ("bench", "serve"),
}


@pytest.mark.parametrize("former", FORMER)
def test_a_former_spelling_is_the_same_command(capsys, former):
    now = command_help(capsys, *FORMER[former])
    assert command_help(capsys, former).replace(former, " ".join(FORMER[former])).split() == now.split()


@pytest.mark.parametrize("spelling", [("eval", "compare"), ("eval-compare",)])
def test_both_spellings_run(capsys, spelling):
    assert run([*spelling, "a", "b"]) == 2
    assert "a has no evaluation" in capsys.readouterr().err


def test_the_help_names_every_command_once_and_cuts_no_line(capsys):
    out = command_help(capsys)
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2:3].isalpha()]
    for name, _ in get_command(app).walk():
        assert listed.count(name.split()[0]) == 1, name
    assert not set(FORMER) & set(listed) and "..." not in out.partition("Use:")[2]
    assert [line[:-1] for line in out.splitlines() if line.endswith(":") and line[0] != " "] == [
        "Options", "Use", "Train", "Evaluate", "Understand", "Serve"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["eval", "bench"])
def test_the_help_of_a_group_has_its_options_and_its_commands(capsys, name):
    out = command_help(capsys, name)
    group = get_command(app).commands[name]
    for option in group.default.params:
        assert any(spelling in out for spelling in (option.metavar or "", *option.opts))
    for command, _ in list(group.walk((name,)))[1:]:
        assert f"\n  {command.split()[1]} " in out
    assert f"Usage: tah {name} [OPTIONS]" in out and f"\n  {name} " not in out
    assert command_help(capsys, name, "smollm2") == out


def test_a_model_may_have_the_name_of_a_command(capsys, tmp_path):
    """A path says that it is meant; options before it do, too."""
    (tmp_path / "q.jsonl").write_text('{"question": "2 + 2", "answer": "4"}\n')
    asked = ["--tasks", "gsm8k", "-o", "out", "--data", "gsm8k=q.jsonl"]
    for name in ("compare", "eval"):
        (tmp_path / name).mkdir()
        for arguments in ([f"./{name}", *asked], [*asked, name]):
            assert run(["eval", *arguments]) == 2
            assert f"{arguments[0] if name in arguments[0] else name} is not a model" in capsys.readouterr().err
    assert run(["eval", "eval", *asked]) == 2  # is no command of the group
    assert "eval is not a model" in capsys.readouterr().err
