"""Messages between processes (one store of torch, for two of them in this process), and training in two processes."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from lm_eval.tasks import TaskManager
from torch.distributed import HashStore, PrefixStore

from helpers.evaluations import ITEMS, Notes
from helpers.models import tah, token_ids
from helpers.processes import ROOT, run, torchrun
from tah import processes
from tah.evaluation import evaluate as evaluation
from tah.evaluation.request import Sampling
from tah.processes import FAILED, OtherProcessFailed, Processes, first_to_fail


@pytest.fixture
def pair(monkeypatch) -> tuple[Processes, Processes]:
    """The first and the second of two processes."""
    store = HashStore()
    monkeypatch.setattr(processes, "_store", store)
    monkeypatch.setattr(processes, "_work", PrefixStore("a", store))
    monkeypatch.setattr(processes, "_begun", 1)
    monkeypatch.setattr(processes, "_first", None)
    monkeypatch.setattr(processes, "GRACE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return Processes(0, 2, PrefixStore("a", store)), Processes(1, 2, PrefixStore("a", store))


def test_settings_of_all_processes_must_be_equal(pair):
    first, second = pair
    first.agree("evaluation", {"weights": "a", "started": 1})
    second.agree("evaluation", {"weights": "a", "started": 2}, without=["started"])
    with pytest.raises(
        ValueError, match=r"^the evaluation differs from that of the first process: weights='a' .here 'b'"
    ):
        second.agree("evaluation", {"weights": "b", "started": 1})


def test_a_failure_stops_every_other_process(pair):
    first, second = pair
    second.tell("done", "7")
    assert first.wait_for("done") == "7" and first.add("answers", 2) == 2 and second.add("answers", 3) == 5
    with pytest.raises(ZeroDivisionError), second:
        _ = 1 / 0
    assert processes._work.add(FAILED, 0) == 1 and first_to_fail()  # asked again: still the first
    for question in (
        lambda: first.wait_for("never"),
        lambda: first.tell("key"),
        lambda: first.add("answers", 1),
        lambda: first.see(lambda: False, "a file"),
    ):
        with pytest.raises(OtherProcessFailed, match="another process failed; its own message gives the reason"):
            question()


def test_the_first_process_to_fail_is_one(pair, monkeypatch):
    assert first_to_fail()
    monkeypatch.setattr(processes, "_first", None)  # as another process
    assert not first_to_fail()
    with pytest.raises(OtherProcessFailed), pair[0]:
        raise OtherProcessFailed
    assert processes._work.add(FAILED, 0) == 2


def test_a_caught_failure_does_not_stop_the_next_piece_of_work(pair):
    with pytest.raises(ZeroDivisionError), Processes.started():
        _ = 1 / 0
    following = Processes.started()
    following.tell("done", "7")
    assert following.wait_for("done") == "7"
    assert first_to_fail()  # control: a failure after `started`, outside of its block, reaches the other process
    with pytest.raises(OtherProcessFailed):
        Processes(1, 2, following._store).wait_for("done")


def test_a_failure_before_a_piece_of_work_stops_it(pair, monkeypatch):
    with Processes.started() as work:
        Processes(1, 2, work._store).add("left", 1)
    assert first_to_fail()
    with pytest.raises(OtherProcessFailed):
        Processes.started().tell("done")


def test_a_file_of_another_machine_that_is_not_shared(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "VISIBLE", 0.2)
    with pytest.raises(ValueError, match="^run.json is not there; all processes must write to the same file system$"):
        pair[1].see((tmp_path / "run.json").is_file, "run.json is not there")
    (tmp_path / "run.json").touch()
    pair[1].see((tmp_path / "run.json").is_file, "run.json is not there")


def test_one_process_needs_no_store():
    alone = Processes.started()
    with alone:
        assert alone.lead and alone.world == 1 and all(alone.owns(number) for number in range(3))
        alone.agree("trace", {})
        alone.tell("done")


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: {target}
{more}
"""
GENERATE = "generation_kwargs: {until: ['{'], max_gen_toks: 16, do_sample: false}"
METRIC = "metric_list:\n  - {metric: %s, aggregation: mean, higher_is_better: true}"


