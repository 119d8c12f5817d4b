"""The commands on tiny checkpoints: what they print, and one line with exit code 2 for what the user can put right."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.main import get_command

from tah import TaHForCausalLM
from tah.policy import Rule
from tah.session import Session
from tah_cli.app import app, run

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """No network, no colours, and a working directory to see what was written."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TAH_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def broken(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint whose tensors may be changed: `broken(change)` writes what `change` makes of them."""
    directory = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, directory)

    def rewrite(change):
        weights = load_file(directory / "model.safetensors")
        save_file(change(weights) or weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return rewrite


def fails(capsys, *arguments) -> str:
    """The one line on stderr of a command that fails with exit code 2 and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "is a base model" not in line]
    assert len(lines) == 1 and lines[0].startswith("tah: ") and "Traceback" not in err and out.strip() == ""
    assert sorted(Path.cwd().rglob("*")) == before
    return lines[0]


def works(capsys, *arguments) -> tuple[str, str]:
    """stdout and stderr of a command that succeeds."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


# -- what works ------------------------------------------------------------------------------------------------------


def test_generate_marks_iterated_tokens_and_sums_up(capsys, tiny_checkpoint):
    out, err = works(capsys, "generate", tiny_checkpoint, "hi", "--max-new-tokens", 8, "--policy", "always")
    assert "[" in out and "\x1b" not in out
    assert "100.0% iterated, mean depth 2.00" in err and "legend" in err


def test_generate_json_agrees_with_the_model(capsys, tiny_checkpoint):
    out, err = works(capsys, "generate", tiny_checkpoint, "hi", "--max-new-tokens", 12, "--json")
    got = json.loads(out)
    session = Session.open(str(tiny_checkpoint))
    ids = torch.tensor([session.encode([{"role": "user", "content": "hi"}])])
    want = session.model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    T = ids.shape[1]
    assert [token["id"] for token in got["tokens"]] == want.sequences[0, T:].tolist()
    assert [token["depth"] for token in got["tokens"]] == want.depth_count[0, T - 1 : -1].tolist()
    probability = want.continue_logits[0, T - 1 : -1, 0].sigmoid().tolist()
    assert [token["probability"] for token in got["tokens"]] == pytest.approx(probability)
    assert got["policy"] == "confidence" and got["threshold"] == 0.5 and got["max_depth"] == 2
    assert got["text"] == "".join(token["text"] for token in got["tokens"]) and got["new_tokens"] == len(got["tokens"])
    assert 0 < got["iterated_share"] < 1 and err == ""


def test_generate_takes_depth_threshold_and_policy(capsys, tiny_checkpoint):
    def depths(*options):
        out, _ = works(capsys, "generate", tiny_checkpoint, "hi", "--json", "--max-new-tokens", 6, *options)
        return {token["depth"] for token in json.loads(out)["tokens"]}

    assert depths("--policy", "never") == depths("--threshold", "1") == depths("--max-depth", "1") == {1}
    assert depths("--policy", "always", "--max-depth", "3") == {3}


def test_sampling_is_seeded(capsys, tiny_checkpoint):
    def text(seed):
        options = ("--temperature", 2, "--top-p", 0.95, "--top-k", 50, "--seed", seed, "--max-new-tokens", 10)
        return json.loads(works(capsys, "generate", tiny_checkpoint, "hi", "--json", *options)[0])["text"]

    assert text(1) == text(1) != text(2)


def test_generate_wraps_a_base_and_says_so(capsys, tiny_base):
    out, err = works(capsys, "generate", tiny_base, "hi", "--json", "--max-new-tokens", 3, "--system", "be brief")
    assert json.loads(out)["policy"] == "never" and "is a base model without a trained second pass" in err


def test_generate_without_chat_template_continues_the_prompt(capsys, broken):
    directory = broken(lambda weights: None)
    (directory / "chat_template.jinja").unlink()
    out, err = works(capsys, "generate", directory, "hi", "--json", "--max-new-tokens", 3)
    assert json.loads(out)["prompt_tokens"] == 2 and "no chat template" in err
    out, err = works(capsys, "generate", directory, "hi", "--json", "--max-new-tokens", 3, "--raw")
    assert json.loads(out)["prompt_tokens"] == 2 and err == ""


def test_generate_reads_standard_input_and_stops_at_the_last_position(capsys, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 60))
    got = json.loads(works(capsys, "generate", tiny_checkpoint, "-", "--raw", "--json")[0])
    assert got["prompt_tokens"] == 60 and got["new_tokens"] <= 4


