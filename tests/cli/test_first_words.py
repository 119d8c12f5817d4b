"""What the commands say first: who answers, where it computes, and one line for what the user can put right."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE
from tah.policy import Rule
from tah.progress import Reporter, Work
from tah.session import CONFIDENCE_THRESHOLD, Session
from tah_cli.app import run

ROOT = Path(__file__).parents[2]
ITEMS = Path(__file__).parents[1] / "evaluation" / "items"
NOTE = "is a base model without a trained second pass"


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """No network, no colours, and a working directory of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TAH_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


def said(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def one_line(capsys, *arguments) -> str:
    """The one line of a command that the user can put right."""
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("tah: ") and err.count("\n") == 1 and len(err) <= 608 and "tah: unexpected" not in err
    return err


@pytest.fixture
def changed(tiny_base, tmp_path):
    """`changed(template=..., more=..., positions=...)`: a copy of the tiny base with another chat template, with tokens
    that have no embedding, or with more positions."""

    def copy(template: str | None = None, more: tuple[str, ...] = (), pad: bool = False, positions: int = 64) -> Path:
        directory = tmp_path / "changed"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tiny_base, directory)
        if template is not None:
            (directory / "chat_template.jinja").write_text(template)
        if more:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
            tokenizer.add_tokens(list(more))
            if pad:
                tokenizer.add_special_tokens({"pad_token": more[-1]})
            tokenizer.save_pretrained(directory)
        config = json.loads((directory / "config.json").read_text()) | {"max_position_embeddings": positions}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return copy


def questions(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"question": text, "answer": "4"}) + "\n" for text in texts))
    return f"gsm8k={path}"


# -- a base answers as itself ----------------------------------------------------------------------------------------


def test_a_base_answers_as_itself(capsys, tiny_base):
    code, out, err = said(capsys, "generate", tiny_base, "hi", "--json", "--max-new-tokens", 12)
    got = json.loads(out)
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    session = Session.open(str(tiny_base), device="cpu")
    ids = torch.tensor([session.encode([{"role": "user", "content": "hi"}])])
    want = base.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert code == 0 and [token["id"] for token in got["tokens"]] == want
    assert {token["depth"] for token in got["tokens"]} == {1} and got["policy"] == "never"
    assert NOTE in err and "--policy confidence" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [("generate", "hi"), ("chat",)])
