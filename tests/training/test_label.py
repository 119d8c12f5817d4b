"""Labelling: the reference's statistics, shards that many processes make, killed at any time, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.models import CHAT_TEMPLATE
from helpers.scores import plain_row_scores
from tah.data.rows import load_rows
from tah.progress import Reporter
from tah.training.label import fingerprint, label, name_for_card

TEXTS = [f"{'0123456789 abcdefghij' * 3}"[n : 3 * n + 4] for n in range(12)]
COLUMNS = ["input_ids", "supervised", "ref_rank", "ref_prob", "ref_entropy", "row"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What `datasets` keeps of the files it reads goes away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def reference(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base)


@pytest.fixture
def rows():
    return datasets.Dataset.from_list([{"text": text} for text in TEXTS])


def data(directory):
    return {path.name: path.read_bytes() for path in sorted((directory / "data").iterdir())}


# -- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 16384])
def test_labels_are_those_of_a_plain_forward(rows, tokenizer, reference, tmp_path, tokens_per_batch):
    counts = label(rows, tokenizer, reference, tmp_path, max_length=64, tokens_per_batch=tokens_per_batch)
    made = datasets.load_dataset(str(tmp_path), split="train")
    assert made.column_names == COLUMNS and made["row"] == list(range(len(rows)))
    hard = 0
    for row in made:
        assert tokenizer.decode(row["input_ids"]) == TEXTS[row["row"]] + "<|im_end|>" and not row["supervised"][0]
        rank, prob, entropy = plain_row_scores(reference, row["input_ids"], row["supervised"])
        assert row["ref_rank"] == rank and row["ref_rank"][-1] == -1
        assert np.allclose(row["ref_prob"], prob, rtol=1e-4) and np.allclose(row["ref_entropy"], entropy, atol=1e-5)
        hard += sum(r > 0 for r in rank)
    supervised = sum(map(sum, made["supervised"]))
    assert counts["hard"] == hard > 0 and counts["supervised"] == supervised
    assert counts["hard_share"] == hard / supervised and counts["complete"] and counts["kept"] == len(rows)
    assert counts["reference_loss"] == pytest.approx(
        -sum(np.log(p) for row in made["ref_prob"] for p in row if p > 0) / supervised, rel=1e-4
    )
    kinds = {name: str(feature.feature.dtype) for name, feature in made.features.items() if name != "row"}
    assert kinds == {
        "input_ids": "int32",
        "supervised": "bool",
        "ref_rank": "int32",
        "ref_prob": "float32",
        "ref_entropy": "float32",
    }


def test_only_what_predicts_the_assistant_is_judged(tokenizer, reference, tmp_path):
    """The last token before an answer has a label; the answer's last token, which predicts the user, has none."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = datasets.Dataset.from_list([{"messages": chat + chat[:1]}, {"messages": chat}])
    label(rows, tokenizer, reference, tmp_path, max_length=64)
    made = load_rows(str(tmp_path))
    for row in made:
        judged = [rank >= 0 for rank in row["ref_rank"]]
        assert judged == [*row["supervised"][1:], False] and sum(judged) == 3  # b <|im_end|> \n
    assert tokenizer.chat_template == CHAT_TEMPLATE and made[0]["supervised"][-1] is False


def test_without_a_reference_there_are_no_labels(rows, tokenizer, tmp_path):
    counts = label(rows, tokenizer, None, tmp_path, max_length=64)
    assert load_rows(str(tmp_path)).column_names == ["input_ids", "supervised", "row"] and "hard" not in counts
    assert "labelled by" not in (tmp_path / "README.md").read_text()


def test_the_card_and_the_counts(tokenizer, reference, tmp_path):
    texts = ["abc", "", "x" * 100, "abcdef", "a" * 63]
    rows = datasets.Dataset.from_list([{"text": text} for text in texts])
    counts = label(rows, tokenizer, reference, tmp_path, max_length=64, rows_per_shard=2)
    assert counts["dropped"] == {"no assistant tokens": 1, "longer than max_length": 1}
    assert (counts["rows"], counts["kept"], counts["tokens"], counts["supervised"]) == (5, 3, 75, 72)
    assert counts["lengths"] == {"min": 4, "median": 7.0, "max": 64} and counts["shards"] == 3
    card = (tmp_path / "README.md").read_text()
    for text in (
        "3 of 5",
        "dropped: longer than max_length | 1 |",
        f"{counts['hard_share']:.2%}",
        str(torch.__version__),
    ):
        assert text in card
    assert load_rows(str(tmp_path))["row"] == [0, 3, 4]
    assert str(Path(reference.name_or_path).parent) not in card
    assert f"labelled by {Path(reference.name_or_path).name}." in card
    cut = label(rows, tokenizer, reference, tmp_path / "cut", max_length=64, too_long="cut")
    assert cut["kept"] == 4 and cut["lengths"]["max"] == 64


