"""A checkpoint with `auto_map`: other libraries load it in a process that has not imported tah, and tah ignores it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import ROOT, said
from tah import TaHConfig, TaHForCausalLM
from tah.checkpoints.publish import AUTO_MAP, MODULE, SOURCE

PROMPT = "What is 12 + 7?"
TEXT = "What is 12 + 7? It is 19."
# The libraries are imported once. Each case then runs in a fork of that process, in which nothing has imported tah.
CASES = """
import json, os, sys, traceback
from pathlib import Path
import torch, lm_eval, lm_eval.models.huggingface, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

PLAIN, MAPPED, OUT, PROMPT, TEXT = json.loads(sys.argv[1])
torch.set_num_threads(1)

def inputs():
    return AutoTokenizer.from_pretrained(MAPPED)(TEXT, return_tensors="pt")["input_ids"]

def auto():
    ids = inputs()  # the tokenizer needs no code
    assert "tah" not in sys.modules
    model = AutoModelForCausalLM.from_pretrained(MAPPED, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(OUT + "/again")  # after a load with code, transformers copies source files of custom classes
    model.save_pretrained(OUT + "/mapped", auto_map=True)
    model.save_pretrained(OUT + "/plain", auto_map=False)
    return {"class": str(type(model)), "logits": logits.tolist(), "tah": sys.modules["tah"].__file__}

def pipe():
    made = pipeline("text-generation", MAPPED, trust_remote_code=True)
    return made(PROMPT, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]

def sft():
    import datasets, trl
    rows = datasets.Dataset.from_list([{"text": TEXT}] * 2)
    options = trl.SFTConfig(OUT + "/sft", model_init_kwargs={"trust_remote_code": True}, max_steps=1, report_to=[],
        use_cpu=True, learning_rate=0.0, per_device_train_batch_size=2, logging_steps=1, bf16=False, max_length=64)
    trainer = trl.SFTTrainer(MAPPED, args=options, train_dataset=rows)
    trainer.train()
    return trainer.state.log_history[0]["loss"]

def harness():
    task = {"task": "copy", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": OUT + "/rows.jsonl"}},
        "output_type": "loglikelihood", "test_split": "test", "doc_to_text": "{{a}}", "doc_to_target": "{{b}}",
        "target_delimiter": "", "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}]}
    Path(OUT, "copy.yaml").write_text(json.dumps(task))
    sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={MAPPED},trust_remote_code=True",
        "--tasks", "copy", "--include_path", OUT, "--device", "cpu", "--batch_size", "1", "--log_samples",
        "--output_path", OUT + "/lm_eval"]
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
    (path,) = Path(OUT, "lm_eval").rglob("samples_copy_*.jsonl")
    return float(json.loads(path.read_text().splitlines()[0])["resps"][0][0][0])

def missing():
    sys.modules["tah"] = None  # as where it is not installed
    AutoModelForCausalLM.from_pretrained(MAPPED, trust_remote_code=True)

def control():
    AutoModelForCausalLM.from_pretrained(PLAIN, trust_remote_code=True)

for case in (auto, pipe, sft, harness, missing, control):
    if (child := os.fork()) == 0:
        try:
            assert "tah" not in sys.modules
            found = {"value": case()}
        except BaseException as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        Path(OUT, case.__name__ + ".json").write_text(json.dumps(found))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def places(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint without and one with `auto_map`, both with a tokenizer, and a directory for results."""
    place = tmp_path_factory.mktemp("auto")
    mapped, out = place / "mapped", place / "out"
    torch.manual_seed(1)
    model = TaHForCausalLM.from_pretrained(tiny_checkpoint)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # so that a second pass counts
    for directory, auto_map in ((place / "plain", False), (mapped, True)):
        model.save_pretrained(directory, auto_map=auto_map)
        AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(directory)
    out.mkdir()
    (out / "rows.jsonl").write_text(json.dumps({"a": PROMPT, "b": TEXT.removeprefix(PROMPT)}) + "\n")
    return place / "plain", mapped, out


@pytest.fixture(scope="module")
def found(places: tuple[Path, Path, Path]) -> dict[str, dict]:
    """What each library found in a fresh process."""
    for package in ("trl", "lm_eval"):
        pytest.importorskip(package)
    arguments = json.dumps([*map(str, places), PROMPT, TEXT])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_MODULES_CACHE": str(places[2] / "modules"),
        "HF_DATASETS_CACHE": str(places[2] / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CASES, arguments],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        cwd=places[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stderr[-6000:])
    return {path.stem: json.loads(path.read_text()) for path in places[2].glob("*.json")}


def test_fresh_process(found, places):
    """The Auto classes, `pipeline`, TRL and lm-eval load the checkpoint, and compute what `TaHForCausalLM` computes."""
    plain, _, _ = places
    model, tokenizer = TaHForCausalLM.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model(ids, labels=ids)
        base = model(ids, policy="never").logits
    auto = found["auto"]["value"]
    assert auto["class"] == str(TaHForCausalLM) and auto["tah"] == str(ROOT / "src" / "tah" / "__init__.py")
    torch.testing.assert_close(torch.tensor(auto["logits"]), out.logits)
    assert (out.logits - base).abs().max() > 0.1 and 0 < (out.depth_count > 1).sum()  # else a plain base would pass
    prompt = tokenizer(PROMPT, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert found["pipe"]["value"] == tokenizer.decode(answer, skip_special_tokens=True)
    ended = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)  # TRL adds the end of the text
    with torch.no_grad():
        assert abs(found["sft"]["value"] - model(ended, labels=ended).loss.item()) < 1e-4
        scores = out.logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert abs(found["harness"]["value"] - scores[len(tokenizer(PROMPT)["input_ids"]) - 1 :].sum().item()) < 1e-3


def test_without_the_package_the_error_is_one_clear_line(found):
    error = found["missing"]["error"]
    assert error.startswith("ImportError: this checkpoint needs the Python package tah") and "\n" not in error
    assert "does not recognize this architecture" in found["control"]["error"]  # the entry is what makes it load


def test_a_model_that_was_loaded_with_code_is_saved_as_usual(found, places):
    out = places[2]
    assert "value" in found["auto"]
    usual = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (out / "plain").iterdir()) == usual
    assert "auto_map" not in json.loads((out / "plain" / "config.json").read_text())
    for place in ("again", "mapped"):  # a trainer that loads and saves the checkpoint keeps the entry
        assert sorted(path.name for path in (out / place).iterdir()) == sorted([*usual, MODULE])
        assert json.loads((out / place / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert (out / place / MODULE).read_text() == SOURCE
        assert "trust_remote_code=True" in (out / place / "README.md").read_text()


def test_the_entry_is_off_by_default_and_stays_until_it_is_removed(places, tmp_path):
    plain, mapped, _ = places
    assert not (plain / MODULE).exists() and "auto_map" not in (plain / "config.json").read_text()
    lines = set((mapped / "config.json").read_text().splitlines()) - set(
        (plain / "config.json").read_text().splitlines()
    )
    assert all("modeling_tah" in line or "auto_map" in line for line in lines) and lines
    model = TaHForCausalLM.from_pretrained(mapped)
    model.save_pretrained(tmp_path / "kept")
    assert (tmp_path / "kept" / "config.json").read_text() == (mapped / "config.json").read_text()
    assert (tmp_path / "kept" / MODULE).read_text() == SOURCE
    model.save_pretrained(tmp_path / "removed", auto_map=False)
    assert (tmp_path / "removed" / "config.json").read_text() == (plain / "config.json").read_text()
    model.config.auto_map = {key: value.replace("TaH", "Other") for key, value in AUTO_MAP.items()}
    model.save_pretrained(tmp_path / "other")  # an entry of another model is none of ours
    assert "auto_map" not in (tmp_path / "other" / "config.json").read_text()


def test_our_loaders_run_no_code(places, tmp_path, capsys):
    """Our classes and commands load the checkpoint as without the entry, even if the caller trusts code."""
    evil = tmp_path / "evil"
    shutil.copytree(places[1], evil)
    mark = tmp_path / "ran"
    (evil / MODULE).write_text(f"open({str(mark)!r}, 'w').close()\nfrom tah import TaHConfig, TaHForCausalLM\n")
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        TaHForCausalLM.from_pretrained(evil, **options)
        AutoModelForCausalLM.from_pretrained(evil, **options)
    assert isinstance(TaHConfig.from_pretrained(evil), TaHConfig)
    assert said(capsys, "inspect", evil)[0] == said(capsys, "generate", evil, "Hi", "--max-new-tokens", "2")[0] == 0
    assert not mark.exists()
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    script = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(evil)!r}, trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert mark.exists()  # the control: the code does run where the caller asks transformers for it


@pytest.mark.slow
def test_the_example_runs():
    """It exits with an error if `pipeline` or lm-eval computes something else."""
    pytest.importorskip("lm_eval")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "hf_pipeline.py")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("answer: pipeline 'the value is Answer: ")