@pytest.mark.parametrize("option", [("--threshold", 0.3), ("--max-depth", 2), ("--max-depth", 3, "--threshold", 0)])
def test_what_changes_nothing_is_refused_before_anything_is_loaded(capsys, tiny_base, tmp_path, command, option):
    """There is nothing to load, and nobody notices."""
    empty = shutil.copytree(tiny_base, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    name, *rest = command
    assert "changes nothing while the base model" in one_line(capsys, name, empty, *rest, *option)
    for options in (("--max-depth", 1), (*option, "--policy", "confidence")):  # controls: these would load it
        assert "has no model.safetensors" in one_line(capsys, name, empty, *rest, *options)


@pytest.mark.parametrize(
    ("options", "policy", "noted"),
    [
        ((), "never", True),
        (("--max-depth", 1), "never", True),
        (("--policy", "never"), "never", False),
        (("--policy", "confidence"), "confidence", False),
        (("--policy", "always"), "always", False),
        (("--policy", "random"), "random", False),
        (("--policy", "confidence", "--threshold", 0.4), "confidence", False),
        (("--policy", "confidence", "--max-depth", 3), "confidence", False),
        (("--policy", "always", "--max-depth", 3), "always", False),
        (("--policy", "never", "--threshold", 0.4), "never", False),  # nothing was left to guess
    ],
)
def test_the_note_appears_only_where_no_policy_was_given(capsys, tiny_base, options, policy, noted):
    code, out, err = said(capsys, "generate", tiny_base, "hi", "--json", "--max-new-tokens", 4, *options)
    got = json.loads(out)
    assert code == 0 and got["policy"] == policy and (NOTE in err) == noted
    asked = float(options[options.index("--threshold") + 1]) if "--threshold" in options else CONFIDENCE_THRESHOLD
    assert got["threshold"] == asked
    if policy == "always":
        assert {token["depth"] for token in got["tokens"]} == {got["max_depth"]}


@pytest.mark.parametrize("options", [("--threshold", 0.5), ("--max-depth", 2), ("--max-depth", 3, "--threshold", 0)])
@pytest.mark.parametrize("verb", ["generate", "chat", "eval"])
def test_an_option_that_would_change_nothing_is_refused(capsys, tmp_path, tiny_base, verb, options):
    words = {"generate": ("hi",), "chat": (), "eval": ("--tasks", "gsm8k", "-o", tmp_path / "out")}[verb]
    if verb == "eval":
        words = (*words, "--data", questions(tmp_path / "q.jsonl", "2 + 2"))
    line = one_line(capsys, verb, tiny_base, *words, *options)
    assert "answers as itself" in line and "--policy confidence" in line
    assert not (tmp_path / "out").exists()


def test_a_trained_model_is_not_taken_for_a_base(capsys, tiny_checkpoint):
    for options in ((), ("--threshold", 0.4), ("--max-depth", 2)):
        code, out, err = said(capsys, "generate", tiny_checkpoint, "hi", "--json", "--max-new-tokens", 4, *options)
        assert code == 0 and json.loads(out)["policy"] == "confidence" and err == ""


def test_chat_says_it_once_and_iterates_when_told(capsys, monkeypatch, tiny_base):
    lines = iter(["hi", "/threshold 0.2", "/policy always", "/reset", "hi"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    code, out, err = said(capsys, "chat", tiny_base, "--max-new-tokens", 4)
    assert code == 0 and err.count(NOTE) == 1
    assert "0.0% iterated" in out and "100.0% iterated" in out
    assert "nothing iterates under the policy never" in " ".join(out.split())


def policies(out: str) -> set[str]:
    return {entry["policy"] for entry in json.loads(out)["results"]}


def test_eval_says_it_and_answers_as_the_base(capsys, tmp_path, changed):
    words = ("--tasks", "gsm8k", "--data", questions(tmp_path / "q.jsonl", "2 + 2", "1 + 3"), "--max-new-tokens", 4)
    base = changed(positions=512)
    code, out, err = said(capsys, "eval", base, *words, "-o", tmp_path / "a", "--json")
    assert code == 0 and policies(out) == {"never"} and err.count(NOTE) == 1
    code, out, err = said(capsys, "eval", base, *words, "-o", tmp_path / "b", "--json", "--policy", "confidence")
    assert code == 0 and policies(out) == {"confidence"} and NOTE not in err


def test_a_trace_of_a_base_looks_at_confidence(capsys, tmp_path, tiny_base):
    (tmp_path / "prose.txt").write_text("It was the best of times, it was the worst of times. " * 3)
    code, out, err = said(capsys, "trace", tiny_base, "prose.txt", "-o", "t.jsonl")
    header = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    assert code == 0 and header["policy"] == "confidence" and header["threshold"] == CONFIDENCE_THRESHOLD
    assert err.count(NOTE) == 1 and "None" not in out + err
    code, out, err = said(capsys, "trace", tiny_base, "prose.txt", "--policy", "never")
    assert code == 0 and NOTE not in err and "policy never" in out


# -- where, and in which precision -----------------------------------------------------------------------------------

GPU, OLD_GPU = {"cuda": True, "bfloat16": ("cuda",)}, {"cuda": True}
MAC, OLD_MAC = {"mps": True, "bfloat16": ("mps", "cpu")}, {"mps": True}
NEW_CPU, OLD_CPU = {"bfloat16": ("cpu",)}, {}


@pytest.mark.parametrize(
    ("machine", "device"),
    [(GPU, "cuda"), (OLD_GPU, "cuda"), (MAC, "mps"), (OLD_MAC, "mps"), (NEW_CPU, "cpu"), (OLD_CPU, "cpu")]
    + [({"cuda": True, "mps": True}, "cuda"), ({"other": ("xpu",)}, "cpu")],
)
def test_auto_is_cuda_then_mps_then_the_cpu(machine, device):
    from tah.device import Machine

    assert Machine(**machine).check_device("auto").type == device


@pytest.mark.parametrize(
    ("machine", "kind", "saved", "chosen"),
    [
        (GPU, "cuda", "bfloat16", "bfloat16"),
        (OLD_GPU, "cuda", "bfloat16", "float32"),
        (OLD_GPU, "cuda", "float16", "float16"),
        (GPU, "cpu", "bfloat16", "float32"),  # what the GPU can do is not what the CPU beside it can
        (GPU, "cuda", "float32", "float32"),
        (GPU, "cuda", "float64", "float64"),
        (MAC, "mps", "bfloat16", "bfloat16"),
        (OLD_MAC, "mps", "bfloat16", "float32"),
        (MAC, "mps", "float16", "float16"),
        (MAC, "mps", "float64", "float32"),
        (NEW_CPU, "cpu", "bfloat16", "bfloat16"),
        (OLD_CPU, "cpu", "bfloat16", "float32"),
        (NEW_CPU, "cpu", "float16", "float32"),
        (OLD_CPU, "cpu", "float32", "float32"),
        (OLD_CPU, "cpu", "float64", "float64"),
        ({"other": ("xpu",)}, "xpu", "bfloat16", "bfloat16"),
    ],
)
def test_auto_is_the_checkpoints_precision_where_the_device_has_it(machine, kind, saved, chosen):
    from tah.device import Machine

    assert Machine(**machine).choose_dtype(kind, getattr(torch, saved)) == getattr(torch, chosen)


@pytest.mark.parametrize(
    "name", ["gpu", "meta", "", "cuda", "cuda:0", "mps", "xla", "hpu", "vulkan", "cpu:-1", "lazy", "CPU", "cpu,cuda"]
)
def test_a_device_that_is_not_there(capsys, tiny_checkpoint, name):
    from tah.device import Machine

    with pytest.raises(ValueError, match=r"device .* choose from auto, cpu$"):
        Machine().check_device(name)
    here = Machine.here()
    if name.partition(":")[0] not in ("cuda" * here.cuda, "mps" * here.mps, *here.other):
        line = one_line(capsys, "generate", tiny_checkpoint, "hi", "--device", name)
        assert repr(name) in line and "choose from auto, cpu" in line


class NoOneDNN:
    """`torch.ops.mkldnn` of a torch that was built without oneDNN, as for macOS."""

    def __getattr__(self, name):
        raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute {name!r}")


@pytest.mark.parametrize("arm", ["arm64", "aarch64", "ARM64"])
@pytest.mark.parametrize(
    ("built", "operation", "has"),
    [
        (False, None, False),
        (True, None, False),  # a build that has oneDNN, but not the question
        (True, lambda: True, True),
        (True, lambda: False, False),
        (False, lambda: True, False),
    ],
)
def test_an_arm_processor_with_and_without_onednn(monkeypatch, tiny_checkpoint, capsys, arm, built, operation, has):
    from tah.device import Machine

    ops = NoOneDNN() if operation is None else SimpleNamespace(_is_mkldnn_bf16_supported=operation)
    monkeypatch.setattr("platform.machine", lambda: arm)
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    assert ("cpu" in Machine.here().bfloat16) == has
    if operation is None:
        assert run(["generate", str(tiny_checkpoint), "hi", "--max-new-tokens", "1"]) == 0


def test_a_precision_that_the_device_lacks_is_replaced_and_said(tiny_base):
    from tah.device import Machine, put

    told = io.StringIO()
    progress = Reporter(Console(file=told))
    model = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    exact = model.model.embed_tokens.weight.float()
    put(model, "m", device="cpu", machine=Machine(bfloat16=("cpu",)), progress=progress)
    assert model.dtype == torch.bfloat16 and not told.getvalue()
    put(model, "m", dtype="bfloat16", device="cpu", machine=Machine(), progress=progress)
    assert model.dtype == torch.bfloat16 and not told.getvalue()  # asked for, so it is done
    put(model, "m", device="cpu", machine=Machine(), progress=progress)
    assert model.dtype == torch.float32 and torch.equal(model.model.embed_tokens.weight, exact)
    (line,) = told.getvalue().splitlines()
    assert "m is saved in bfloat16" in line and "this CPU" in line and "float32" in line and "--dtype bfloat16" in line


def test_half_precision_on_a_cpu_is_said_by_the_commands(capsys, tmp_path, tiny_base):
    """float16, which no CPU has, so that the test does not depend on this one."""
    half = tmp_path / "half"
    shutil.copytree(tiny_base, half)
    LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float16).save_pretrained(half)
    assert json.loads((half / "config.json").read_text())["dtype"] == "float16"
    words = ("--json", "--max-new-tokens", 3, "--policy", "never", "--device", "cpu")
    code, _, err = said(capsys, "generate", half, "hi", *words)
    assert code == 0 and err.count("\n") == 1 and "is saved in float16" in err and "float32 instead" in err
    code, _, err = said(capsys, "generate", half, "hi", *words, "--dtype", "float32")
    assert code == 0 and err == ""
    assert Session.open(str(half), device="cpu").model.dtype == torch.float32
    assert Session.open(str(half), as_saved=True).model.dtype == torch.float16
    code, _, err = said(capsys, "inspect", half)
    assert code == 0 and err == ""


def test_a_pruned_base_keeps_its_precision(capsys, tmp_path, tiny_base):
    half = tmp_path / "half"
    shutil.copytree(tiny_base, half)
    LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float16).save_pretrained(half)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {n} is here"}) + "\n" for n in range(4)))
    words = ("--data", "texts.jsonl", "--output", "less", "--texts", 4, "--device", "cpu")
    code, _, err = said(capsys, "prune", half, *words)
    assert code == 0 and "is saved in float16" in err
    assert json.loads((tmp_path / "less" / "config.json").read_text())["dtype"] == "float16"
    less = LlamaForCausalLM.from_pretrained(tmp_path / "less")
    assert less.dtype == torch.float16 and less.config.num_hidden_layers == 1


def test_auto_is_the_default_everywhere():
    import inspect

    from typer.main import get_command

    from tah.evaluation.request import Request
    from tah.pipeline.pruned import Pruning
    from tah_cli.app import app

    commands = dict(get_command(app).walk())
    for name in ("generate", "chat", "eval", "trace", "tune", "prune"):
        defaults = {option.name: option.default for option in commands[name].params}
        assert (defaults["device"], defaults["dtype"]) == ("auto", "auto"), name
    for function in (Session.open, Request, Pruning):
        parameters = inspect.signature(function).parameters
        assert (parameters["device"].default, parameters["dtype"].default) == ("auto", "auto")


# -- chat templates --------------------------------------------------------------------------------------------------

BODY = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "{% if messages[0]['role'] == 'system' %}"
REFUSING = {
    "gemma": SYSTEM + "{{ raise_exception('System role not supported') }}{% endif %}" + BODY,
    "alternating": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% endfor %}" + BODY,
    "only known roles": "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}" + BODY,
    "undefined": SYSTEM + "{{ messages[0].meta.kind }}{% endif %}" + BODY,
    "zero": SYSTEM + "{{ 1 / 0 }}{% endif %}" + BODY,
    "type": SYSTEM + "{{ 'a' + 1 }}{% endif %}" + BODY,
    "lookup": SYSTEM + "{{ {}['x']['y'] }}{% endif %}" + BODY,
    "lines": SYSTEM + "{{ raise_exception('No.\n\nNot at all.') }}{% endif %}" + BODY,
    "long": SYSTEM + "{{ raise_exception('no ' * 3000) }}{% endif %}" + BODY,
    "empty": SYSTEM + "{{ raise_exception('') }}{% endif %}" + BODY,
    "escapes": SYSTEM + "{{ raise_exception('\x1b[2Jno') }}{% endif %}" + BODY,
    "silent": BODY,  # leaves it out without a word
}
TAKING = {
    "chatml": CHAT_TEMPLATE,
    "default of its own": SYSTEM + "S:{{ messages[0]['content'] }}{% else %}S:be brief{% endif %}" + BODY,
    "trimmed": SYSTEM + "{{ messages[0]['content'] | trim }}{% endif %}" + BODY,
    "into the question": "{% set s = '' %}" + SYSTEM + "{% set s = messages[0]['content'] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ s }} {{ m['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}",
    "upper case": SYSTEM + "{{ messages[0]['content'] | upper }}{% endif %}" + BODY,
}


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("name", REFUSING)
def test_a_template_that_refuses_a_system_message(capsys, monkeypatch, changed, verb, name):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("the chat began"))
    words = ("hi",) if verb == "generate" else ()
    line = one_line(capsys, verb, changed(REFUSING[name]), *words, "--system", "be brief", "--policy", "never")
    assert "chat template" in line and "leave out --system" in line and "\x1b" not in line


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("name", TAKING)
def test_a_template_that_takes_one(capsys, monkeypatch, changed, verb, name):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    words = ("hi", "--max-new-tokens", 2) if verb == "generate" else ()
    model = changed(TAKING[name])
    code, _, err = said(capsys, verb, model, *words, "--system", " be brief ", "--policy", "never")
    assert (code, err.count("tah:")) == (0, 0)