def test_the_card_has_the_given_name_of_the_reference(rows, tokenizer, reference, tmp_path):
    label(rows, tokenizer, reference, tmp_path, max_length=64, reference_name="smollm2")
    card = (tmp_path / "README.md").read_text()
    assert "labelled by smollm2." in card and "| reference | smollm2 (" in card
    assert reference.name_or_path not in card


def test_names_in_the_card_have_no_directories(tmp_path):
    assert name_for_card("smollm2") == "smollm2" and name_for_card("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert name_for_card(str(tmp_path / "mine")) == "mine" and name_for_card(None) is None
    cached = tmp_path / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / ("0" * 40)
    assert name_for_card(str(cached)) == "Qwen/Qwen3-8B"


def test_progress(rows, tokenizer, reference, tmp_path, capsys):
    label(rows, tokenizer, reference, tmp_path / "quiet", max_length=64)
    assert capsys.readouterr() == ("", "")
    for terminal in (False, True):
        console = Console(force_terminal=terminal, width=100)
        counts = label(rows, tokenizer, reference, tmp_path / str(terminal), max_length=64, progress=Reporter(console))
        out = capsys.readouterr().out
        assert "12 of 12 rows" in out and "tokens/s" in out and counts["tokens_per_second"] > 0


# -- shards ----------------------------------------------------------------------------------------------------------


def test_two_ranks_make_what_one_makes(rows, tokenizer, reference, tmp_path, monkeypatch):
    options = {"max_length": 64, "rows_per_shard": 2, "tokens_per_batch": 100}
    label(rows, tokenizer, reference, tmp_path / "one", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    counts = label(rows, tokenizer, reference, tmp_path / "two", **options)
    assert not counts["complete"] and not (tmp_path / "two" / "README.md").exists()
    assert list(data(tmp_path / "two")) == ["00001.parquet", "00003.parquet", "00005.parquet"]
    with pytest.raises(ValueError, match="its labelling is not finished; run tah label again"):
        load_rows(str(tmp_path / "two"))
    monkeypatch.setenv("RANK", "0")
    assert label(rows, tokenizer, reference, tmp_path / "two", **options)["complete"]
    one, two = load_rows(str(tmp_path / "one")), load_rows(str(tmp_path / "two"))
    assert one.to_list() == two.to_list() and len(one) == len(rows)


SCRIPT = """
import sys, time, datasets, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tah.training.label import label
base, output, texts = sys.argv[1], sys.argv[2], sys.argv[3:]
torch.set_num_threads(1)
rows = datasets.Dataset.from_list([{"text": text} for text in texts])
reference = AutoModelForCausalLM.from_pretrained(base)
reference.register_forward_pre_hook(lambda *args: time.sleep(0.1))  # a slow one, to be killed in the middle
reference.model.register_forward_pre_hook(lambda *args: time.sleep(0.1))
label(rows, AutoTokenizer.from_pretrained(base), reference, output, max_length=64, rows_per_shard=1)
"""


def test_killed_and_called_again(rows, tokenizer, reference, tiny_base, tmp_path):
    """SIGKILL in the middle: finished shards are kept, the others made, and the result is that of one go."""
    output, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [sys.executable, "-c", SCRIPT, str(tiny_base), str(output), *TEXTS]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(output.glob("data/*.parquet"))) < 3:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_ino for path in output.glob("data/*.parquet")}
    assert 3 <= len(finished) < len(rows) and not (output / "README.md").exists()
    (output / "data" / ".00009.parquet.0.tmp").write_bytes(b"half")
    counts = label(rows, tokenizer, reference, output, max_length=64, rows_per_shard=1)
    label(rows, tokenizer, reference, whole, max_length=64, rows_per_shard=1)
    assert counts["complete"] and all(path.stat().st_ino == inode for path, inode in finished.items())
    assert load_rows(str(output)).to_list() == load_rows(str(whole)).to_list()
    assert sorted(data(output)) == sorted(data(whole))  # nothing half-written is left


def test_a_second_call_does_nothing(rows, tokenizer, reference, tmp_path):
    first = label(rows, tokenizer, reference, tmp_path, max_length=64)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "settings.json"}
    reference.forward = None  # would fail if it ran
    again = label(rows, tokenizer, reference, tmp_path, max_length=64)
    assert {**again, "tokens_per_second": 0} == {**first, "tokens_per_second": 0}
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "settings.json"}
    assert {path: time for path, time in after.items() if path != tmp_path} == {
        path: time for path, time in before.items() if path != tmp_path
    }


