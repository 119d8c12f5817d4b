"""The commands know a TaH2 model: what they print, write and choose is what the model computes."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.models import middle
from tah import TaHForCausalLM
from tah.session import Session
from tah_cli.app import run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_base):
    """A TaH2 model of three passes around the tiny base, whose decider goes both ways."""
    directory = tmp_path_factory.mktemp("tah2") / "model"
    settings = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0, "max_depth": 3}
    torch.manual_seed(1)  # of the networks: the random state of earlier tests does not count
    base = AutoModelForCausalLM.from_pretrained(tiny_base, max_position_embeddings=256)  # room for a question
    model = TaHForCausalLM.from_base(base, **settings)
    with torch.no_grad():
        model.decider.score.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        model.config.threshold = middle(model(torch.arange(40, 80)[None]).continue_prob[:, :, 0])
    model.save_pretrained(directory)
    for path in tiny_base.glob("*token*"):
        shutil.copy(path, directory)
    shutil.copy(tiny_base / "chat_template.jinja", directory)
    return directory


def works(capsys, *arguments):
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_generate_writes_the_weights_of_the_passes(capsys, checkpoint, tiny_checkpoint):
    got = json.loads(works(capsys, "generate", checkpoint, "hi there", "--max-new-tokens", 12, "--json"))
    session = Session.open(str(checkpoint))
    ids = torch.tensor([session.encode([{"role": "user", "content": "hi there"}])])
    want = session.model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    at = slice(ids.shape[1] - 1, -1)
    assert [token["id"] for token in got["tokens"]] == want.sequences[0, ids.shape[1] :].tolist()
    depths = [token["depth"] for token in got["tokens"]]
    assert depths == want.depth_count[0, at].tolist() and len(set(depths)) > 1
    for token, weights in zip(got["tokens"], want.mixture_weights[0, at].tolist(), strict=True):
        assert token["weights"] == pytest.approx(weights[: token["depth"]])
        assert sum(token["weights"]) == pytest.approx(1, abs=1e-5)
    sums = json.loads(works(capsys, "generate", tiny_checkpoint, "hi", "--max-new-tokens", 2, "--json"))
    assert "weights" not in sums["tokens"][0]  # their output is no mixture


def test_chat_answers_at_the_depth_asked_for(capsys, monkeypatch, checkpoint, tiny_base):
    """At depth 1 it answers as the base."""

    def answers(model, *commands):
        lines = [*commands, "hello", "/quit"]
        monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
        return works(capsys, "chat", model, "--max-new-tokens", 8).splitlines()

    assert answers(checkpoint, "/depth 1")[3] == answers(tiny_base)[2]
    assert "iterated, mean depth 1.00" not in answers(checkpoint)[-1]


def test_inspect_names_the_parts(capsys, checkpoint):
    found = json.loads(works(capsys, "inspect", checkpoint, "--json"))
    width = 32
    assert found["method"] == {"next_input": "mlp", "attention": "duo", "output": "mixture", "next_input_width": width}
    assert found["parameters"]["decider"] == 6 * width**2 + 5 * width and found["parameters"]["adapter"] == 0
    assert found["parameters"]["next_input"] == 5 * width**2 + 4 * width and found["parameters"]["linear_maps"] == 0
    assert (found["decision"], found["threshold"] is None) == ("threshold", False)


def test_the_card_has_only_fields_with_an_effect(capsys, checkpoint, tmp_path):
    shutil.copytree(checkpoint, model := tmp_path / "model")
    works(capsys, "card", model)
    text = (model / "README.md").read_text()
    for name in ("mix_topk", "lora_alpha", "lora_dropout"):
        assert f"`{name}`" not in text
    for name in ("next_input", "next_input_norms", "lora_rank", "output"):
        assert f"`{name}`" in text


def test_drawn_decisions_have_no_threshold(capsys, monkeypatch, checkpoint, tmp_path):
    shutil.copytree(checkpoint, model := tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"decision": "sample"}))
    found = json.loads(works(capsys, "inspect", model, "--json"))
    assert (found["decision"], found["threshold"]) == ("sample", None)
    works(capsys, "card", model)
    assert "`threshold`" not in (model / "README.md").read_text()
    found = json.loads(works(capsys, "generate", model, "hi", "--max-new-tokens", 2, "--json"))
    assert found["threshold"] is None
    found = json.loads(works(capsys, "generate", model, "hi", "--max-new-tokens", 2, "--json", "--policy", "always"))
    assert found["threshold"] == config["threshold"]
    lines = ["/threshold 0.9", "/depth 2", "/policy confidence", "/threshold 0.9", "/policy decider", "hello", "/quit"]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    told = works(capsys, "chat", model, "--max-new-tokens", 2)
    assert "/threshold has no effect: this model draws the decisions of its decider" in told
    assert "policy decider, threshold none (decisions are drawn), max_depth 2" in told
    assert "policy confidence, threshold 0.9, max_depth 2" in told
    assert "leave it out" not in told and "mean depth" in told


def test_tune_sets_a_share_and_trace_confirms_it(capsys, checkpoint, tmp_path):
    shutil.copytree(checkpoint, model := tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n} " + "ab cd " * n}) + "\n" for n in range(9))
    )
    works(capsys, "tune", model, tmp_path / "texts.jsonl", "--target", "share=0.44")
    before, after = (TaHForCausalLM.from_pretrained(path).config for path in (checkpoint, model))
    assert after.threshold != before.threshold and (after.output, after.decider) == (before.output, before.decider)
    found = works(capsys, "trace", model, tmp_path / "texts.jsonl", "--json", "-o", tmp_path / "trace.jsonl")
    share = json.loads(found)["policies"]["decider"]["iterated"]["value"]
    assert share == pytest.approx(0.44, abs=0.03)
    page = tmp_path / "lens.html"
    works(capsys, "report", tmp_path / "trace.jsonl", "-o", page)
    assert '"output":"mixture"' in page.read_text("utf-8")


def test_eval_counts_the_passes(capsys, checkpoint, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+2", "answer": "4"}\n')
    given = ("--tasks", "gsm8k", "--data", f"gsm8k={tmp_path / 'q.jsonl'}", "--max-new-tokens", 4)
    works(capsys, "eval", checkpoint, *given, "--policy", "decider,never,always", "-o", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    cost = {row["policy"]: row["cost"] for row in rows if row["task"] == "gsm8k"}
    assert cost["never"] == 1 and cost["always"] == pytest.approx(3) and 1 < cost["decider"] < 3
