"""Model cards: what is known about a model, never a path of this machine, and never over a card that a person wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from huggingface_hub import ModelCard

from helpers import hub_cache
from helpers.commands import ROOT, one_line, said
from helpers.hub_server import running_hub
from helpers.models import tah
from tah import TaHForCausalLM, model_card
from tah.checkpoints.card import MARK, base_id
from tah.checkpoints.contents import weights_fingerprint
from tah.load import load_tah

RUN = ROOT / "tests" / "pipeline" / "run_made_before" / "finished" / "decider"
PERSON = "---\nlicense: mit\n---\n# Mine\n"


def test_a_saved_model_has_a_card(tmp_path):
    model = tah(policy="confidence", threshold=0.4)
    model.base.config.name_or_path = "owner/base"
    model.add_model_tags("maths")
    model.save_pretrained(tmp_path / "place")
    card = ModelCard.load(tmp_path / "place" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "owner/base",
        "library_name": "tah",
        "pipeline_tag": "text-generation",
        "tags": ["tah", "think-at-hard", "maths"],
    }
    own = [name for name, _ in model.named_parameters() if "lora_" in name or not name.startswith("base.")]
    added = sum(model.get_parameter(name).numel() for name in own)
    for row in (
        f"| parameters | {model.num_parameters():,} |",
        f"| added to the base | {added:,} ({100 * added / (model.num_parameters() - added):.2f} % of the base) |",
        "| `policy` | confidence |",
        "| `threshold` | 0.4 |",
        "| `lora_rank` | 4 |",
    ):
        assert row in card.text
    assert "random_rate" not in card.text and str(tmp_path) not in str(card) and "place" not in str(card)
    model.save_pretrained(tmp_path / "mapped", auto_map=True)
    card = ModelCard.load(tmp_path / "mapped" / "README.md")
    assert card.data.library_name == "transformers" and "trust_remote_code=True" in card.text


def test_a_card_of_a_person_stays(tmp_path):
    model = tah()
    model.save_pretrained(tmp_path)
    assert MARK in (tmp_path / "README.md").read_text()
    model.config.threshold = 0.125
    model.save_pretrained(tmp_path)  # ours is written again
    assert "| 0.125 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(PERSON)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"README.md is not a card that tah made, so it stays"):
        model.save_pretrained(tmp_path, card=model_card(model))
    assert (tmp_path / "README.md").read_text() == PERSON


def test_the_base_and_its_license(tmp_path, monkeypatch):
    """They are read from the directory of the base, or from the cache of the Hub; a path is no id."""
    tah().base.save_pretrained(tmp_path / "secret-place")
    model = TaHForCausalLM.from_base(str(tmp_path / "secret-place"))
    assert base_id(model) is None and model_card(model).data.get("license") is None
    (tmp_path / "secret-place" / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    card = model_card(model)
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "mine", None)
    assert "secret-place" not in str(card) and model_card(model, license="mit").data.license == "mit"
    (tmp_path / "secret-place" / "README.md").write_text("---\nlicense: [\n---\n")  # not YAML
    assert model_card(model).data.get("license") is None
    hub_cache.use(tmp_path / "hub", tmp_path / "ours", monkeypatch)
    (tmp_path / "secret-place" / "README.md").write_text(PERSON)
    snapshot = hub_cache.publish(tmp_path / "hub", "owner/base", tmp_path / "secret-place")
    for source in (str(snapshot), "owner/base"):
        card = model_card(TaHForCausalLM.from_base(source))
        assert (card.data.base_model, card.data.license) == ("owner/base", "mit") and str(tmp_path) not in str(card)


def test_the_training_is_in_the_card(tmp_path):
    """`run.json` and `quality.json` of a run that an earlier version made, which recorded no hash of the weights."""
    facts, quality = (json.loads((RUN / name).read_text()) for name in ("run.json", "quality.json"))
    model, recipe = tah(), facts["recipe"]
    text = model_card(model, run=RUN).text
    assert f"| method | {recipe['backbone']['method']} (" in text and "| iterated share |" not in text
    measured = tmp_path / "measured"
    measured.mkdir()
    (measured / "run.json").write_text(json.dumps(facts | {"weights": weights_fingerprint(model)}))
    (measured / "quality.json").write_text(json.dumps(quality))
    text = model_card(model, run=measured).text
    assert f"| method | {recipe['backbone']['method']} (trained weights: {recipe['backbone']['train']})" in text
    assert f"| iterated share | {100 * quality['iterated_share']:.1f} % of {quality['tokens']:,} held-out" in text
    assert f"recipe `{recipe['name']}`" in text and str(recipe["data"]["source"]) not in text
    assert "| method |" not in model_card(model).text
    shutil.copy(RUN / "run.json", tmp_path)
    model.save_pretrained(tmp_path)
    assert "| method |" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match=r"has no run.json of a training; give the directory of a stage"):
        model_card(model, run=tmp_path / "nothing")


def test_a_damaging_run_adds_no_markup(tmp_path):
    """`run.json` of a downloaded checkpoint may contain any text."""
    facts = json.loads((RUN / "run.json").read_text())
    evil = "x` <img src=y> [a](b)\n\n## Results\n\n| z"
    facts["recipe"] |= {"name": evil, "seed": evil, "backbone": {"method": evil, "train": evil}}
    facts |= {"stage": evil, "versions": {"tah": evil}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    model = tah()
    text = model_card(model, run=tmp_path).text
    body = text.removeprefix(model_card(model).text.partition("# TaH")[0])
    assert "recipe `x img srcy ab Results" in text and "<img" not in text and "[a]" not in text
    assert "\n## Results" not in text and "| z" not in text and "`x`" not in body


@pytest.fixture(scope="module")
def evaluated(pupil, tmp_path_factory):
    """A checkpoint and an evaluation of it: two tasks, two policies."""
    pytest.importorskip("lm_eval")
    from helpers.evaluations import go

    place = tmp_path_factory.mktemp("card")
    TaHForCausalLM.from_base(str(pupil), policy="random", lora_rank=2).save_pretrained(place / "model")
    for path in pupil.iterdir():
        if path.name != "config.json" and "model" not in path.name:
            shutil.copy(path, place / "model")
    (place / "model" / "README.md").unlink(missing_ok=True)
    return place / "model", place / "eval", go(place / "model", place / "eval")


def test_results_become_the_model_index(evaluated, tmp_path):
    directory, evaluation, results = evaluated
    model = load_tah(str(directory))
    card = ModelCard(str(model_card(model, [evaluation], name="me/x")))  # as it is read again
    wanted = {(row["policy"], row["task"]): round(row["accuracy"]["value"], 4) for row in results["results"]}
    entries = card.data.eval_results
    found = {(each.metric_args["policy"], each.dataset_type): each.metric_value for each in entries}
    assert found == wanted and len(wanted) == 4 and max(wanted.values()) > 0 and card.data.model_name == "me/x"
    assert {each.metric_type for each in entries} == {"accuracy"}
    for row in results["results"]:
        task = f"{row['task']} (own questions)"  # those of this test, not of the public benchmark
        assert f"| {row['policy']} | {task} | {row['questions']} | {row['answers']} | " in card.text
    assert {each.dataset_name for each in entries} == {f"{row['task']} (own questions)" for row in results["results"]}
    public = model_card(model, [results | {"overrides": {}}])
    assert {each.dataset_name for each in public.data.eval_results} == {row["task"] for row in results["results"]}
    assert str(directory.parent) not in str(card) and str(ROOT) not in str(card)
    assert str(model_card(model, [results], name="me/x")) == str(card)
    stock = results | {
        "results": [],
        "lm_eval": [{"policy": "never", "task": "lm_eval:x", "metrics": {"acc,none": 0.25, "acc_stderr,none": 0.1}}],
    }
    (entry,) = model_card(model, [stock]).data.eval_results
    assert (entry.metric_type, entry.metric_value, entry.dataset_type) == ("acc", 0.25, "lm_eval:x")


def test_results_of_other_weights_are_refused(evaluated, tmp_path):
    directory, evaluation, results = evaluated
    model = load_tah(str(directory))
    half = results | {"dtype": "bfloat16", "weights": weights_fingerprint(load_tah(str(directory), "bfloat16"))}
    assert half["weights"] != results["weights"]
    model_card(model, [half])  # the same weights, evaluated in another precision
    with torch.no_grad():
        model.base.get_input_embeddings().weight[0] += 1
    for given, said_first in ((evaluation, str(evaluation)), (results, "the evaluation"), (half, "the evaluation")):
        with pytest.raises(ValueError, match=f"^{said_first} is of other weights"):
            model_card(model, [given])
    with pytest.raises(ValueError, match=r"has no results.json; give the -o directory of a finished tah eval"):
        model_card(model, [tmp_path])
    with pytest.raises(ValueError, match=r"the evaluation has no entry dtype"):
        model_card(model, [{"results": []}])


@pytest.mark.usefixtures("plain")
def test_command(evaluated, tmp_path, capsys):
    directory, evaluation, results = evaluated
    shutil.copytree(directory, tmp_path / "m")
    code, out, err = said(capsys, "card", "m", "--results", evaluation, "--license", "mit", "--name", "me/x")
    assert (code, out) == (0, "written to m/README.md\n"), err
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.license == "mit" and card.data.model_name == "me/x"
    assert len(card.data.eval_results) == len(results["results"])
    results_of = lambda card: (card.data.eval_results, card.text.partition("## Results")[2])  # noqa: E731
    kept = results_of(card)
    assert said(capsys, "card", "m")[0] == 0  # ours is written again, with the results of the same weights
    assert results_of(ModelCard.load(tmp_path / "m" / "README.md")) == kept and kept[1]
    model = TaHForCausalLM.from_pretrained("m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for place in ("m", "elsewhere"):  # over it, and where an upload takes its files from
            model.save_pretrained(place)
            assert results_of(ModelCard.load(tmp_path / place / "README.md")) == kept
        model.save_pretrained("replaced", card=model_card(model))
        with torch.no_grad():
            model.base.get_input_embeddings().weight[0] += 1
        model.save_pretrained("other")
        assert "## Results" not in (tmp_path / "other" / "README.md").read_text()
    assert "## Results" not in (tmp_path / "replaced" / "README.md").read_text()  # a given card is taken as it is
    with pytest.warns(UserWarning, match=r"the results in m/README.md are not of these weights, so the new card has"):
        model.save_pretrained("m")
    assert ModelCard.load(tmp_path / "m" / "README.md").data.get("eval_results") is None
    (tmp_path / "m" / "README.md").write_text(PERSON)
    assert "m/README.md is not a card that tah made, so it stays" in one_line(capsys, "card", "m")
    assert (tmp_path / "m" / "README.md").read_text() == PERSON
    for source in ("follow-tah", "nothing", "owner/name"):
        assert f"{source} is not the directory of a TaH checkpoint" in one_line(capsys, "card", source)
    assert "no results.json" in one_line(capsys, "card", directory, "--results", "m")


PUSHES = """
import sys, warnings
import torch
from transformers import AutoTokenizer
from huggingface_hub.errors import LocalEntryNotFoundError
from tah import TaHForCausalLM, model_card
from tah.checkpoints.contents import weights_fingerprint