def test_a_full_disk_leaves_the_finished_shards(rows, tokenizer, reference, tmp_path, monkeypatch):
    def full(number):
        if len(list(tmp_path.glob("data/*.parquet"))) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            label(rows, tokenizer, reference, tmp_path, max_length=64, rows_per_shard=3)
    assert list(data(tmp_path)) == ["00000.parquet", "00001.parquet"]
    assert label(rows, tokenizer, reference, tmp_path, max_length=64, rows_per_shard=3)["complete"]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(rows, tokenizer, reference, tmp_path):
    label(rows, tokenizer, reference, tmp_path, max_length=64)
    before = data(tmp_path)

    def refused(what, *, its=rows, by=reference, words=tokenizer, **options):
        with pytest.raises(ValueError, match=f"was begun with other settings: {what}.*; delete it or choose another"):
            label(its, words, by, tmp_path, **{"max_length": 64, **options})

    refused(r"max_length 64 \(now 32\)", max_length=32)
    refused(r"too_long drop \(now cut\), rows_per_shard 1024 \(now 5\)", rows_per_shard=5, too_long="cut")
    refused("data .*, rows 12 .now 11.", its=rows.select(range(11)))
    refused(r"data \w+ \(now \w+\)", its=rows.map(lambda row: {"text": row["text"].upper()}))
    refused("reference .*reference_weights .* .now None", by=None)
    words = AutoTokenizer.from_pretrained(reference.name_or_path)
    words.chat_template += " "
    refused("tokenizer ", words=words)
    with torch.no_grad():
        reference.lm_head.weight.add_(0.01)
    refused(r"reference_weights \w+ ")
    assert data(tmp_path) == before


def test_the_fingerprint_is_that_of_the_contents(rows, tmp_path):
    rows.to_json(tmp_path / "a.jsonl")
    read = load_rows(str(tmp_path / "a.jsonl"))
    assert fingerprint(read) == fingerprint(rows) == fingerprint(rows.add_column("other", [1] * len(rows)))
    assert fingerprint(rows.select(range(11, -1, -1))) != fingerprint(rows)
    assert fingerprint(rows.select(range(11, -1, -1)).select(range(11, -1, -1))) == fingerprint(rows)


def test_a_directory_in_use_is_refused(rows, tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="is in use: it contains files that are not a labelled data set"):
        label(rows, tokenizer, None, tmp_path, max_length=64)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="thesis.tex is a file; choose a directory"):
        label(rows, tokenizer, None, tmp_path / "thesis.tex", max_length=64)


def test_nothing_to_train_on_leaves_nothing(tokenizer, reference, tmp_path):
    chat = [{"role": "user", "content": "a"}]
    rows = datasets.Dataset.from_list([{"messages": chat}, {"messages": chat}])
    with pytest.raises(ValueError, match=r"nothing to train on in 2 rows: no assistant tokens \(2\)"):
        label(rows, tokenizer, reference, tmp_path / "out", max_length=64)
    assert not (tmp_path / "out").exists()


def test_arguments_out_of_range(rows, tokenizer, tmp_path):
    for name in ("max_length", "tokens_per_batch", "rows_per_shard"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least"):
            label(rows, tokenizer, None, tmp_path / "out", **{"max_length": 64, name: 0})
    with pytest.raises(ValueError, match="unknown too_long 'split'; choose from drop, cut"):
        label(rows, tokenizer, None, tmp_path / "out", max_length=64, too_long="split")
    assert not (tmp_path / "out").exists()


def test_a_reference_with_another_tokenizer_is_refused(rows, tokenizer, reference, tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            label(rows, tokenizer, reference, tmp_path / "out", **{"max_length": 64, **options})
        assert not (tmp_path / "out").exists()

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    other = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)))
    refused("has another tokenizer: 'A' is .* for the base, there it is", reference_tokenizer=other)
    refused("has 64 positions; lower max_length=65 to that", max_length=65)
    # One more token than the reference knows: fine as padding, which it never reads; not otherwise.
    tokenizer.add_tokens("<extra>")
    refused("'<extra>' is 259 for the base, there it is not in its vocabulary")
    tokenizer.pad_token = "<extra>"
    refused("has 259 embeddings; the tokenizer's ids go to 259")
    reference.resize_token_embeddings(320)
    assert label(rows, tokenizer, reference, tmp_path / "out", max_length=64)["complete"]


def test_a_reference_without_a_tokenizer_is_refused(rows, tokenizer, reference, tmp_path):
    reference.save_pretrained(tmp_path / "bare")
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no usable tokenizer"):
        label(rows, tokenizer, bare, tmp_path / "out", max_length=64)
    assert label(rows, tokenizer, bare, tmp_path / "out", max_length=64, reference_tokenizer=tokenizer)["complete"]


def test_labels_that_do_not_fit_their_tokens_are_refused(rows, tokenizer, reference, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    label(rows, tokenizer, reference, tmp_path, max_length=64)
    path: Path = tmp_path / "data" / "00000.parquet"
    table = pq.read_table(path)
    ranks = [row + [1] if at == 3 else row for at, row in enumerate(table["ref_rank"].to_pylist())]
    at = table.column_names.index("ref_rank")
    pq.write_table(table.set_column(at, "ref_rank", pa.array(ranks, pa.list_(pa.int32()))), path)
    length = len(table["input_ids"][3])
    with pytest.raises(
        ValueError, match=f"ref_rank of row 3 has {length + 1} entries for {length} tokens; label again"
    ):
        load_rows(str(tmp_path))
