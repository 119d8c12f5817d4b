"""`tah eval --backend vllm` gives the answers, depths and counts of `generate`, policy by policy; resumed too."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")
pytest.importorskip("lm_eval", reason="evaluation needs lm-eval: pip install 'tah[eval]'")

from vllm.distributed import cleanup_dist_env_and_memory

from helpers.checkpoints import TAH2, tiny, tiny_base, tokenizer
from helpers.evaluations import Notes
from tah.evaluation.eval_files import Asked
from tah.evaluation.evaluate import evaluate
from tah.evaluation.harness import TaHLM
from tah.evaluation.request import Sampling
from tah.evaluation.vllm_backend import ServedLM
from tah.session import Session
from tah_cli.app import run

ITEMS = Path(__file__).parents[1] / "evaluation" / "items"
DATA = {"gsm8k": ITEMS / "math.jsonl", "arc_e": ITEMS / "choice.jsonl"}
SMALL = {"enforce_eager": True, "gpu_memory_utilization": 0.05, "block_size": 32}
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
DRAWN = Sampling(samples=2, max_new_tokens=24, temperature=0.9)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny(tmp_path_factory.mktemp("eval") / "llama", "llama"))


@pytest.fixture(autouse=True)
def one_engine_at_a_time():
    yield
    gc.collect()
    cleanup_dist_env_and_memory()


def go(model: str, output: Path, backend: str, **options) -> dict:
    given = {"policies": ["never", "decider", "always"], "sampling": GREEDY, "data": DATA, "batch_size": 4}
    given |= {"engine": SMALL} if backend == "vllm" else {}
    return evaluate(model, list(DATA), output, backend=backend, dtype="float32", **given | options)


def lines_of(directory: Path) -> dict[str, list[dict]]:
    """All answers but the time they took, in the order of the questions."""
    found = {}
    for path in sorted((directory / "samples").rglob("*.jsonl")):
        lines = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
        found[str(path.relative_to(directory))] = sorted(lines, key=lambda line: (line["number"], line["sample"]))
    return found


def test_greedy_answers_are_those_of_generate(model, tmp_path):
    """Three policies through one engine: texts, lengths, depths, passes and verdicts."""
    plain, served = go(model, tmp_path / "plain", "transformers"), go(model, tmp_path / "served", "vllm")
    assert lines_of(tmp_path / "served") == lines_of(tmp_path / "plain")
    names = ("policy", "task", "accuracy", "unparsed", "cut_off", "mean_depth", "iterated_share", "tokens", "cost")
    for one, other in zip(plain["results"], served["results"], strict=True):
        assert [one[name] for name in names] == [other[name] for name in names] and other["seconds"] > 0
    depths = [row["mean_depth"] for row in served["results"] if row["task"] == "gsm8k"]
    assert depths[0] == 1 < depths[1] < depths[2] == 2
    assert served["backend"] == "vllm" and "vllm" in served["versions"]
    with pytest.raises(ValueError, match="backend='vllm' .now 'transformers'."):
        go(model, tmp_path / "served", "transformers")


def test_answers_of_tah2_are_those_of_generate(tmp_path):
    model, options = str(tiny(tmp_path / "model", "qwen3", **TAH2)), {"policies": ["decider"], "limit": 3}
    plain = go(model, tmp_path / "plain", "transformers", **options)
    go(model, tmp_path / "served", "vllm", **options)
    assert lines_of(tmp_path / "served") == lines_of(tmp_path / "plain")
    assert plain["results"][0]["iterated_share"] > 0


def test_stop_strings_have_their_depths(model):
    """vLLM finds them outside of its engine."""
    prompts = ["one", "a much longer question than the others " * 3, "two words", "why?"]
    options = {"until": [], "max_gen_toks": 24, "do_sample": False}
    session = Session.open(model, dtype="float32")
    plain = TaHLM(session, batch_size=4)
    free = plain.answer_batch([Asked("t", at, 0, prompt, options) for at, prompt in enumerate(prompts)])
    stop = next(letter for letter in free[2].text[4:] if letter.isascii() and letter.isprintable())
    asked = [Asked("t", at, 0, prompt, options | {"until": [stop]}) for at, prompt in enumerate(prompts)]
    want = plain.answer_batch(asked)
    assert want[2].finished and want[2].tokens < 24 and sum(answer.iterated for answer in want) > 0
    got = ServedLM(session, engine=SMALL).answer_batch(asked)
    names = ("text", "prompt_tokens", "tokens", "finished", "depths", "iterated", "passes")
    assert [[getattr(one, name) for name in names] for one in got] == [
        [getattr(one, name) for name in names] for one in want
    ]
    assert session.model.device.type == "meta"  # one copy of the weights, vLLM's


def test_drawn_answers_resumed_equal_uninterrupted(model, tmp_path):
    """Drawn with a seed for each sample; killed in the middle of a line, with answers of other questions missing."""
    whole = go(model, tmp_path / "whole", "vllm", sampling=DRAWN, policies=["decider"])
    lines = lines_of(tmp_path / "whole")
    by_question = [line["text"] for line in lines["samples/decider/gsm8k.jsonl"]]
    assert len(set(by_question)) == len(by_question)  # samples differ
    go(model, tmp_path / "cut", "vllm", sampling=DRAWN, policies=["decider"], limit=None)
    path = tmp_path / "cut" / "samples" / "decider" / "gsm8k.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[3:6]).replace('"verdict":"wrong"', '"verdict":null') + kept[7][:90])
    progress = Notes()
    again = go(model, tmp_path / "cut", "vllm", sampling=DRAWN, policies=["decider"], progress=progress)
    assert progress.lines == [f"{path}: the last line is incomplete, so its question is answered again"]
    assert lines_of(tmp_path / "cut") == lines
    for one, other in zip(whole["results"], again["results"], strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_what_vllm_cannot_do(model, tmp_path, capsys):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    words = ["--tasks", "gsm8k", "--data", f"gsm8k={DATA['gsm8k']}", "--backend", "vllm", "-o", str(tmp_path / "run")]
    biased = shutil.copytree(model, tmp_path / "biased")
    (biased / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "num_beams": 1, "no_repeat_ngram_size": 3})
    )
    for asked, more, message in (
        (str(biased), [], "has no_repeat_ngram_size=3, which is not passed to vLLM; remove the entry, or use"),
        (
            model,
            ["--policy", "never,oracle", "--reference", model],
            "policy oracle runs a reference model on every token",
        ),
        (model, ["--device", "cuda"], "device 'cuda': vLLM uses the device it was built for"),
        (str(tmp_path / "base"), ["--max-new-tokens", "8"], "is a base model; --backend vllm needs a TaH"),
    ):
        assert run(["eval", asked, *words, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_the_engine_refuses(model, tmp_path):
    """In one line, though vLLM says it in a page."""
    gemma = str(tiny(tmp_path / "gemma", "gemma"))
    with pytest.raises(ValueError, match=r"^tah serves bases of the families .*; this one is 'gemma'$"):
        go(gemma, tmp_path / "run", "vllm")
    deep = str(shutil.copytree(model, tmp_path / "deep"))
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    (tmp_path / "deep" / "config.json").write_text(json.dumps(config | {"max_depth": 3}))
    with pytest.raises(ValueError, match="^max_depth=3: vLLM serves at most 2; give --max-depth 2$"):
        go(deep, tmp_path / "run", "vllm")
    with pytest.raises(ValueError, match="^vLLM's cache has room for 64 tokens, but a question with its answer"):
        go(model, tmp_path / "run", "vllm", engine=SMALL | {"max_model_len": 64})
    assert not (tmp_path / "run").exists()
    go(deep, tmp_path / "run", "vllm", max_depth=2, policies=["always"], limit=1)
    go(deep, tmp_path / "plain", "transformers", max_depth=2, policies=["always"], limit=1)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "plain")