def test_inspect_checkpoint(capsys, tiny_checkpoint):
    got = json.loads(works(capsys, "inspect", tiny_checkpoint, "--json")[0])
    model = TaHForCausalLM.from_pretrained(tiny_checkpoint)
    assert sum(got["parameters"].values()) == model.num_parameters() and got["parameters"]["linear_maps"] == 0
    assert got["extra_percent"]["adapter"] == 100 * got["parameters"]["adapter"] / got["base"]["parameters"] > 0
    assert got["base"]["family"] == "llama" and got["decider"] == {"kind": "lean", "layers": [1, 2]}
    assert got["method"] == {"next_input": "topk", "attention": "duo", "output": "sum"}
    text, _ = works(capsys, "inspect", tiny_checkpoint)
    assert "max depth" in text and "% of the base" in text and "confidence" in text


def test_inspect_base_gives_the_guards_verdict(capsys, tiny_base, tmp_path):
    assert json.loads(works(capsys, "inspect", tiny_base, "--json")[0])["supported"] is True
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "mamba")
    got = json.loads(works(capsys, "inspect", tmp_path / "mamba", "--json")[0])
    assert got["supported"] is False and "cannot be wrapped" in got["reason"]
    T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    assert "no causal language model" in json.loads(works(capsys, "inspect", tmp_path / "t5", "--json")[0])["reason"]


def test_a_damaged_checkpoint_of_the_authors_is_one_line(capsys, tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tah_config.json").write_text("{}")
    for command in (("inspect",), ("generate", "hi")):
        assert "max_iter is None" in fails(capsys, command[0], tmp_path / "original", *command[1:])


def test_bench_train_is_called_with_its_options(capsys, monkeypatch, tmp_path):
    import tah.benchmarks.bench_train

    calls, result = [], {"machine": {}, "settings": {}, "rows": []}
    monkeypatch.setattr(
        tah.benchmarks.bench_train, "bench_train", lambda setup, **options: calls.append((setup, options)) or result
    )
    out, _ = works(capsys, "bench", "train", "some", "--dtype", "bfloat16", "--quick", "--json")
    assert json.loads(out) == result
    ((setup, options),) = calls
    assert (setup.model, setup.precision, options["shapes"]) == ("some", "bfloat16", ((1, 512),))


def test_bench_is_called_with_its_options(capsys, monkeypatch, tmp_path):
    import tah.benchmarks.bench

    calls = []
    result = {"machine": {}, "settings": {}, "rows": []}
    monkeypatch.setattr(
        tah.benchmarks.bench, "bench", lambda model, **options: calls.append((model, options)) or result
    )
    out, _ = works(capsys, "bench", "some", "--dtype", "bfloat16", "--quick", "--json", "-o", tmp_path / "out")
    assert json.loads(out) == result and (tmp_path / "out" / "bench.json").is_file()
    (model, options) = calls[0]
    assert model == "some" and options["dtypes"] == ("bfloat16",) and options["batches"] == (1,)
    works(capsys, "bench", "some", "--batch", "1", "--batch", "16", "--length", "512", "--json")
    assert calls[1][1]["batches"] == (1, 16) and calls[1][1]["lengths"] == (512,)
    assert "0 must be an integer >= 1" in fails(capsys, "bench", "some", "--batch", "0")


# -- chat ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(capsys, monkeypatch, tiny_checkpoint):
    """`talk(line, ...)`: what a chat prints for these lines."""

    def talk(*lines):
        left = list(lines)

        def typed(prompt):
            if not left:
                raise EOFError
            if isinstance(left[0], type):
                raise left[0]
            return left.pop(0)

        monkeypatch.setattr("builtins.input", typed)
        return works(capsys, "chat", tiny_checkpoint, "--max-new-tokens", 4)[0]

    return talk


def test_chat_answers_and_obeys(talk):
    out = talk("hi", "/policy always", "/depth 3", "hi", "/threshold 0.25", "/reset", "/help", "/quit", "never read")
    assert out.count("tokens/s") == 2 and "mean depth 3.00" in out and "threshold 0.25" in out
    assert "new conversation" in out and "/policy NAME" in out


def test_chat_survives_bad_commands_and_long_conversations(talk):
    out = talk("/depth 0", "/depth two", "/threshold 2", "/policy decide", "/nothing", "x" * 70, "hi")
    for text in (
        "must be an integer >= 1",
        "two",
        "must be a number in [0, 1]",
        "unknown policy",
        "/help lists",
        "/reset",
    ):
        assert text in out
    assert out.count("tokens/s") == 1


def test_a_second_turn_runs_only_what_is_new_and_answers_the_same(tiny_checkpoint):
    session, fresh = Session.open(str(tiny_checkpoint)), Session.open(str(tiny_checkpoint))
    options = {"max_new_tokens": 4, "do_sample": False}
    first = session.answer(session.encode([{"role": "user", "content": "hi"}]), lambda token: None, Rule(), **options)
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "o"},
    ]
    lengths = []
    session.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]) if "input_ids" in kwargs else None,
        with_kwargs=True,
    )
    ids = session.encode(said)
    second = session.answer(ids, lambda token: None, Rule(), **options)
    want = fresh.answer(ids, lambda token: None, Rule(), **options)
    assert [vars(token) | {"probability": 0} for token in second.tokens] == [
        vars(token) | {"probability": 0} for token in want.tokens
    ]
    assert lengths[0] < len(ids) - 10  # the first turn is not run again
    third = session.answer(ids[:5], lambda token: None, Rule(), **options)  # a prompt that goes another way
    assert third.tokens[0].id == fresh.answer(ids[:5], lambda token: None, Rule(), **options).tokens[0].id


