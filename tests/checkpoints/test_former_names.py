"""Files from before 0.2, with the former names of fields and tensors, load as they were (tests/golden/before)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.originals import GOLDEN
from tah import TaHForCausalLM, convert, load_adapter
from tah.checkpoints.contents import weights_fingerprint
from tah.checkpoints.smollm2 import TAH
from tah.load import FOLLOW, load_tah
from tah_cli.app import run

BEFORE = GOLDEN / "before"
FORMER = {"reembed", "combine"}
LOADERS = [TaHForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, load_tah]


def check_answers(model: TaHForCausalLM) -> None:
    expected, ids = load_file(BEFORE / "expected.safetensors"), torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        found = model.eval()(ids)
        torch.testing.assert_close(found.logits, expected["logits"])
        assert torch.equal(found.depth_count, expected["depth_count"])
        torch.testing.assert_close(model(ids, policy="always").logits, expected["always"])


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("saved", ["maps", "maps_sharded"])
def test_a_checkpoint_with_both_maps(load: Any, saved: str, tmp_path: Path) -> None:
    assert json.loads((BEFORE / saved / "config.json").read_text()).keys() >= FORMER
    model = load(str(BEFORE / saved))
    assert (model.config.next_input, model.config.output) == ("hidden", "zero_init")
    check_answers(model)
    model.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text()).keys() & FORMER
    assert {"next_input_map.weight", "output_map.weight"} <= load_file(tmp_path / "model.safetensors").keys()
    check_answers(load(str(tmp_path)))


def test_a_tensor_that_is_missing_or_too_much_under_a_former_name(tmp_path: Path) -> None:
    tensors = load_file(BEFORE / "maps" / "model.safetensors")
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != "reembed_map.weight"},
        tensors | {"combine_map.bias": torch.ones(8)},
        tensors | {"combine_map.weight": torch.ones(8, 7)},
    ):
        shutil.copytree(BEFORE / "maps", tmp_path, dirs_exist_ok=True)
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="tensors (reembed|combine|next_input|output)_map"):
            load_tah(str(tmp_path))


def test_an_adapter_with_both_maps() -> None:
    config = AutoConfig.from_pretrained(BEFORE / "maps").base_config
    base = AutoModelForCausalLM.from_config(config)
    whole = load_file(BEFORE / "maps" / "model.safetensors")
    own = {name.removeprefix("base."): tensor for name, tensor in whole.items() if name.startswith("base.")}
    base.load_state_dict({name: tensor for name, tensor in own.items() if ".lora_" not in name}, strict=False)
    model = load_adapter(base, BEFORE / "additions")
    assert (model.config.next_input, model.config.output) == ("hidden", "zero_init")
    state = model.state_dict()
    for former, name in (("reembed_map", "next_input_map"), ("combine_map", "output_map"), ("decider", "decider")):
        for tensor in (name for name in whole if name.startswith(former)):
            saved = whole[tensor].bfloat16().float()  # as adapters are saved
            assert torch.equal(state[tensor.replace(former, name)], saved)


def test_the_hashes_of_weights_are_those_of_before() -> None:
    """Labels, traces and evaluations hold the first one, and are continued only with the same; adapters the second."""
    model = load_tah(str(BEFORE / "maps"))
    assert weights_fingerprint(model) == "1bb7634b61f4b2edd8b6ed1e63a57c56"
    saved = json.loads((BEFORE / "additions" / "additions.json").read_text())["base"]["weights"]
    assert weights_fingerprint(model.base, of_base=True) == saved
    assert weights_fingerprint(model.base.bfloat16(), of_base=True) == saved


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["S", "L"])
def test_a_converted_checkpoint(load: Any, name: str, tmp_path: Path) -> None:
    convert(GOLDEN / name / "ckpt", tmp_path)
    wanted = TaHForCausalLM.from_pretrained(tmp_path)
    shutil.copy(BEFORE / name / "config.json", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys() >= FORMER
    model, ids = load(str(tmp_path)), torch.arange(1, 25).view(2, 12)
    assert model.config.to_dict() == wanted.config.to_dict()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted(ids).logits)


def test_what_is_in_the_box(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both were saved under the former names, and are read as such by every command."""
    for file in (FOLLOW / "config.json", TAH / "additions.json"):
        assert json.loads(file.read_text()).keys() >= FORMER
    assert {"reembed_map.weight", "combine_map.weight"} <= load_file(TAH / "additions.safetensors").keys()
    for name, seams in (("follow-tah", ("topk", "sum")), ("smollm2-tah", ("hidden", "zero_init"))):
        assert run(["inspect", name, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["method"]
        assert found["next_input"] == seams[0] and found["output"] == seams[1], name
    loaded = load_tah(str(FOLLOW))
    assert (loaded.config.next_input, loaded.config.output) == ("topk", "sum")
