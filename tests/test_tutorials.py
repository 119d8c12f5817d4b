"""The notebooks run from start to end, and their stored outputs are there."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
TRAINING = {"own-data", "train"}  # these notebooks train, for minutes
TIMED = [pytest.param(path, marks=pytest.mark.slow) if path.stem in TRAINING else path for path in NOTEBOOKS]
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|opt|usr|var|mnt|data|workspace)/[^\s\"'<>]*")


def execute(path: Path, directory: Path, environment: dict[str, str]) -> None:
    """Run every cell with the Python of the tests; an error in one raises."""
    kernels = directory / "jupyter" / "kernels" / "here"
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "here", "language": "python"}))
    work = directory / "work"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("JUPYTER_PATH", str(directory / "jupyter"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(directory / "runtime"))
        patch.setenv("IPYTHONDIR", str(directory / "ipython"))
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(work)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="here", resources=resources).execute()


@pytest.fixture
def environment(smollm2):
    """Variables of the kernel: the bundled checkpoints, this checkout's tah, one thread, no network."""
    return {
        "TAH_CACHE": str(smollm2.parent),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", TIMED, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path, tmp_path, environment):
    execute(path, tmp_path, environment)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_its_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    # All cells ran once, in order.
    assert cells and [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "run all cells in order"
    )
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "a picture comes from a cell"
    words = json.dumps([{k: v for k, v in output.get("data", {}).items() if k != "image/png"} for output in outputs])
    words += "".join(output.get("text", "") for output in outputs)
    assert not (found := MACHINE_PATH.findall(words)), found


def test_an_error_in_a_cell_is_found(tmp_path):
    """Control."""
    path = tmp_path / "wrong.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        execute(path, tmp_path, {})


def test_machine_paths_are_found():
    """Control."""
    assert MACHINE_PATH.findall("saved in /tmp/x/model and '/home/me/run'") == ["/tmp/x/model", "/home/me/run"]
    assert not MACHINE_PATH.findall("https://a.example/home/x runs/tmp/x ../data/rows.jsonl and/or")