@pytest.mark.parametrize("name", REFUSING)
def test_the_same_templates_without_a_system_message(capsys, changed, name):
    model = changed(REFUSING[name])
    for words in ((), ("--system", ""), ("--raw", "--system", "be brief")):
        code, _, err = said(capsys, "generate", model, "hi", "--max-new-tokens", 2, "--policy", "never", *words)
        assert (code, err.count("tah:")) == (0, 0)


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 | no_such }}", "{{", "{% endfor %}", "{% generation %}"])
def test_a_template_that_cannot_be_read(capsys, changed, template):
    model = changed(template)
    for words in ((), ("--system", "be brief")):
        assert "chat template" in one_line(capsys, "generate", model, "hi", "--policy", "never", *words)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('never') }}", "{{ messages[7].content.x }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ x.y.z }}"],
)
def test_a_template_that_writes_nothing_at_all(capsys, monkeypatch, changed, template):
    model = changed(template)
    for words in ((), ("--system", "be brief")):
        line = one_line(capsys, "generate", model, "hi", "--policy", "never", *words)
        assert "cannot write this conversation" in line and "--raw" in line
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nho\n"))
    code, out, _ = said(capsys, "chat", model, "--policy", "never")
    assert code == 0 and " ".join(out.split()).count("cannot write this conversation") == 2  # and the chat went on


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ 1 / 0 }}", "{{ messages[7].content.x }}"])
def test_an_evaluation_with_such_a_template(capsys, tmp_path, changed, template):
    words = ("--tasks", "gsm8k", "--policy", "never", "--max-new-tokens", 2, "-o", "out")
    words = (changed(template, positions=512), *words, "--data", questions(tmp_path / "q.jsonl", "2 + 2"))
    code, out, err = said(capsys, "eval", *words)
    assert (code, out) == (2, "") and "cannot write a question" in err.splitlines()[-1] and "--raw" in err
    assert said(capsys, "eval", *words, "--raw")[0] == 0


