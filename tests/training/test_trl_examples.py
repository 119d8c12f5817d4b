"""The examples of TRL's trainers run, and each compares a number with a path of its own."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = [pytest.mark.grad, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    "name, printed",
    [
        ("hf_trl_sft", "loss of TRL's trainer"),
        ("hf_trl_dpo", "loss of TRL's trainer"),
        ("hf_trl_grpo", "importance ratios differ from 1 by at most"),
        pytest.param("hf_trl_depth", "with the decisions that were learned", marks=pytest.mark.slow),
    ],
)
def test_example(name, printed, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert printed in capsys.readouterr().out