def test_tasks_of_lm_eval_in_two_processes(pair, pupil, tmp_path, monkeypatch):
    """The scores and answers of one process. The first process computes likelihoods alone, which a note reports."""
    questions = [
        {"q": f"how many {at}?", "a": "It is \\boxed" if at % 2 else "none", "right": at % 2} for at in range(5)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "t").mkdir()
    given = {"file": tmp_path / "q.jsonl", "name": "free", "kind": "generate_until", "target": "a"}
    (tmp_path / "t" / "free.yaml").write_text(TASK.format(**given, more=f"{GENERATE}\n{METRIC % 'exact_match'}"))
    given |= {"name": "choose", "kind": "multiple_choice", "target": "right"}
    more = f'doc_to_choice: [" none", "It is"]\n{METRIC % "acc"}'
    (tmp_path / "t" / "choose.yaml").write_text(TASK.format(**given, more=more))

    def build(*_):
        manager = TaskManager(include_path=str(tmp_path / "t"), include_defaults=False)
        tasks = manager.load(["free", "choose"])["tasks"]
        for task in tasks.values():
            task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(1234)
        return {f"lm_eval:{name}": tasks[name] for name in ("free", "choose")}

    monkeypatch.setattr(evaluation, "build", build)

    def go(output: Path, **options):
        names = ["lm_eval:free", "lm_eval:choose"]
        sampling = Sampling(temperature=0.0)
        return evaluation.evaluate(str(pupil), names, output, policies=["never"], sampling=sampling, **options)

    found, notes = [], Notes()
    alone = go(tmp_path / "alone")
    other = threading.Thread(target=lambda: found.append(go(tmp_path / "both", processes=pair[1])))
    other.start()
    found.append(go(tmp_path / "both", processes=pair[0], progress=notes))
    other.join(60)
    without_time = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in run["lm_eval"]] for run in (alone, *found)
    ]
    assert without_time[0] == without_time[1] == without_time[2]
    metrics = [row["metrics"] for row in alone["lm_eval"]]
    assert 0 < metrics[0]["exact_match,none"] < 1 and "acc,none" in metrics[1]
    assert notes.lines == ["lm_eval:choose compares likelihoods, which the first process computes alone"]
    name = "samples/never/lm_eval.free.jsonl"
    lines = [
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / run / name).open()] for run in ("alone", "both")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 5
    assert {path.name for path in (tmp_path / "both" / "samples" / "never").iterdir()} == {
        "lm_eval.free.jsonl",
        "lm_eval.free.json",
        "lm_eval.choose.json",
    }


def test_results_that_appear_late_on_another_machine(pair, pupil, tmp_path, monkeypatch):
    """The second process has to wait for the results of this call, although it can read others."""
    tell, path = pair[0].tell, tmp_path / "run" / "results.json"
    given = {"policies": ["never"], "limit": 1, "data": {"arc_e": ITEMS / "choice.jsonl"}}
    given["sampling"] = Sampling(samples=1, temperature=0.0, max_new_tokens=4)

    def tell_early(key, value=""):
        if key == "results":
            text = path.read_text()
            path.write_text("{}")
            threading.Timer(1.0, path.write_text, [text]).start()
        tell(key, value)

    def go(process):
        found.append(evaluation.evaluate(str(pupil), ["arc_e"], path.parent, processes=process, **given))

    monkeypatch.setattr(pair[0], "tell", tell_early)
    found = []
    other = threading.Thread(target=lambda: go(pair[1]))
    other.start()
    go(pair[0])
    other.join(60)
    assert found[0] == found[1] and found[0]["results"]


# -- the examples -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_of_accelerate_in_two_processes():
    """The script compares its losses and weights with plain PyTorch; it prints those of one process."""
    script = ROOT / "examples" / "hf_accelerate.py"
    one, two = run([sys.executable, str(script)]), torchrun(script)
    assert one.returncode == two.returncode == 0, one.stderr[-1000:] + two.stderr[-2000:]
    assert one.stdout.startswith("1 processes, loss 4.") and two.stdout == one.stdout.replace("1", "2", 1)


def test_deepspeed_of_stage_two_is_configured_and_stage_three_is_refused():
    config = HfDeepSpeedConfig(str(ROOT / "examples" / "deepspeed_zero2.json"))
    assert config.is_zero2() and not config.is_zero3()
    model, ids = tah().train(), token_ids()
    assert model(ids, labels=ids).loss.isfinite()
    model.get_output_embeddings().weight.ds_id = 0  # as ZeRO-3 marks the weights that it has divided
    with pytest.raises(ValueError, match="^training under ZeRO-3 is not supported; use FSDP2 or ZeRO-2$"):
        model(ids, labels=ids)