# -- commands of a chat ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/threshold", "/threshold needs a number from 0 to 1, such as /threshold 0.5"),
        ("/threshold ", "/threshold needs a number from 0 to 1"),
        ("/threshold high", "/threshold high: that is no number"),
        ("/threshold 0,5", "/threshold 0,5: that is no number"),
        ("/threshold 2", "must be a number in [0, 1]"),
        ("/threshold nan", "must be a number in [0, 1]"),
        ("/threshold -inf", "must be a number in [0, 1]"),
        ("/depth", "/depth needs an integer from 1 on"),
        ("/depth two", "/depth two: that is no number"),
        ("/depth 2.5", "/depth 2.5: that is no number"),
        ("/depth 0", "must be an integer >= 1"),
        ("/depth " + "9" * 5000, "that is no number"),
        ("/policy", "/policy needs one of decider, confidence"),
        ("/policy sure", "unknown policy 'sure'"),
        ("/", "unknown command /"),
        ("/threshold 0.25", "threshold 0.25"),
        ("/threshold 1e-3", "threshold 0.001"),
        ("/depth 3", "max_depth 3"),
        ("/policy always", "policy always"),
        ("/reset", "forgotten"),
    ],
)
def test_commands_of_a_chat(tiny_checkpoint, line, told):
    from tah_cli.chat import Chat

    session = Session.open(str(tiny_checkpoint), device="cpu")
    chat = Chat(session, session.rule(Rule()), {}, None, color=False)
    before = chat.rule
    answer = chat.command(line)
    assert told in answer and "\n" not in answer and len(answer) < 300
    assert "could not convert" not in answer and "invalid literal" not in answer
    changes = ("/threshold 0.25", "/threshold 1e-3", "/depth 3", "/policy always")
    assert (chat.rule == before) == (line not in changes)


