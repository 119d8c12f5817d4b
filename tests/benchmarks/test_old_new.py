"""The comparison of two source trees runs, alternates and computes ratios. No time is compared with anything."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tah import TaHForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("old_new", ROOT / "benchmark" / "old_new.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.slow
def test_two_trees(script, tiny_base, tmp_path, capsys):
    """The same tree twice; the order of the processes is swapped in the second round."""
    src, output = ROOT / "src", tmp_path / "out.json"
    sizes = ["--rounds", "2", "--repeats", "1", "--threads", "1", "--model", str(tiny_base)]
    script.main([str(src), str(src), *sizes, "--output", str(output)])
    out, err = capsys.readouterr()
    assert [line.rpartition(", ")[2] for line in err.splitlines()] == ["old", "new", "new", "old"]
    result = json.loads(output.read_text())
    assert script.markdown(result["rows"]) + "\n" == out and len(out.splitlines()) == 2 + 7
    for row in result["rows"]:
        ratios = [took["new"][row["task"]] / took["old"][row["task"]] for took in result["rounds"]]
        assert row["ratio"] == pytest.approx(sum(ratios) / 2) and row["lowest"] == min(ratios) > 0


def test_the_forced_policy_iterates_on_its_share(script, tiny_base):
    model = TaHForCausalLM.from_base(str(tiny_base))
    ids = torch.randint(3, 90, (2, 28))
    counts = model(ids, policy=script.Forced(model, 2, (14, 14))).depth_count
    assert (counts[:, :14] == 2).sum(1).tolist() == (counts[:, 14:] == 2).sum(1).tolist() == [1, 1]


def test_a_tree_without_the_package_is_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), str(ROOT / "src")])
    assert f"{tmp_path} has no directory tah" in capsys.readouterr().err
