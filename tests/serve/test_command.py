"""`tah serve` says in one line what it cannot serve. Needs no vLLM."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from helpers.checkpoints import tiny_base
from tah_cli.app import run


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm(capsys):
    assert run(["serve", "anything"]) == 2
    assert "serving needs vLLM" in (said := capsys.readouterr().err) and "pip install 'tah[serve]'" in said


def test_models_that_are_no_tah_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["tah_cli.serve"], "find_spec", lambda name: True)
    tiny_base("llama").save_pretrained(tmp_path / "base")
    assert run(["serve", str(tmp_path / "base"), "--port", "1"]) == 2
    assert "is a base model, which vLLM serves without tah" in capsys.readouterr().err
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tah_config.json").write_text("{}")
    assert run(["serve", str(tmp_path / "original")]) == 2
    assert "max_iter is None" in capsys.readouterr().err