# -- a tokenizer longer than the embedding ---------------------------------------------------------------------------

NEW = ("<new>", "<tool>", "\u00e9t\u00e9", " dimension")


@pytest.mark.parametrize(
    "prompt", ["<new>", "a <new> b", "<tool><new>", "un \u00e9t\u00e9", "the dimension", "x" * 9 + "<tool>"]
)
def test_generate_with_a_tokenizer_longer_than_the_embedding(capsys, changed, prompt):
    model = changed(more=NEW)
    for words in (("--policy", "never"), ("--policy", "never", "--raw"), ("--policy", "always")):
        line = one_line(capsys, "generate", model, prompt, *words)
        assert re.search(r"the prompt has the token 2(59|6\d), but the model only 259: ", line) and str(model) in line


@pytest.mark.parametrize("prompt", ["new", "<ne", "tool", "hi", "dimensio"])
def test_what_such_a_tokenizer_writes_with_tokens_that_have_one(capsys, changed, prompt):
    code, _, err = said(capsys, "generate", changed(more=NEW), prompt, "--max-new-tokens", 2, "--policy", "never")
    assert code == 0 and "token 2" not in err


def test_a_chat_goes_on_after_such_a_token(capsys, monkeypatch, changed):
    monkeypatch.setattr("sys.stdin", io.StringIO("<new>\nhi\n"))
    code, out, _ = said(capsys, "chat", changed(more=NEW), "--max-new-tokens", 2, "--policy", "never")
    assert code == 0 and "has the token 259, but the model only 259" in out and out.count("tokens/s") == 1


def test_eval_with_a_tokenizer_longer_than_the_embedding(capsys, tmp_path, changed):
    model = changed(more=NEW, positions=512)
    words = ("--tasks", "gsm8k", "-o", "out", "--max-new-tokens", 3, "--policy", "never")
    code, out, err = said(capsys, "eval", model, *words, "--data", questions(tmp_path / "q.jsonl", "2", "a <new> b"))
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and "a question has the token 259, but the model only 259" in last
    data = questions(tmp_path / "r.jsonl", "2 + 2", "3 + 3")
    code, _, err = said(capsys, "eval", model, *words[:2], "-o", "other", *words[4:], "--data", data)
    assert code == 0, err


def test_padding_may_have_no_embedding(capsys, tmp_path, changed):
    """Many a tokenizer was given a padding token that the model never sees."""
    texts = ("2 + 2", "a much longer question than the first", "3")
    kept = {}
    for name, model in (
        ("without", changed(positions=512)),
        ("with", changed(more=("<pad>",), pad=True, positions=512)),
    ):
        words = ("--tasks", "gsm8k", "--greedy", "--max-new-tokens", 6, "--policy", "never,always", "--batch-size", 3)
        code, _, err = said(capsys, "eval", model, *words, "-o", name, "--data", questions(tmp_path / "q", *texts))
        assert code == 0, err
        kept[name] = [
            json.loads(line)["text"]
            for policy in ("never", "always")
            for line in (tmp_path / name / "samples" / policy / "gsm8k.jsonl").read_text().splitlines()
        ]
    assert kept["with"] == kept["without"] and any(kept["with"])


