"""Where a model computes and in which precision, chosen for a machine or by the user."""

from __future__ import annotations

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from helpers.commands import one_line, said
from tah.progress import Reporter
from tah.session import Session
from tah_cli.app import run

pytestmark = pytest.mark.usefixtures("plain")


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
    for name in ("generate", "chat", "doctor", "eval", "trace", "tune", "prune"):
        defaults = {option.name: option.default for option in commands[name].params}
        assert (defaults["device"], defaults["dtype"]) == ("auto", "auto"), name
    for function in (Session.open, Request, Pruning):
        parameters = inspect.signature(function).parameters
        assert (parameters["device"].default, parameters["dtype"].default) == ("auto", "auto")
