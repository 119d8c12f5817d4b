"""`tah inspect` points to the card of a packaged checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from helpers.commands import said

pytestmark = pytest.mark.usefixtures("plain")


def test_inspect_points_to_the_card(capsys, tmp_path, tiny_checkpoint):
    out = said(capsys, "inspect", "follow-tah")[1]
    path = re.search(r"^card +(\S+)$", out, re.MULTILINE)
    assert path and "A Qwen3 of one layer" in Path(path[1]).read_text()
    assert json.loads(said(capsys, "inspect", "follow-tah", "--json")[1])["card"] == path[1]
    shutil.copytree(tiny_checkpoint, tmp_path / "follow-tah")  # a directory comes before the word
    (tmp_path / "follow-tah" / "README.md").unlink()
    assert "card" not in json.loads(said(capsys, "inspect", "follow-tah", "--json")[1])
    (tmp_path / "follow-tah" / "README.md").write_text("# mine")
    assert json.loads(said(capsys, "inspect", "follow-tah", "--json")[1])["card"] == "follow-tah/README.md"


def test_every_packaged_checkpoint_has_a_card():
    from tah_cli.use import model_card

    for name in ("follow-tah", "smollm2-tah"):
        assert Path(model_card(name) or "").is_file()
    assert model_card("smollm2") is None and model_card("nobody/nothing") is None and model_card("../assets") is None
