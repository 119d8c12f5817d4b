"""Fixtures that more than one test module uses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.models import CHAT_TEMPLATE
from tah.checkpoints.smollm2 import converted_dir, is_complete, smollm2_base


def pytest_configure(config: pytest.Config) -> None:
    """Without the tests that need one, a machine's GPU is not there: `auto` would compute on it what a test compares
    with the CPU's numbers."""
    if "not gpu" in (config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if find_spec("hypothesis") is not None:  # the environment for serving has none
        from hypothesis import settings

        # The same examples in every run, so that a change is judged by itself; `make test-slow` looks for new ones.
        settings.register_profile("same", derandomize=True)
        settings.load_profile("same")


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """Directory of SmolLM2-135M-Instruct, really converted: by the user before, or else once for this checkout.

    Several xdist workers may ask at the same time; the lock inside `smollm2_base` lets one of them convert.
    """
    kept = pytestconfig.cache.mkdir("tah")
    with pytest.MonkeyPatch.context() as patch:
        if not is_complete(converted_dir("float32")):
            patch.setenv("TAH_CACHE", str(kept))
        return smollm2_base()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama of 64 positions, with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: at for at, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    directory = tmp_path_factory.mktemp("tiny") / "base"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(special + alphabet),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # answers that are not all alike
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_base: Path) -> Path:
    """Directory of a TaH checkpoint of `tiny_base` that iterates on some tokens."""
    from tah import TaHForCausalLM

    model = TaHForCausalLM.from_base(str(tiny_base), policy="confidence", threshold=0.5, lora_rank=4)
    directory = tiny_base.with_name("tah")
    model.save_pretrained(directory)
    for path in tiny_base.glob("*token*"):
        shutil.copy(path, directory)
    shutil.copy(tiny_base / "chat_template.jinja", directory)
    return directory


@pytest.fixture(scope="session")
def pupil(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that has learned to answer 29 to whatever it is asked."""
    import torch

    from helpers.evaluations import ITEMS, LONG
    from tah.session import Session

    directory = tmp_path_factory.mktemp("eval") / "pupil"
    shutil.copytree(tiny_base, directory)
    config = json.loads((directory / "config.json").read_text()) | LONG
    (directory / "config.json").write_text(json.dumps(config))
    session = Session.open(str(directory))
    base, tokenizer = session.model.base, session.tokenizer
    asked = [json.loads(line)["question"] for line in (ITEMS / "math.jsonl").read_text().splitlines()]
    answer = tokenizer("It is \\boxed{29}<|im_end|>", add_special_tokens=False)["input_ids"]
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    base.train()
    for step in range(80):
        prompt = session.encode([{"role": "user", "content": asked[step % len(asked)][-(20 + step) :]}])
        ids = torch.tensor([prompt + answer])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        base(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    base.eval().save_pretrained(directory)
    return directory


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no colours, and a working directory of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TAH_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def changed(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """`changed(template=..., more=..., positions=...)`: a copy of the tiny base with another chat template, with tokens
    that have no embedding, or with more positions."""
    from transformers import PreTrainedTokenizerFast

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