def test_trace_and_prune_with_a_tokenizer_longer_than_the_embedding(capsys, tmp_path, changed):
    model = changed(more=NEW)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a <new> b"}) + "\n")
    assert "t.jsonl has the token 259, but the model only 259" in one_line(
        capsys, "trace", model, "t.jsonl", "--policy", "never"
    )
    line = one_line(capsys, "prune", model, "--data", "t.jsonl", "--output", "less", "--texts", 1)
    assert "t.jsonl has the token 259, but the model only 259" in line and not (tmp_path / "less").exists()


# -- words that a tokenizer does not know ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("e3>e5 e5>e5 e3", []),
        ("e0", []),
        ("e1>e2 hello e1", ["hello"]),
        ("hello world", ["hello", "world"]),
        ("hello hello", ["hello"]),
        ("e16>e1 e1", ["e16>e1"]),
        ("E1", ["E1"]),
        ("e1 \x1b[2J", ["[2J"]),
        ("a b c d e f g", ["'a', 'b', 'c', 'd', 'e' and 2 more"]),
        ("x" * 100 + " e1", ["x" * 21 + "..."]),
        ("<|pad|> e1", []),  # the very token that stands for the unknown
        ("e1\ne2\te3", []),
    ],
)
def test_unknown_words_are_named(capsys, prompt, unknown):
    code, _, err = said(capsys, "generate", "follow-tah", prompt, "--max-new-tokens", 2)
    lines = [line for line in err.splitlines() if line.startswith("tah: ")]
    assert code == 0 and len(lines) == bool(unknown) and "\x1b" not in err
    if unknown:
        assert "the tokenizer of follow-tah does not know" in lines[0] and all(word in lines[0] for word in unknown)


