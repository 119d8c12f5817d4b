"""What several tests of traces need."""

import shutil

import pytest
import torch

from helpers.traces import word_tokenizer
from tah import TaHForCausalLM


@pytest.fixture(scope="session")
def words():
    return word_tokenizer()


@pytest.fixture
def checkpoint(tiny_base, tmp_path, monkeypatch):
    """A TaH checkpoint with a decider that is not sure, and a page of text beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = TaHForCausalLM.from_base(str(tiny_base), policy="decider", attention="own", lora_rank=4)
    torch.nn.init.normal_(model.decider.output.weight, std=0.5)
    model.save_pretrained(tmp_path / "model")
    for path in [*tiny_base.glob("*token*"), tiny_base / "chat_template.jinja"]:
        shutil.copy(path, tmp_path / "model")
    (tmp_path / "page.txt").write_text("So the bell rings, but nobody hears it. But the mill is gone. " * 4)
    return tmp_path / "model"