directory, work = sys.argv[1:]
model = TaHForCausalLM.from_pretrained(directory)
model.base.config.name_or_path = "owner/base"
tokenizer = AutoTokenizer.from_pretrained(directory)
model.push_to_hub("me/whole", auto_map=True, tags=["maths"])
tokenizer.push_to_hub("me/whole")
again = TaHForCausalLM.from_pretrained("me/whole")
for (name, ours), (_, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
    assert torch.equal(ours, theirs), name
assert AutoTokenizer.from_pretrained("me/whole").chat_template == tokenizer.chat_template != None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.push_to_hub("me/person", commit_message="New weights")
assert [str(each.message) for each in caught if "card" in str(each.message)] == [
    "README.md of me/person is not a card that tah made, so it stays as it is"]
model.save_pretrained(work + "/saved", push_to_hub=True, repo_id="me/saved", commit_message="Saved", token="hf_x",
    max_shard_size="20KB")
try:
    model.push_to_hub("me/down")
    raise SystemExit("pushed over a card that it could not read")
except LocalEntryNotFoundError:
    pass
trained = TaHForCausalLM.from_pretrained(work + "/trained")
found = {"weights": weights_fingerprint(trained), "dtype": "float32", "protocol": "p", "results": []}
found |= {"sampling": {"temperature": 0, "max_new_tokens": 1}, "rule": {"threshold": 0.5}}
found |= {"lm_eval": [{"policy": "never", "task": "x", "metrics": {"acc,none": 0.25}}]}
trained.push_to_hub("me/trained", card=model_card(trained, [found], name="me/trained"))
trained.push_to_hub("me/trained", revision="again")
trained.save_pretrained(work + "/local", push_to_hub=True, repo_id="me/trained", revision="local")
with torch.no_grad():
    trained.base.get_input_embeddings().weight[0] += 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trained.push_to_hub("me/trained", revision="changed")
assert [str(each.message)[:42] for each in caught if "results" in str(each.message)] == [
    "the results in README.md of me/trained are"]
model.push_to_hub("me/whole", revision="next", card=model_card(model, name="Another", license="mit"))
model.push_to_hub("me/whole", create_pr=True)
"""


def test_push_to_hub(tiny_checkpoint, tmp_path):
    """Real uploads and downloads of another process, through a hub on this machine."""
    with running_hub() as hub:
        hub.repositories["owner/base"] = {"main": {"README.md": b"---\nlicense: apache-2.0\n---\n# Base\n"}}
        hub.repositories["me/down"] = {"main": {"README.md": PERSON.encode()}}
        hub.unavailable.add("me/down/README.md")
        shutil.copytree(RUN, tmp_path / "trained")
        hub.repositories["me/person"] = {"main": {"README.md": PERSON.encode(), "notes.txt": b"kept"}}
        environment = os.environ | {
            **{"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"},
            **{"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TAH_CACHE": str(tmp_path / "cache")},
        }
        done = subprocess.run(
            [sys.executable, "-c", PUSHES, str(tiny_checkpoint), str(tmp_path)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    files = hub.files("me/whole")
    assert files.keys() >= {"tokenizer.json", "chat_template.jinja", "modeling_tah.py", "model.safetensors"}
    card = ModelCard(files["README.md"].decode())
    assert MARK in card.text and "# me/whole\n" in card.text  # the upload of the tokenizer kept the card
    assert card.data.license == "apache-2.0" and card.data.tags == ["tah", "think-at-hard", "maths"]
    assert hub.files("me/person")["README.md"].decode() == PERSON and hub.files("me/person")["notes.txt"] == b"kept"
    assert "config.json" in hub.files("me/person")
    assert hub.files("me/down") == {"README.md": PERSON.encode()}
    for branch, kept in (("main", True), ("again", True), ("local", True), ("changed", False)):
        card = ModelCard(hub.files("me/trained", branch)["README.md"].decode())
        assert ("never on x: acc,none 0.2500" in card.text) == kept
        assert [each.metric_value for each in card.data.eval_results or ()] == ([0.25] if kept else [])
        assert ("| method |" in card.text) == (branch != "main")  # a training by tah train; no `run` was given for main
    assert (tmp_path / "local" / "README.md").read_bytes() == hub.files("me/trained", "local")["README.md"]
    saved = hub.files("me/saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == saved
    assert sum(name.endswith(".safetensors") for name in saved) > 1
    other = ModelCard(hub.files("me/whole", "next")["README.md"].decode())
    assert other.data.license == "mit" and "# Another\n" in other.text
    told = [(each["repository"], each["branch"], each["summary"]) for each in hub.commits]
    assert told == [
        ("me/whole", "main", "Upload model"),
        ("me/whole", "main", "Upload tokenizer"),
        ("me/person", "main", "New weights"),
        ("me/saved", "main", "Saved"),
        *(("me/trained", branch, "Upload model") for branch in ("main", "again", "local", "changed")),
        ("me/whole", "next", "Upload model"),
        ("me/whole", "refs/pr/1", "Upload model"),
    ]
    assert all(str(tmp_path) not in text.decode("utf-8", "replace") for text in (*files.values(), *saved.values()))