def small_tokenizer(kind) -> PreTrainedTokenizerFast:
    inner = Tokenizer(kind)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.mark.parametrize(
    ("kind", "unknown"),
    [
        (models.BPE({"</s>": 0, "a": 1, "b": 2}, []), "'c'"),  # drops what it does not know
        (models.BPE({"</s>": 0, "a": 1, "b": 2, "?": 3}, [], unk_token="?"), "'c'"),
        (models.WordPiece({"</s>": 0, "a": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"), "'c'"),
        (models.WordLevel({"</s>": 0, "a": 1, "b": 2, "c": 3}, "</s>"), None),
    ],
)
def test_unknown_words_of_other_tokenizers(tiny_base, kind, unknown):
    session = Session.open(str(tiny_base), device="cpu")
    assert session.unknown_words("\u6f22 \U0001f600 anything") is None  # bytes know everything
    session.tokenizer = small_tokenizer(kind)
    told = session.unknown_words("a b c")
    assert told is None if unknown is None else told is not None and told.endswith(f"does not know {unknown}")


def test_unknown_words_of_a_trace_are_named(capsys, tmp_path):
    turns = [{"role": "user", "content": "hello e1>e2"}, {"role": "assistant", "content": "e1 e2"}]
    rows = {"text": {"text": "hello e1"}, "messages": {"messages": turns}, "known": {"text": "e1 e2 e3"}}
    for name, row in rows.items():
        (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
        code, _, err = said(capsys, "trace", "follow-tah", "t.jsonl")
        assert code == 0 and ("does not know 'hello'" in err) == (name != "known")


@pytest.mark.parametrize("turns", ["5", "true", '"x"', "null", "{}", "[5]", '[{"content": 5}]'])
def test_a_trace_of_no_conversation_is_one_line(capsys, tmp_path, tiny_checkpoint, turns):
    (tmp_path / "rows.jsonl").write_text(f'{{"messages": {turns}}}\n')
    code, _, err = said(capsys, "trace", tiny_checkpoint, tmp_path / "rows.jsonl", "-o", tmp_path / "trace.jsonl")
    assert code == 2 and "unexpected" not in err and len(err.splitlines()) == 1, err


def test_unknown_words_are_named_in_a_chat(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello e1\ne1\n"))
    code, out, _ = said(capsys, "chat", "follow-tah", "--max-new-tokens", 2)
    assert code == 0 and out.count("does not know 'hello'") == 1 and out.count("does not know") == 1


# -- tah run, tah inspect, the lens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("./nowhere", ["./nowhere", "no such directory"]),
        ("nobody/nothing-xyz", ["nobody/nothing-xyz"]),
        ("nothing-xyz", ["nothing-xyz"]),
        ("{tmp}/empty", ["no config.json"]),
        ("{tmp}/damaged", ["damaged"]),
        ("{tmp}/file", ["is a file"]),
        ("{tmp}/original", ["original"]),
        ("{tmp}/t5", ["no causal language model"]),
        ("{tmp}/short", ["16 positions", "max_length=128"]),
        ("' '", ["MODEL is empty"]),
    ],
)
@pytest.mark.parametrize("verb", ["run", "label"])
def test_the_reference_is_looked_for_before_anything_is_made(capsys, tmp_path, verb, reference, words):
    for name in ("empty", "damaged", "original", "t5", "short"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "file").write_text("")
    (tmp_path / "original" / "tah_config.json").write_text("{}")
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    LlamaConfig(max_position_embeddings=16, hidden_size=64, num_hidden_layers=1).save_pretrained(tmp_path / "short")
    before = sorted(tmp_path.rglob("*"))
    reference = reference.format(tmp=tmp_path)
    line = one_line(capsys, verb, "tiny", f"label.reference={reference}", "--output", "made")
    assert "label.reference=" in line and all(word in line for word in words), line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reference_that_is_there_is_let_through(tmp_path, tiny_base):
    from tah.pipeline.preflight import check_labelling
    from tah.training.recipe_file import load_recipe

    recipe = load_recipe("tiny", [f"label.reference={tiny_base}", "data.max_length=64"])
    check_labelling(recipe, tmp_path)
    check_labelling(load_recipe("tiny", []), tmp_path)  # trained by the recipe itself


def test_inspect_points_to_themodel_card(capsys, tmp_path, tiny_checkpoint):
    out = said(capsys, "inspect", "follow-tah")[1]
    path = re.search(r"^card +(\S+)$", out, re.MULTILINE)
    assert path and "A Qwen3 of one layer" in Path(path[1]).read_text()
    assert json.loads(said(capsys, "inspect", "follow-tah", "--json")[1])["card"] == path[1]
    assert "card" not in json.loads(said(capsys, "inspect", tiny_checkpoint, "--json")[1])
    shutil.copytree(tiny_checkpoint, tmp_path / "follow-tah")  # a directory comes before the word
    assert "card" not in json.loads(said(capsys, "inspect", "follow-tah", "--json")[1])
    (tmp_path / "follow-tah" / "README.md").write_text("# mine")
    assert json.loads(said(capsys, "inspect", "follow-tah", "--json")[1])["card"] == "follow-tah/README.md"


def test_every_packaged_checkpoint_has_amodel_card():
    from tah_cli.use import model_card

    for name in ("follow-tah", "smollm2-tah"):
        assert Path(model_card(name) or "").is_file()
    assert model_card("smollm2") is None and model_card("nobody/nothing") is None and model_card("../assets") is None


@pytest.mark.skipif(shutil.which("node") is None, reason="node is missing (apt-get install nodejs)")
def test_the_lens_writes_small_probabilities_as_numbers():
    source = (ROOT / "src" / "tah" / "assets" / "token.js").read_text()
    function = re.search(r"(^function small\(.*?^}$|^const small = .*?;$)", source, re.MULTILINE | re.DOTALL)
    cases = {
        1: "1.0000", 0.12345: "0.1235", 0.0001: "0.0001", 0.00007: "0.00007", 0.00003: "0.00003", 2e-6: "0.000002",
        3e-7: "3e-7", 1.2e-38: "1e-38", 0: "<1e-38",
    }  # fmt: skip
    program = f"{function[0]}; console.log(JSON.stringify({json.dumps(list(cases))}.map((p) => small(p))))"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(cases.values())
    program = f"{function[0]}; console.log(small(0, '0.0001'), small(0.0002, '0.0001'))"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert done.stdout == "<0.0001 0.0002\n"


# -- progress --------------------------------------------------------------------------------------------------------


def in_memory(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, markup=False, highlight=False)


def test_work_has_a_line_every_half_minute_and_at_its_end_where_nobody_watches():
    now = [0.0]
    console = in_memory(terminal=False)
    for title, start in (("gsm8k, never", 0), ("gsm8k, decider", 960)):
        with Work(console, title, 1000, "answers", done=start, clock=lambda: now[0]) as work:
            for _ in range(40):
                now[0] += 1.0
                work.advance()
    assert console.file.getvalue().splitlines() == [
        "gsm8k, never: 30 of 1,000 answers, 0:16:10 left",
        "gsm8k, never: 40 of 1,000 answers",
        "gsm8k, decider: 990 of 1,000 answers, 0:00:10 left",
        "gsm8k, decider: 1,000 of 1,000 answers",
    ]


def test_an_evaluation_in_a_log(tmp_path, changed):
    words = ("--tasks", "gsm8k", "--policy", "never,always", "--max-new-tokens", 2, "-o", "out")
    data = questions(tmp_path / "q.jsonl", "2 + 2", "3 + 3")
    process = start("eval", changed(positions=512), *words, "--data", data, stdout=subprocess.PIPE)
    _, err = process.communicate()
    assert process.returncode == 0 and err.splitlines() == [
        f"gsm8k, {policy}: 2 of 2 answers" for policy in ("never", "always")
    ]


@pytest.mark.parametrize("kind", ["work", "texts"])
def test_a_bar_never_says_of_none(kind):
    from rich.progress import Progress, TextColumn

    from tah.progress import Counted

    console = in_memory(terminal=True)
    if kind == "work":
        with Work(console, "gsm8k, never", None, "answers") as work:
            work.bar.refresh()
            work.total = 7
            work.advance(2)
            work.bar.refresh()
    else:
        with Progress(TextColumn("tracing"), Counted("answers"), console=console) as bar:
            task = bar.add_task("", total=None)
            bar.refresh()
            bar.update(task, completed=2, total=7)
            bar.refresh()
    shown = console.file.getvalue()
    assert "None" not in shown and "2 of 7 answers" in shown


# -- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("no such thing"), 2, ["no such thing"]),
        (OSError(28, "No space left on device", "out"), 2, ["No space left on device", "out"]),
        (ImportError("pip install it"), 2, ["pip install it"]),
        (MemoryError("4 GB"), 2, ["out of memory", "smaller batch"]),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, ["out of memory", "--device"]),
        (ValueError("a\nb\n\n  c"), 2, ["a b c"]),
        (ValueError("x" * 12_000), 2, ["xxx", "(--debug shows all of it)"]),
        (ValueError("\x1b[2Jgone\u202e"), 2, ["\\x1b[2Jgone\\u202e"]),
        (ValueError("caf\udce9"), 2, ["caf\\udce9"]),
        (ValueError(""), 2, ["ValueError"]),
        (KeyError("x"), 1, ["unexpected KeyError: 'x'", "(--debug shows where)"]),
        (IndexError("index out of range in self"), 1, ["unexpected IndexError", "(--debug shows where)"]),
        (TypeError("y" * 12_000), 1, ["unexpected TypeError: yyy", "(--debug shows where)"]),
        (RuntimeError("shape\nmismatch"), 1, ["unexpected RuntimeError: shape mismatch"]),
        (RecursionError("maximum recursion depth exceeded"), 1, ["unexpected RecursionError"]),
        (AssertionError(), 1, ["unexpected AssertionError", "(--debug shows where)"]),
        (KeyboardInterrupt(), 130, []),
        (BrokenPipeError(32, "Broken pipe"), 141, []),
    ],
)
def test_whose_fault_it_is(capsys, monkeypatch, tmp_path, tiny_checkpoint, error, code, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Session, "answer", fail)
    got, out, err = said(capsys, "generate", tiny_checkpoint, "hi")
    assert got == code and out == "" and err.count("\n") == bool(words) and len(err) <= 608
    assert all(word in err for word in words) and "Traceback" not in err and "\x1b" not in err
    if words:
        assert err.startswith("tah: ")
        for place in (0, 3):
            arguments = ["generate", str(tiny_checkpoint), "hi"]
            arguments.insert(place, "--debug")
            got, _, err = said(capsys, *arguments)
            assert got == code and err.startswith("Traceback") and "in fail" in err