# -- what the user can put right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [("generate", "hi"), ("inspect",), ("chat",)])
@pytest.mark.parametrize("name", ["./nowhere", "nobody/nothing-xyz", "nothing-xyz", "a/b/c"])
def test_unknown_model(capsys, verb, name):
    assert name in fails(capsys, verb[0], name, *verb[1:])


def test_a_directory_without_a_model_and_a_file(capsys, tmp_path):
    assert "config.json" in fails(capsys, "generate", tmp_path, "hi")
    (tmp_path / "config.json").write_text("{")
    assert "damaged" in fails(capsys, "inspect", tmp_path)
    assert "is a file" in fails(capsys, "inspect", tmp_path / "config.json")


def test_code_in_a_model_directory_is_never_run(capsys, tmp_path):
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for verb in (("generate", tmp_path, "hi"), ("inspect", tmp_path)):
        fails(capsys, *verb)
    assert not (tmp_path / "ran").exists()


def test_missing_and_unexpected_tensors(capsys, broken, tiny_base, tmp_path):
    name = "base.model.layers.0.mlp.up_proj.weight"
    directory = broken(lambda weights: {key: value for key, value in weights.items() if key != name})
    assert name in fails(capsys, "generate", directory, "hi") and name in fails(capsys, "inspect", directory)
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    directory = broken(
        lambda weights: weights | {name: weights[name.replace("up", "gate")].clone(), "odd": torch.ones(1)}
    )
    assert "odd" in fails(capsys, "generate", directory, "hi")
    shutil.copytree(tiny_base, tmp_path / "base")
    weights = load_file(tiny_base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in fails(capsys, "generate", tmp_path / "base", "hi")


@pytest.mark.parametrize("verb", [("generate", "hi"), ("inspect",)])
def test_truncated_weights(capsys, broken, verb):
    file = broken(lambda weights: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert str(file.parent) in fails(capsys, verb[0], file.parent, *verb[1:])


def test_unsupported_family(capsys, tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "mamba")
    assert "cannot be wrapped" in fails(capsys, "generate", tmp_path / "mamba", "hi")


def test_no_tokenizer(capsys, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    assert "tokenizer" in fails(capsys, "generate", tmp_path / "gpt2", "hi")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-depth", "0"), ["--max-depth", "0 must be an integer from 1 to 1000"]),
        (("--threshold", "1.5"), ["--threshold", "1.5 must be a number from 0 to 1"]),
        (("--threshold", "-0.1"), ["--threshold", "-0.1 must"]),
        (("--policy", "confidnce"), ["confidnce", "did you mean confidence?"]),
        (("--threshold", "nan"), ["nan must"]),
        (("--threshold", "high"), ["--threshold", "high must be"]),
        (("--policy", "oracle"), ["oracle", "never"]),
        (("--max-new-tokens", "1.5"), ["--max-new-tokens", "1.5 must be an integer >= 1"]),
        (("--dtype", "float8"), ["float8", "bfloat16"]),
        (("--device", "gpu"), ["gpu"]),
        (("--nothing",), ["--nothing"]),
    ],
)
def test_bad_options(capsys, tiny_checkpoint, options, words):
    line = fails(capsys, "generate", tiny_checkpoint, "hi", *options)
    assert all(word in line for word in words), line


def test_bad_prompts(capsys, tiny_checkpoint, tiny_base):
    assert "empty" in fails(capsys, "generate", tiny_checkpoint, " \n")
    assert "not UTF-8" in fails(capsys, "generate", tiny_checkpoint, "caf\udce9")  # what a stray byte arrives as
    assert "MODEL is empty" in fails(capsys, "inspect", " ")
    for option, value in (("--max-depth", 10**9), ("--temperature", "inf"), ("--seed", 10**30)):
        assert str(value) in fails(capsys, "generate", tiny_checkpoint, "hi", option, value)
    line = fails(capsys, "generate", tiny_checkpoint, "x" * 200)
    assert "200" in line or "tokens" in line and "64 positions" in line
    assert "PROMPT" in fails(capsys, "generate", tiny_checkpoint)
    assert "nonsense" in fails(capsys, "nonsense")


@pytest.mark.parametrize("policy", ["never", "confidence"])
def test_nan_logits(capsys, broken, policy):
    directory = broken(lambda weights: {key: value * float("nan") for key, value in weights.items()})
    assert "NaN" in fails(capsys, "generate", directory, "hi", "--policy", policy)


def test_convert_refuses_a_malicious_pickle(capsys, tiny_base, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    source = tmp_path / "original"
    shutil.copytree(tiny_base, source)
    config = {"embedding_key": "model.embed_tokens", "max_iter": 2, "adapter": "none", "iter_decider": "MLPIterDecider"}
    (source / "tah_config.json").write_text(json.dumps(config))
    (source / "iter_decider.bin").write_bytes(pickle.dumps(Evil()))
    fails(capsys, "convert", source, tmp_path / "new")
    assert not (tmp_path / "ran").exists()


def test_convert_refuses_what_is_no_checkpoint_or_no_destination(capsys, tmp_path):
    assert "nowhere" in fails(capsys, "convert", tmp_path / "nowhere", tmp_path / "new")
    (tmp_path / "source").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    assert "full" in fails(capsys, "convert", tmp_path / "source", tmp_path / "full")
    assert "--threshold" in fails(capsys, "convert", tmp_path / "source", tmp_path / "new", "--threshold", 7)


def test_disk_full(capsys, monkeypatch):
    def full(source, target, threshold):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr("tah.load.convert", full)
    line = fails(capsys, "convert", "a", "b")
    assert "No space left on device" in line and "'b'" in line


# -- the program around it -------------------------------------------------------------------------------------------


def test_interrupt_exits_130_quietly(capsys, monkeypatch, tiny_checkpoint):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "answer", interrupt)
    assert run(["generate", str(tiny_checkpoint), "hi"]) == 130
    out, err = capsys.readouterr()
    assert (out + err).strip() == ""


def test_debug_shows_where_and_changes_nothing_else(capsys, monkeypatch):
    assert run(["inspect", "./nowhere"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1  # control: without it
    for arguments in (["inspect", "./nowhere", "--debug"], ["--debug", "inspect", "./nowhere"]):
        assert run(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback") and "checks.py" in err and err.endswith(line)
    monkeypatch.setenv("TAH_DEBUG", "1")
    assert run(["inspect", "./nowhere"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_a_bug_is_not_passed_off_as_a_users_error(capsys, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(Session, "encode", lambda *args, **kwargs: {}["bug"])
    assert run(["generate", str(tiny_checkpoint), "hi"]) == 1
    assert "unexpected KeyError" in capsys.readouterr().err


def tah(*arguments, **environment):
    """The installed command, as its entry point runs it."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment
    command = [sys.executable, "-m", "tah_cli", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_help_is_fast_because_it_imports_no_torch():
    seconds = []
    for verb in ([], ["generate"], ["bench"]):
        for _ in range(2):
            start = time.perf_counter()
            done = tah(*verb, "--help", PYTHONPROFILEIMPORTTIME="1")
            seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and "Usage: tah" in done.stdout
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not imported & {"torch", "transformers", "numpy", "tah"}
    assert min(seconds) < 2  # 0.2 s on an idle machine


def test_entry_point_exit_codes_without_traceback():
    done = tah("generate", "./nowhere", "hi")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    done = tah()
    assert done.returncode == 0 and "generate" in done.stdout


def test_documentation_is_current(monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("cli_docs", ROOT / "scripts" / "cli_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", ["cli_docs.py", "--check"])
    assert script.main() == 0, capsys.readouterr().err
    monkeypatch.setattr(script, "TARGET", tmp_path / "commands.md")
    assert script.main() == 1 and "out of date" in capsys.readouterr().err


def test_every_command_is_documented():
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    assert all(f"## tah {name}\n" in page for name, _ in get_command(app).walk())
