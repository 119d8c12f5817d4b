"""The reference is looked for before a run makes anything."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from helpers.commands import one_line

pytestmark = pytest.mark.usefixtures("plain")


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
    line = one_line(capsys, verb, "tiny-paper", f"label.reference={reference}", "--output", "made")
    assert "label.reference=" in line and all(word in line for word in words), line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reference_that_is_there_is_let_through(tmp_path, tiny_base):
    from tah.pipeline.preflight import check_labelling
    from tah.training.recipe_file import load_recipe

    recipe = load_recipe("tiny-paper", [f"label.reference={tiny_base}", "data.max_length=64"])
    check_labelling(recipe, tmp_path)
    check_labelling(load_recipe("tiny-paper", []), tmp_path)  # trained by the recipe itself