def test_debug_after_two_dashes_is_a_prompt(capsys, tiny_checkpoint):
    code, out, _ = said(capsys, "generate", tiny_checkpoint, "--json", "--max-new-tokens", 2, "--", "--debug")
    assert code == 0 and json.loads(out)["prompt"] == "--debug"


def start(*arguments, **options) -> subprocess.Popen:
    """The installed command."""
    command = [sys.executable, "-m", "tah_cli", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("closed", ["stdout", "both"])
@pytest.mark.parametrize("words", [("inspect", "{}"), ("generate", "{}", "hi", "--policy", "always"), ("--help",)])
def test_a_reader_that_went_away_is_no_error(tiny_checkpoint, words, closed):
    """As in `tah ... | head -0`, and with stderr in the same pipe."""
    read, write = os.pipe()
    os.close(read)
    words = [word.format(tiny_checkpoint) for word in words]
    command = [sys.executable, "-m", "tah_cli", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    stderr = write if closed == "both" else subprocess.PIPE
    done = subprocess.run(command, env=env, stdout=write, stderr=stderr, check=False)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


def test_ctrl_c_ends_a_command_quietly(tiny_checkpoint):
    # Where the tests run in the background of a shell, they and their children ignore Ctrl-C unless told otherwise.
    heed: Any = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = start("chat", tiny_checkpoint, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **heed)
    while "/help" not in process.stdout.readline():  # it is there and waits for a line
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
