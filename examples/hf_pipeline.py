"""Load a TaH checkpoint where nothing imports tah: `pipeline` of transformers, and `lm_eval --model hf`.

The script compares their results with those of `TaHForCausalLM`. It needs the extra `eval`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tah import TaHForCausalLM
from tah.load import FOLLOW  # the bundled checkpoint follow-tah, 75,617 parameters

PIPELINE = """
import json, sys
from transformers import pipeline
assert "tah" not in sys.modules
made = pipeline("text-generation", "model", trust_remote_code=True)
print(made(json.loads(sys.argv[1]), max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]["content"])
"""
lines = map(json.loads, (FOLLOW / "problems.jsonl").read_text().splitlines())
chat = next(line["messages"] for line in lines if line["arrows"] == 2)  # the base alone cannot answer it
model, tokenizer = TaHForCausalLM.from_pretrained(FOLLOW), AutoTokenizer.from_pretrained(FOLLOW)
inputs = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
length, prompt = inputs["input_ids"].shape[1], tokenizer.decode(inputs["input_ids"][0])
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0, length:], skip_special_tokens=True)
ids = tokenizer(prompt + chat[1]["content"], return_tensors="pt")["input_ids"]
scores = {}
for policy in ("decider", "never"):
    with torch.no_grad():
        logits = model(ids, policy=policy).logits[0, length - 1 : -1]
    scores[policy] = logits.log_softmax(-1).gather(1, ids[0, length:, None]).sum().item()

with tempfile.TemporaryDirectory() as place:
    model.save_pretrained(f"{place}/model", auto_map=True)
    tokenizer.save_pretrained(f"{place}/model")  # with the chat template
    task = {"task": "arrows", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood"}
    task |= {"dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "target_delimiter": ""}
    task |= {"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    Path(place, "arrows.yaml").write_text(json.dumps(task))  # JSON is YAML
    Path(place, "rows.jsonl").write_text(json.dumps({"prompt": prompt, "answer": chat[1]["content"]}) + "\n")
    settings = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{place}/data"}
    options = {"cwd": place, "env": settings, "check": True, "text": True, "stdout": subprocess.PIPE}
    piped = subprocess.run([sys.executable, "-c", PIPELINE, json.dumps(chat[:1])], **options).stdout.strip()
    command = "--model hf --model_args pretrained=model,trust_remote_code=True --device cpu --tasks arrows"
    command += " --include_path . --log_samples --output_path out"
    subprocess.run([sys.executable, "-m", "lm_eval", *command.split()], **options)
    (samples,) = Path(place, "out").rglob("samples_*.jsonl")
    harness = float(json.loads(samples.read_text())["resps"][0][0][0])

print(f"answer: pipeline {piped!r}, TaHForCausalLM {text!r}")
print(f"log-likelihood: lm_eval {harness:.5f}, TaHForCausalLM {scores['decider']:.5f}, base {scores['never']:.5f}")
if piped != text or abs(harness - scores["decider"]) > 1e-3 or abs(harness - scores["never"]) < 1e-3:
    sys.exit("the libraries do not compute what TaHForCausalLM computes")
