"""Traces: against the slow reference and plain loops, on disk, and what the statistics make of them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tah.cli_see  # noqa: F401  # registers its commands
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers.families import VOCAB, tiny
from helpers.models import shake, tah, token_ids
from helpers.reference import by_labels, by_policy, reference
from tah import TaHForCausalLM
from tah.benchmarks.bench_trace import markdown, throughput
from tah.benchmarks.measure import save
from tah.core.head import Head
from tah.core.logits import RunningOutput
from tah.load import FOLLOW
from tah.policy import DepthState, Policy
from tah.stats.bootstrap import Resampled, ranking
from tah.stats.threshold import threshold_for_loss
from tah.tracing.overthinking import as_markdown, compare, statistics
from tah.tracing.recorder import measure
from tah.tracing.trace import trace
from tah.tracing.trace_file import as_line, load_trace, parse_line
from tah.tracing.trace_scores import tune
from tah.tracing.trace_texts import read_rows, texts_of
from tah.tracing.traced import Trace, TracedText
from tah_cli.app import run

LENGTHS = (7, 12, 5, 12, 2, 9)


@pytest.fixture(scope="module")
def words():
    """A tokenizer of the tiny models' vocabulary."""
    table = {f"w{token}": token for token in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(table, "w0")), eos_token="w2")


def rows(lengths=LENGTHS):
    """Tokens, all of them supervised but the first; of every third row only the second half."""
    found = []
    for number, length in enumerate(lengths):
        ids = token_ids(1, length, seed=number)[0].tolist()
        start = max(1, length // 2) if number % 3 == 0 else 1
        found.append({"input_ids": ids, "supervised": [at >= start for at in range(length)]})
    return found


def guided(model, lengths=LENGTHS):
    """The same, but every second token is the model's first choice: it is right sometimes."""
    found = rows(lengths)
    for row in found:
        ids = row["input_ids"]
        for at in range(1, len(ids), 2):
            ids[at] = int(model(torch.tensor([ids[:at]]), policy="never", use_cache=False).logits[0, -1].argmax())
    return found


def model_of(attention="duo", max_depth=3, **config):
    return tah(attention=attention, max_depth=max_depth, **{"policy": "decider", "threshold": 0.5, **config}).eval()


def plain(logits, target, k):
    """Rank, probability, entropy, the k best: by sorting the whole row."""
    order = (-logits).sort(stable=True).indices.tolist()  # of equal ones the lower id first
    p = logits.double().softmax(-1)
    entropy = torch.special.entr(p).sum().item()
    return order.index(int(target)), p[target].item(), entropy, order[:k], p[order[:k]].tolist()


# -- recording -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"attention": "own", "decider": {"kind": "mlp", "topk": 8, "hidden_dims": [16]}},
        {"attention": "own", "max_depth": 2, "output": "zero_init", "next_input": "hidden"},
        {"family": "gemma2", "attn_implementation": "eager", "max_depth": 2},
    ],
    ids=["duo", "own, mlp", "zero init", "soft-cap"],
)
def test_trace_equals_plain_loops(words, config):
    """Every pass of every token, from full logits of the token-by-token reference; one text is longer than a chunk."""
    model = model_of(**config)
    its = [*rows((7, 5)), {"input_ids": [3, 4] * 33, "supervised": [True] * 66}]
    if "family" in config:
        its = its[:2]  # its windows make the reference slow
    traced = trace(model, words, its, top_k=3, max_length=None if "family" in config else 64)
    for text in traced.texts[:2]:
        said = {}

        def everyone(position, depth, features, said=said):
            state = DepthState(
                depth=depth,
                input_ids=None,
                positions=torch.tensor([position]),
                hidden={k: h[None] for k, h in enumerate(features.hidden)},
                depth_labels=None,
                map_logits=lambda f: f(features.logits[None]),
            )
            said[depth, position] = model.decider(state).sigmoid().item()
            return True

        full = reference(model, torch.from_numpy(text.ids[:-1]).long(), everyone)
        for d in range(model.config.max_depth):
            for at, target in enumerate(text.ids[1:]):
                rank, prob, entropy, best, probs = plain(full.depth_logits[d][at], target, 3)
                assert text.rank[d, at] == rank and text.top_ids[d, at].tolist() == best
                assert text.prob[d, at] == pytest.approx(prob, rel=2e-4)
                assert text.entropy[d, at] == pytest.approx(entropy, rel=1e-3)
                assert text.max_prob[d, at] == pytest.approx(probs[0], rel=2e-4)
                assert text.top_probs[d, at] == pytest.approx(probs, abs=1e-4)
                if d < model.config.max_depth - 1:
                    assert text.decider[d, at] == pytest.approx(said[d + 1, at], abs=1e-4)


@pytest.mark.parametrize("policy", ["decider", "confidence", "oracle", "random"])
@pytest.mark.parametrize("attention", ["own", "blind"])
def test_without_duo_the_own_policy_is_known_from_the_first_run(words, attention, policy):
    model = model_of(attention, random_rate=0.5, threshold=0.5 if policy == "decider" else 0.97)
    its = guided(model)
    derived, run_again = (trace(model, words, its, policy=policy, own_policy=own) for own in (None, True))
    assert (derived.header["final"], run_again.header["final"]) == ("exact", "run")
    depths = np.concatenate([text.depth for text in derived.texts])
    assert len(np.unique(depths)) > 1
    for one, other in zip(derived.texts, run_again.texts, strict=True):
        assert (one.depth == other.depth).all() and (one.final_rank == other.final_rank).all()
        assert (one.final_top == other.final_top).all()
        assert one.final_prob == pytest.approx(other.final_prob, rel=2e-4)


def test_with_duo_the_own_policy_is_run(words):
    """And it is what the reference does under the decider; the derived results, the control, are not."""
    model = model_of("duo")
    traced = trace(model, words, rows())
    wrong = trace(model, words, rows(), own_policy=False)
    assert (traced.header["final"], wrong.header["final"]) == ("run", "approximate")
    for text in traced.texts:
        truth = reference(model, torch.from_numpy(text.ids[:-1]).long(), by_policy(model.decider, 0.5))
        assert (truth.depth_count == torch.from_numpy(text.depth)).all()
        for at, target in enumerate(text.ids[1:]):
            rank, prob, _, best, _ = plain(truth.logits[at], target, 1)
            assert (text.final_rank[at], text.final_top[at]) == (rank, best[0])
            assert text.final_prob[at] == pytest.approx(prob, rel=2e-4)
    found, control = (np.concatenate([text.final_prob for text in t.texts]) for t in (traced, wrong))
    assert np.abs(found / control - 1).max() > 0.01


def test_oracle_runs_where_depth_one_is_wrong(words):
    model = model_of("duo", max_depth=2)
    traced = trace(model, words, guided(model), policy="oracle")
    assert len(np.unique(np.concatenate([text.depth for text in traced.texts]))) == 2
    for text in traced.texts:
        labels = torch.from_numpy(np.where(text.rank[0] > 0, 2, 1))
        truth = reference(model, torch.from_numpy(text.ids[:-1]).long(), by_labels(labels))
        assert (text.depth == labels.numpy()).all()
        tops = [plain(logits, 0, 1)[3][0] for logits in truth.logits]
        assert text.final_top.tolist() == tops


def test_confidence_and_decider_thresholds_are_those_of_the_model(words):
    model = model_of("own", max_depth=2)
    sure = trace(model, words, rows(), policy="confidence", threshold=0.97)
    assert sure.header["decider"]  # asked as well: it is the model's own policy
    for text in sure.texts:
        assert (text.depth == np.where(1 - text.max_prob[0] > 0.97, 2, 1)).all()
        assert (trace(model, words, rows()).texts[text.row].decider == text.decider).all()


def test_batched_equals_single(words):
    model = model_of("duo")
    together, alone = (trace(model, words, rows(), tokens_per_batch=size) for size in (1000, 1))
    for one, other in zip(together.texts, alone.texts, strict=True):
        for name in ("rank", "top_ids", "depth", "final_rank", "final_top"):
            assert (getattr(one, name) == getattr(other, name)).all()
        for name in ("prob", "entropy", "max_prob", "decider", "final_prob"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_look_ahead_gives_what_a_look_of_its_own_does(family):
    """The next inputs from the logits a policy looked at, also where only some tokens go on: bit for bit, and one
    product with the head less for each pass that is not the last."""
    torch.manual_seed(0)
    model = shake(TaHForCausalLM.from_base(tiny(family, "eager"), max_depth=3, mix_topk=9, lora_rank=4)).eval()
    products = []
    model.head.linear.register_forward_hook(lambda *call: products.append(len(call[1][0])))
    ids = token_ids(2, 70)

    def run(ahead, chosen):
        class Looks(Policy):
            def __call__(self, state):
                top = state.map_logits(lambda logits: logits.zero_()[:, 0], ahead=ahead)  # it may spoil them
                return chosen(state.positions) & (top == 0)

        products.clear()
        with torch.no_grad():
            out = model(ids, policy=Looks(), logits_to_keep=0)
        return out, sum(products)

    for chosen in (lambda positions: positions >= 0, lambda positions: positions % 3 > 0):
        (one, more), (other, fewer) = run(False, chosen), run(True, chosen)
        assert torch.equal(one.logits, other.logits) and torch.equal(one.depth_count, other.depth_count)
        per_deep_token = 1 if model.head.is_linear else 2  # a head that is not linear runs on every pass by itself
        went_on = (one.depth_count > 1).sum() + per_deep_token * (one.depth_count > 2).sum()
        assert more - fewer == went_on > 0

    class NoGrad(Policy):  # as `Confidence` is
        ahead = False

        @torch.no_grad()
        def __call__(self, state):
            return torch.ones_like(state.map_logits(lambda logits: logits[:, 0], ahead=self.ahead))

    gradients = []
    for NoGrad.ahead in (False, True):
        model.zero_grad()
        model(ids, policy=NoGrad(), labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_trace_looks_once_at_each_pass(words, monkeypatch):
    """And its numbers are those of separate looks."""
    model = model_of("own", max_depth=3)
    count, product = [], Head.__call__
    monkeypatch.setattr(
        Head, "__call__", lambda *call, **options: count.append(len(call[1])) or product(*call, **options)
    )
    shared = trace(model, words, rows())
    assert sum(count) == 3 * sum(len(text.ids) - 1 for text in shared.texts)
    alone = RunningOutput.map_logits
    monkeypatch.setattr(RunningOutput, "map_logits", lambda self, tokens, f, ahead=False: alone(self, tokens, f))
    for one, other in zip(shared.texts, trace(model, words, rows()).texts, strict=True):
        for name in ("rank", "prob", "entropy", "max_prob", "top_ids", "top_probs", "decider", "depth", "final_prob"):
            assert (getattr(one, name) == getattr(other, name)).all()
    assert sum(count) == 8 * sum(len(text.ids) - 1 for text in shared.texts)


def test_measure_against_sorting():
    """With ties, as bfloat16 has them, and targets among the best and elsewhere; more than a block, and less."""
    generator = torch.Generator().manual_seed(0)
    for size, k in ((97, 5), (1000, 5), (1000, 1), (640, 12)):
        for coarse in (False, True):
            logits = torch.randn(24, size, generator=generator) * 4
            logits = (logits * 2).round() / 2 if coarse else logits
            target = torch.cat([logits[:12].topk(3).indices[:, 2], torch.randint(0, size, (12,), generator=generator)])
            found = measure(logits.clone(), target, k)
            for at in range(24):
                rank, prob, entropy, best, probs = plain(logits[at], target[at], k)
                assert found[at, 0] == rank
                assert found[at, 1:4].tolist() == pytest.approx([prob, entropy, probs[0]], rel=1e-4, abs=1e-7)
                assert logits[at, found[at, 4 : 4 + k].long()].tolist() == logits[at, best].tolist()
                if not coarse:
                    assert found[at, 4 : 4 + k].tolist() == best
                assert found[at, 4 + k :].tolist() == pytest.approx(probs, rel=1e-4)
    assert measure(torch.tensor([[1.0, 3, 3, -math.inf]]), torch.tensor([2]), 2)[0, [0, 4, 5]].tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match="the model computes NaN"):
        measure(torch.tensor([[1.0, math.nan]]), torch.tensor([0]), 1)


def test_more_passes_than_the_model_has_are_refused(words):
    with pytest.raises(ValueError, match="^max_depth=4: the model has max_depth=3; give at most that$"):
        trace(model_of(), words, rows(), max_depth=4)


def test_a_model_of_one_pass(words):
    model = model_of(max_depth=1, policy="never", decider=None)
    stats = statistics(trace(model, words, rows(), own_policy=True))
    assert len(stats["depths"]) == 1 and stats["passes"] == [] and stats["curves"] == {}
    assert stats["policies"]["own policy"]["accuracy"] == stats["policies"]["never"]["accuracy"]
    assert "## Who iterates" in as_markdown(stats)


# -- on disk ---------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill(after):
    def done(texts, of):
        if texts >= after:
            raise Killed

    return done


@pytest.mark.parametrize("attention", ["own", "duo"])
def test_resumed_equals_uninterrupted(words, tmp_path, attention):
    """Killed between batches, within a line, and within the lines of a batch: the same bytes in the end."""
    model = model_of(attention)
    once, again = tmp_path / "once.jsonl", tmp_path / "again.jsonl"
    whole = trace(model, words, rows(), once, tokens_per_batch=24)
    with pytest.raises(Killed):
        trace(model, words, rows(), again, tokens_per_batch=24, done=kill(3))
    content = once.read_bytes()
    assert content.startswith(again.read_bytes()) and len(again.read_bytes()) < len(content)
    assert load_trace(again).missing > 0
    lines = content.splitlines(keepends=True)
    for kept in (again.read_bytes(), b"".join(lines[:2]), b"".join(lines[:3]) + lines[3][:40], content[:-1], content):
        again.write_bytes(kept)
        trace(model, words, rows(), again, tokens_per_batch=24)
        assert again.read_bytes() == content
    again.write_bytes(b"".join(lines[:-1]) + b'{"row":\n')  # a disk that was full
    trace(model, words, rows(), again, tokens_per_batch=24)
    assert again.read_bytes() == content and len(list(tmp_path.iterdir())) == 2
    assert whole.missing == 0 and json.dumps(statistics(whole)) == json.dumps(statistics(load_trace(again)))


def test_loaded_equals_traced(words, tmp_path):
    for attention in ("own", "duo"):
        path = tmp_path / f"{attention}.jsonl"
        traced = trace(model_of(attention), words, rows(), path)
        loaded = load_trace(path)
        assert loaded.header == traced.header and loaded.strings == traced.strings
        assert loaded.string(loaded.texts[0].ids[0]).startswith("w") and loaded.string(96_000) == "<96000>"
        for one, other in zip(traced.texts, loaded.texts, strict=True):
            for name, value in vars(one).items():
                assert np.array_equal(value, getattr(other, name)), name


def test_damaged_files_are_named(words, tmp_path, monkeypatch):
    path = tmp_path / "trace.jsonl"
    model = model_of("own")
    trace(model, words, rows(), path)
    lines = path.read_text().splitlines(keepends=True)

    def refuses(content, message, load=True):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_trace(path) if load else trace(model, words, rows(), path)
        assert path.read_text() == content

    for broken in (lines[2][:50] + "\n", "12\n", lines[2].replace('"depth":[', '"depth":[1,')):
        refuses("".join([*lines[:2], broken, *lines[3:]]), "trace.jsonl: line 3 is damaged")
        refuses("".join([*lines[:2], broken, *lines[3:]]), "trace.jsonl: line 3 is damaged", load=False)
    refuses("hello\n", "trace.jsonl is no trace")
    refuses("hello\n", "trace.jsonl is no trace", load=False)
    refuses(lines[0].replace('"tah_trace":1', '"tah_trace":9') + lines[1], "of format 9; this version reads 1")
    other = lines[0].replace('"threshold":0.5', '"threshold":0.7')
    refuses(other + lines[1], r"other settings: threshold=0.7 \(now 0.5\)", load=False)
    sure = lines[0].replace('"policy":"decider"', '"policy":"confidence"').replace('"confidence_measure":null,', "")
    refuses(sure + lines[1], "does not say how its policy measured confidence")
    with pytest.raises(ValueError, match="is a directory; give the trace a file name"):
        trace(model, words, rows(), tmp_path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_trace(tmp_path / "none")

    path.unlink()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        trace(model, words, rows(), path)
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_text_is_not_continued(words, tmp_path):
    path = tmp_path / "trace.jsonl"
    trace(model_of("own"), words, rows(), path)
    before = path.read_bytes()
    model = model_of("own")
    with torch.no_grad():
        model.decider.output.bias += 1
    with pytest.raises(ValueError, match="other settings: weights"):
        trace(model, words, rows(), path)
    with pytest.raises(ValueError, match="other settings: .*contents"):
        trace(model_of("own"), words, rows((7, 12, 5)), path)
    assert path.read_bytes() == before


def test_pieces_of_text_with_characters_of_several_tokens(tiny_base, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = TaHForCausalLM.from_base(str(tiny_base), policy="confidence", threshold=0.9)
    written = "na\u00efve \U0001f600 <script>"
    path = tmp_path / "trace.jsonl"
    trace(model, tokenizer, [{"text": written}], path)
    (text,) = load_trace(path).texts
    assert "".join(text.pieces) == written + "<|im_end|>" and text.pieces.count("") == 1 + 3
    assert text.pieces[3] == "\u00ef" and text.pieces[2] == ""
    strings = load_trace(path).strings
    assert strings[int(text.ids[0])] == "n" and "\ufffd" not in "".join(strings.values())
    assert set(text.top_ids.ravel().tolist()) <= strings.keys()


def test_size_and_speed_of_lines():
    """20,000 tokens of a vocabulary of 150,000, two passes, five alternatives: under 5 MB."""
    generator = np.random.default_rng(0)
    n = 500
    sharp = generator.dirichlet(np.full(200, 0.02), (2, n)).astype(np.float32)
    sharp = -np.sort(-sharp, axis=-1)
    text = TracedText(
        row=123,
        part=0,
        ids=generator.integers(0, 150_000, n + 1),
        pieces=[" word"] * (n + 1),
        supervised=np.ones(n, bool),
        rank=generator.geometric(0.3, (2, n)) - 1,
        prob=sharp[:, :, 0],
        entropy=generator.random((2, n)),
        max_prob=sharp[:, :, 0],
        top_ids=generator.integers(0, 150_000, (2, n, 5)),
        top_probs=sharp[:, :, :5],
        decider=generator.random((1, n)).astype(np.float32),
        depth=1 + (generator.random(n) < 0.1),
        final_rank=np.zeros(n, int),
        final_prob=sharp[1, :, 0],
        final_top=generator.integers(0, 150_000, n),
    )
    line = as_line(text, {at: " word" for at in range(n)}, exact=False)
    assert len(line.encode()) / n * 20_000 < 5e6
    back, _ = parse_line(line, {"max_depth": 2, "top_k": 5})
    assert (back.decider == text.decider).all() and (back.depth == text.depth).all()
    again = as_line(back, {at: " word" for at in range(n)}, exact=False)
    assert again == line


# -- texts -----------------------------------------------------------------------------------------------------------


def test_texts_are_split_or_cut(tiny_base, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    page = tmp_path / "page.txt"
    page.write_text("abcdefghij" * 10)
    texts, dropped = texts_of(read_rows(str(page)), tokenizer, 33)
    assert [len(text.ids) for text in texts] == [33, 33, 33, 2] and [text.part for text in texts] == [0, 1, 2, 3]
    assert tokenizer.decode(np.concatenate([text.ids for text in texts])) == "abcdefghij" * 10 + "<|im_end|>"
    assert not dropped
    chat = tmp_path / "chat.jsonl"
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    lines = [{"messages": said}, {"messages": said[:1]}]
    chat.write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts, dropped = texts_of(read_rows(str(chat)), tokenizer, 28)
    assert [(text.row, text.part, len(text.ids)) for text in texts] == [(0, 0, 28)]
    assert dropped == {"cut at max_length": 1, "no assistant tokens": 1}
    assert not texts[0].supervised[:20].any() and texts[0].supervised[-1]
    with pytest.raises(ValueError, match="nothing to trace in the 1 rows of one: no assistant tokens"):
        texts_of([{"text": ""}], tokenizer, 10, "one")


def test_arguments_are_checked(words):
    model = model_of("own")
    for options, message in (
        ({"max_length": 65}, "max_length=65 must be at least 2 and at most 64"),
        ({"top_k": 98}, "top_k=98 must be at least 1 and at most 97"),
        ({"threshold": 2.0}, "threshold=2.0 must be a number"),
        ({"policy": "sometimes"}, "policy 'sometimes' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(model, words, rows(), **options)
    with pytest.raises(ValueError, match="has the token 97, but the model only 97"):
        trace(model, words, [{"input_ids": [1, 97], "supervised": [False, True]}])


# -- statistics ------------------------------------------------------------------------------------------------------


def made(rank, prob, decider=None, depth=None, texts=None, threshold=0.5, attention="own", **header):
    """A trace from [M][N] ranks and probabilities; `texts` [N] says which token belongs to which text."""
    rank, prob = np.array(rank), np.array(prob, float)
    M, N = rank.shape
    texts = np.array([0] * N if texts is None else texts)
    depth = np.array([1] * N if depth is None else depth)
    decider = None if decider is None else np.array(decider, float).reshape(M - 1, N)
    found = []
    for number in np.unique(texts):
        at = texts == number
        n = int(at.sum())
        last = depth[at] - 1, np.flatnonzero(at)
        found.append(
            TracedText(
                row=int(number),
                part=0,
                ids=np.arange(n + 1) % 3,
                pieces=[f"t{token % 3}" for token in range(n + 1)],
                supervised=np.ones(n, bool),
                rank=rank[:, at],
                prob=prob[:, at],
                entropy=-np.log(prob[:, at]),
                max_prob=np.maximum(prob[:, at], 0.4),
                top_ids=np.zeros((M, n, 1), int),
                top_probs=prob[:, at, None],
                decider=None if decider is None else decider[:, at],
                depth=depth[at],
                final_rank=rank[last],
                final_prob=prob[last],
                final_top=np.zeros(n, int),
            )
        )
    about = {
        "model": "made",
        "data": "data",
        "tokenizer": "t",
        "texts": len(found),
        "max_depth": M,
        "policy": "decider",
    }
    about |= {"threshold": threshold, "decider_threshold": threshold, "attention": attention, "final": "exact"}
    return Trace(about | {"decider": decider is not None} | header, found, {0: "zero", 1: "one", 2: "t|o"})


# Ten tokens of two texts. Depth 1 is wrong at 0-3; the second pass corrects 0 and 1 and breaks 4.
RANK = [[1, 1, 2, 5, 0, 0, 0, 0, 0, 0], [0, 0, 1, 3, 2, 0, 0, 0, 0, 0]]
PROB = [
    [0.2, 0.1, 0.2, 0.1, 0.5, 0.6, 0.9, 0.9, 0.9, 0.9],
    [0.4, 0.5, 0.3, 0.1, 0.2, 0.7, 0.8, 0.9, 0.9, 0.9],
]
SAYS = [0.9, 0.4, 0.8, 0.3, 0.7, 0.6, 0.2, 0.1, 0.05, 0.01]  # > 0.5: tokens 0, 2, 4, 5
DEPTH = [2, 1, 2, 1, 2, 2, 1, 1, 1, 1]
TEXTS = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]


def values(row):
    return {name: each["value"] if isinstance(each, dict) else each for name, each in row.items()}


def test_statistics_by_hand():
    stats = statistics(made(RANK, PROB, SAYS, DEPTH, TEXTS), least=1)
    assert (stats["tokens"], stats["texts"], stats["exact"]) == (10, 2, True)
    one, two = (values(row) for row in stats["depths"])
    assert (one["accuracy"], two["accuracy"]) == pytest.approx((0.6, 0.7))
    loss = -np.log(np.array(PROB)).mean(1)
    assert (one["loss"], two["loss"]) == pytest.approx(loss)
    change = values(stats["passes"][0])
    assert (change["corrected"], change["broken"]) == pytest.approx((2 / 4, 1 / 6))
    assert change["break_even_precision"] == pytest.approx((1 / 6) / (1 / 6 + 1 / 2))
    assert [change[name] for name in ("improved", "little", "worsened")] == pytest.approx([0.4, 0.4, 0.2])
    rows = {name: values(row) for name, row in stats["policies"].items()}
    assert list(rows) == [
        *("never", "always", "own policy", "decider", "confidence", "entropy"),
        *("random (equal share)", "confidence (equal share)", "entropy (equal share)"),
        *("oracle", "hindsight", "second choice"),
    ]
    decider = rows["decider"]  # corrects 0, breaks 4, of two wrong and two right ones
    assert decider == pytest.approx(
        {
            "threshold": 0.5,
            "iterated": 0.4,
            "mean_depth": 1.4,
            "accuracy": 0.6,
            "gain": 0.0,
            "loss": -np.log([0.4, 0.1, 0.3, 0.1, 0.2, 0.7, 0.9, 0.9, 0.9, 0.9]).mean(),
            "corrected": 1 / 4,
            "broken": 1 / 6,
            "precision": 2 / 4,
            "recall": 2 / 4,
            "break_even_precision": 0.5,
            "second_choice": 0.5,  # 0 becomes right, 4 and 5 wrong
        }
    )
    assert {**rows["own policy"], "threshold": 0.5} == pytest.approx(decider)
    assert rows["oracle"]["accuracy"] == pytest.approx(0.8) and rows["oracle"]["iterated"] == pytest.approx(0.4)
    assert rows["oracle"]["precision"] == 1 and rows["oracle"]["break_even_precision"] is None
    assert rows["second choice"]["accuracy"] == pytest.approx(0.8) and rows["second choice"]["loss"] is None
    assert rows["hindsight"]["iterated"] == pytest.approx(0.4)  # 0, 1, 2, 5
    assert rows["hindsight"]["accuracy"] == pytest.approx(0.8)
    random = rows["random (equal share)"]
    assert random["accuracy"] == pytest.approx(0.6 * 0.6 + 0.4 * 0.7) and random["precision"] == pytest.approx(0.4)
    assert random["loss"] == pytest.approx(0.6 * loss[0] + 0.4 * loss[1])
    assert rows["entropy (equal share)"]["iterated"] == pytest.approx(0.4)  # the four least probable: 0 to 3
    assert rows["entropy (equal share)"]["precision"] == 1
    assert rows["entropy"]["threshold"] == pytest.approx(0.3)  # nats: all but the four at 0.9
    assert rows["entropy"]["iterated"] == pytest.approx(0.6)
    assert rows["confidence"]["threshold"] == 0.7 and rows["confidence"]["iterated"] == 0
    gaps = values(stats["headroom"])
    assert gaps == pytest.approx({"over never": 0.2, "over always": 0.1, "over own policy": 0.2})
    wrong = stats["scores"]["decider"]["wrong"]
    assert wrong["auroc"]["value"] == pytest.approx(20 / 24) and wrong["share"] == 0.4
    assert sum(bin["tokens"] for bin in wrong["calibration"]) == 10
    tokens = {token["text"]: (token["count"], token["iterated"]) for token in stats["iterated_tokens"]}
    # Targets of a text are 1, 2, 0, 1, 2: iterated are 1, 0, 2 of the first and 1 of the second.
    assert tokens == {"one": (4, 0.5), "t|o": (4, 0.25), "zero": (2, 0.5)}
    assert [token["text"] for token in stats["iterated_tokens"]] == ["one", "zero", "t|o"]
    assert len(statistics(made(RANK, PROB, SAYS, DEPTH, TEXTS), least=3)["iterated_tokens"]) == 2
    page = as_markdown(stats)
    assert "| decider > 0.5 | 40.00 % (" in page and "`t\\|o`" in page and "Headroom of the oracle: 20.00 %" in page
    json.loads(json.dumps(stats, allow_nan=False))


def test_another_threshold_without_the_model():
    traced = made(RANK, PROB, SAYS, DEPTH, TEXTS)
    row = values(statistics(traced, threshold=0.75)["policies"]["decider"])
    assert (row["iterated"], row["accuracy"]) == pytest.approx((0.2, 0.7))  # 0 and 2


def random_trace(M=3, N=60, K=6, seed=0, coarse=False):
    generator = np.random.default_rng(seed)
    said = generator.random((M - 1, N))
    said = said.round(1) if coarse else said
    prob = generator.uniform(0.05, 0.95, (M, N))
    depth = 1 + (np.minimum.accumulate(said) > 0.5).sum(0)
    return made(generator.integers(0, 3, (M, N)), prob, said, depth, np.sort(generator.integers(0, K, N)))


@pytest.mark.parametrize("coarse", [False, True])
def test_curve_equals_policies_at_its_thresholds(coarse):
    """Three passes, token by token; the ends are `never` and `always`."""
    traced = random_trace(coarse=coarse)
    stats, tokens = statistics(traced, samples=50), traced.tokens()
    curve = stats["curves"]["decider"]
    for at, threshold in enumerate(curve["threshold"]):
        depth = []
        for token in range(60):
            d = 1
            while d < 3 and (threshold is None or tokens.decider[d - 1, token] > threshold):
                d += 1
            depth.append(d)
        right = [tokens.rank[d - 1, token] == 0 for token, d in enumerate(depth)]
        loss = [-math.log(tokens.prob[d - 1, token]) for token, d in enumerate(depth)]
        assert curve["iterated"][at] == pytest.approx(np.mean([d > 1 for d in depth]))
        assert curve["mean_depth"][at] == pytest.approx(np.mean(depth))
        assert curve["accuracy"][at] == pytest.approx(np.mean(right))
        assert curve["loss"][at] == pytest.approx(np.mean(loss))
    for name in ("decider", "confidence", "entropy"):
        curve = stats["curves"][name]
        for end, policy in ((0, "never"), (-1, "always")):
            for what in ("accuracy", "loss"):
                assert curve[what][end] == pytest.approx(stats["policies"][policy][what]["value"])
        assert (curve["iterated"][0], curve["iterated"][-1]) == (0, 1)
        assert curve["low"][-1] == pytest.approx(stats["policies"]["always"]["accuracy"]["low"])
        assert curve["iterated"] == sorted(curve["iterated"])


def test_random_at_equal_share_is_the_mean_over_choices():
    stats = statistics(random_trace(), samples=0)
    tokens = random_trace().tokens()
    depth = 1 + (np.minimum.accumulate(tokens.decider) > 0.5).sum(0)
    generator = np.random.default_rng(0)
    accuracy = [(tokens.rank[generator.permutation(depth) - 1, np.arange(60)] == 0).mean() for _ in range(4000)]
    row = values(stats["policies"]["random (equal share)"])
    assert row["accuracy"] == pytest.approx(np.mean(accuracy), abs=0.004)
    assert row["mean_depth"] == pytest.approx(depth.mean())


def test_intervals_draw_texts():
    text = np.repeat([0, 1, 2, 7], [5, 1, 3, 2])
    value = np.arange(11.0) % 4
    draw = Resampled(text, samples=400, seed=3)
    means = draw.mean(value)
    assert means[0] == pytest.approx(value.mean()) and len(means) == 401
    parts = [value[text == name] for name in (0, 1, 2, 7)]
    for sample in range(1, 401, 57):
        drawn = np.concatenate(
            [part for part, times in zip(parts, draw.weights[sample], strict=True) for _ in range(int(times))]
        )
        assert means[sample] == pytest.approx(drawn.mean())
    found = draw.estimate(means)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(means[1:], [0.025, 0.975])))
    assert found == Resampled(text, 400, seed=3).estimate(Resampled(text, 400, seed=3).mean(value))
    assert found != Resampled(text, 400, seed=4).estimate(Resampled(text, 400, seed=4).mean(value))
    alone = Resampled(np.zeros(3, int))
    assert alone.estimate(alone.mean(value[:3])) == {"value": 1.0, "low": None, "high": None}
    assert draw.estimate(draw.mean(value, value > 9))["value"] is None


def test_ranking_against_pairs():
    """AUROC: wanted tokens above unwanted ones, over pairs. Average precision: over thresholds, from recall gained."""
    generator = np.random.default_rng(0)
    score, text = generator.random(80).round(1), generator.integers(0, 9, 80)
    wanted = generator.random(80) < score
    weights = Resampled(text, samples=5).weights
    aurocs, precisions = ranking(score, wanted, text, weights)
    for sample, weight in enumerate(weights):
        each = weight[text]
        pairs = [
            (each[a] * each[b], (score[a] > score[b]) + (score[a] == score[b]) / 2)
            for a in np.flatnonzero(wanted)
            for b in np.flatnonzero(~wanted)
        ]
        assert aurocs[sample] == pytest.approx(sum(w * above for w, above in pairs) / sum(w for w, _ in pairs))
        total, recall, average = each[wanted].sum(), 0.0, 0.0
        for threshold in sorted(set(score), reverse=True):
            taken = score >= threshold
            hits = each[taken & wanted].sum()
            if each[taken].sum():
                average += (hits / total - recall) * hits / each[taken].sum()
            recall = hits / total
        assert precisions[sample] == pytest.approx(average)
    assert ranking(score, wanted)[0][0] == aurocs[0] and np.isnan(ranking(score, np.ones(80, bool))[0][0])


def test_compare_is_paired():
    one = made(RANK, PROB, SAYS, DEPTH, TEXTS)
    other = made([RANK[1], RANK[1]], [PROB[1], PROB[1]], SAYS, [1] * 10, TEXTS)
    found = compare(one, other)
    assert (found["texts"], found["tokens"]) == (2, 10)
    assert values(found["difference"]["never"])["accuracy"] == pytest.approx(0.1)
    assert found["difference"]["always"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert values(found["difference"]["own policy"])["accuracy"] == pytest.approx(0.1)
    same = compare(one, one)["difference"]["own policy"]["loss"]
    assert (same["low"], same["high"]) == (0.0, 0.0)
    with pytest.raises(
        ValueError, match="the first trace .made. and the second trace .made. were traced with different tokenizers"
    ):
        compare(one, made(RANK, PROB, texts=TEXTS, tokenizer="u"))
    other = made(RANK, PROB, texts=[0] * 4 + [1] * 6)
    with pytest.raises(ValueError, match="row 0 is another text"):
        compare(one, other)
    with pytest.raises(ValueError, match="no text in common"):
        compare(one, made(RANK, PROB, texts=[5] * 10))


def test_statistics_of_a_real_trace_equal_loops(words):
    """Accuracy, loss, corrected, broken and the own policy, counted token by token."""
    model = model_of("duo", max_depth=2)
    its = guided(model, (12,) * 6)
    traced = trace(model, words, its)
    stats = statistics(traced)
    right, loss, final, iterated = [], [], [], []
    for text, row in zip(traced.texts, its, strict=True):
        for at in range(11):
            if row["supervised"][at + 1]:
                right.append([text.rank[d, at] == 0 for d in (0, 1)])
                loss.append([-math.log(text.prob[d, at]) for d in (0, 1)])
                final.append(text.final_rank[at] == 0)
                iterated.append(text.depth[at] > 1)
    right = np.array(right)
    assert (
        stats["tokens"] == len(right) == statistics(traced)["tokens"] < statistics(traced, every=True)["tokens"] == 66
    )
    for d in (0, 1):
        assert values(stats["depths"][d])["accuracy"] == pytest.approx(right[:, d].mean())
        assert values(stats["depths"][d])["loss"] == pytest.approx(np.mean(loss, axis=0)[d], rel=1e-4)
    assert values(stats["passes"][0])["corrected"] == pytest.approx(right[~right[:, 0], 1].mean())
    assert values(stats["policies"]["own policy"])["accuracy"] == pytest.approx(np.mean(final))
    assert values(stats["policies"]["own policy"])["iterated"] == pytest.approx(np.mean(iterated))
    assert not stats["exact"] and 'attention "duo"' in as_markdown(stats)


# -- tuning ----------------------------------------------------------------------------------------------------------


def test_tune_chooses_the_threshold():
    traced = random_trace(N=200)
    for share in (0.0, 0.07, 0.5, 1.0):
        assert tune(traced, f"share={share}")["iterated"] == pytest.approx(share, abs=0.003)
    best = tune(traced, "loss")
    curve = statistics(traced, samples=0)["curves"]["decider"]
    tokens = traced.tokens()

    def loss_at(threshold):
        depth = 1 + (np.minimum.accumulate(tokens.decider) > threshold).sum(0)
        return -np.log(tokens.prob[depth - 1, np.arange(200)]).mean()

    every = [loss_at(threshold) for threshold in [*tokens.decider.ravel(), 0.0, 1.0]]
    assert best["loss"] == pytest.approx(min(every)) and best["loss"] <= min(curve["loss"]) + 1e-12
    assert loss_at(best["threshold"]) == pytest.approx(best["loss"])
    coarse = random_trace(N=200, coarse=True)
    assert tune(coarse, "loss")["loss"] == pytest.approx(
        min(statistics(coarse, samples=0)["curves"]["decider"]["loss"])
    )
    with pytest.raises(ValueError, match="has no decider to tune"):
        tune(made(RANK, PROB), "loss")
    for target in ("share=2", "share=", "share", "shares=0.1", "less", "share=nan"):
        with pytest.raises(ValueError, match=f"target '{target}' is not one of loss, share=X"):
            tune(traced, target)


def test_best_threshold_parts_no_equal_probabilities():
    from tah.stats.threshold import Judged

    p = np.array([0.9, 0.5, 0.5, 0.1])
    judged = Judged(p, p > 0, np.array([1.0, 2.0, 1.0, 1.0]), np.array([0.5, 1.0, 1.5, 3.0]))
    assert threshold_for_loss(judged) == pytest.approx(0.3)  # all of 0.5 go: +1 and -0.5


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_base, tmp_path, monkeypatch):
    """A TaH checkpoint with a decider that is not sure, and a page of text beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = TaHForCausalLM.from_base(str(tiny_base), policy="decider", attention="own", lora_rank=4)
    torch.nn.init.normal_(model.decider.output.weight, std=0.5)
    model.save_pretrained(tmp_path / "model")
    for path in [*tiny_base.glob("*token*"), tiny_base / "chat_template.jinja"]:
        shutil.copy(path, tmp_path / "model")
    (tmp_path / "page.txt").write_text("So the bell rings, but nobody hears it. But the mill is gone. " * 4)
    return tmp_path / "model"


def works(capsys, *arguments):
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def fails(capsys, *arguments):
    """The one line of a command that fails with exit code 2 and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "is a base model" not in line]
    assert len(lines) == 1 and lines[0].startswith("tah: ") and out.strip() == "", err
    assert sorted(Path.cwd().rglob("*")) == before
    return lines[0]


def test_trace_command(capsys, checkpoint, tiny_base):
    page = works(capsys, "trace", checkpoint, "page.txt", "-o", "out/trace.jsonl", "--max-length", "50")
    assert page.startswith(f"# {checkpoint} on page.txt") and "| decider > 0.5 |" in page
    before = Path("out/trace.jsonl").read_bytes()
    again = works(capsys, "trace", checkpoint, "page.txt", "-o", "out/trace.jsonl", "--max-length", "50", "--json")
    assert Path("out/trace.jsonl").read_bytes() == before
    stats = json.loads(again)
    assert stats == json.loads(json.dumps(statistics(load_trace("out/trace.jsonl"))))
    assert stats["texts"] == 5 and stats["about"]["policy"] == "decider" and stats["exact"]
    few = json.loads(works(capsys, "trace", checkpoint, "page.txt", "--max-length", "50", "--limit", "2", "--json"))
    assert few["texts"] == 2
    base = works(capsys, "trace", tiny_base, "page.txt", "--policy", "confidence", "--threshold", "0.9", "--every")
    assert "policy confidence (probability) at 0.9" in base and 'attention "duo"' in base and "| decider" not in base


def test_trace_refuses(capsys, checkpoint, tiny_base):
    model = str(checkpoint)
    assert "unknown policy 'desider'; did you mean decider? " in fails(
        capsys, "trace", model, "page.txt", "--policy", "desider"
    )
    assert "there is no such file" in fails(capsys, "trace", model, "./none.jsonl")
    for name, content, message in (
        ("empty.txt", "", "is empty: it has no text"),
        ("empty.jsonl", "", "is empty: it has no rows"),
        ("one.jsonl", '{"text": ""}\n', "nothing to trace in the 1 rows of one.jsonl: no assistant tokens"),
        ("form.jsonl", '{"words": "a"}\n', "has the columns words; needed: messages"),
        ("page.pdf", "%PDF", "a .pdf file is not one of .jsonl, .json, .parquet, .csv, .txt, .md"),
        (
            "cut.jsonl",
            '{"text": "a"}\n{"text": "b',
            "data 'cut.jsonl' cannot be read: line 2 is not JSON (Unterminated string",
        ),
        (
            "half.jsonl",
            '\n{"text": "a \\ud800 b"}\n',
            "'half.jsonl' cannot be read: line 2 has half of a surrogate pair",
        ),
        ("other.jsonl", '{"input_ids": [1, 9999], "supervised": [false, true]}\n', "made for another tokenizer"),
    ):
        Path(name).write_text(content)
        said = fails(capsys, "trace", model, name)
        assert message in said and "data.columns" not in said  # which only recipes have
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "'bytes.txt' cannot be read" in fails(capsys, "trace", model, "bytes.txt")
    assert "max_length=65 must be at least 2 and at most 64" in fails(
        capsys, "trace", model, "page.txt", "--max-length", "65"
    )
    Path("trace.jsonl").write_text("something else\n")
    assert "trace.jsonl is no trace" in fails(capsys, "trace", model, "page.txt", "-o", "trace.jsonl")
    for path in checkpoint.glob("*token*"):
        path.unlink()
    assert "has no usable tokenizer" in fails(capsys, "trace", model, "page.txt")


def test_tune_writes_the_threshold_and_nothing_else(capsys, checkpoint, monkeypatch):
    def hashes():
        files = [path for path in checkpoint.iterdir() if path.name != "config.json"]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    config, others = checkpoint / "config.json", hashes()
    before = config.read_text()
    said = works(capsys, "tune", checkpoint, "page.txt", "--target", "share=0.25")
    assert "(was 0.5): 2" in said and f"written to {config}" in said and hashes() == others
    after = config.read_text()
    threshold = json.loads(after)["threshold"]
    assert threshold != 0.5 and after.replace(f'"threshold": {threshold!r}', '"threshold": 0.5') == before
    model = TaHForCausalLM.from_pretrained(checkpoint)
    assert model.config.threshold == threshold
    stats = json.loads(works(capsys, "trace", checkpoint, "page.txt", "--json"))
    assert stats["policies"]["own policy"]["iterated"]["value"] == pytest.approx(0.25, abs=0.01)
    found = json.loads(works(capsys, "tune", checkpoint, "page.txt", "--target", "loss", "--json"))
    assert found["before"] == threshold and json.loads(config.read_text())["threshold"] == found["threshold"]
    best = json.loads(works(capsys, "trace", checkpoint, "page.txt", "--json"))
    assert best["policies"]["own policy"]["loss"]["value"] == pytest.approx(found["loss"], rel=1e-4)

    before = config.read_text()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in fails(capsys, "tune", checkpoint, "page.txt", "--target", "share=0.1")
    assert config.read_text() == before and hashes() == others


def test_tune_refuses(capsys, checkpoint, tiny_base):
    assert "target 'share=7' is not one of" in fails(capsys, "tune", checkpoint, "page.txt", "--target", "share=7")
    assert "is not a TaH checkpoint" in fails(capsys, "tune", tiny_base, "page.txt", "--target", "loss")
    in_the_box = (FOLLOW / "config.json").read_bytes()
    assert "follow-tah is no directory of yours" in fails(capsys, "tune", "follow-tah", "page.txt", "--target", "loss")
    assert (FOLLOW / "config.json").read_bytes() == in_the_box
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"policy": "always"}))
    message = fails(capsys, "tune", checkpoint, "page.txt", "--target", "loss")
    assert "has the policy 'always', which knows no threshold" in message


@pytest.mark.parametrize("measure", ["probability", "entropy"])
def test_tune_confidence(capsys, checkpoint, measure):
    config = checkpoint / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"policy": "confidence", "confidence_measure": measure})
    )
    works(capsys, "tune", checkpoint, "page.txt", "--target", "share=0.3")
    stats = json.loads(works(capsys, "trace", checkpoint, "page.txt", "--json"))
    assert stats["policies"]["own policy"]["iterated"]["value"] == pytest.approx(0.3, abs=0.01)


def test_throughput_is_measured(words, tmp_path):
    found = throughput(model_of("duo", max_depth=2), words, (20, 30), repeats=1, tokens_per_batch=32)
    assert found["ratio"]["plain"] == 1 and set(found["ratio"]) == {"plain", "trace", "trace, run again"}
    assert all(rate > 0 for rate in found["tokens_per_second"].values())
    save(found, markdown(found), tmp_path, "bench_trace")
    assert json.loads((tmp_path / "bench_trace.json").read_text()) == found
    table = (tmp_path / "bench_trace.md").read_text()
    assert "| run | tokens/s | ratio to 2 plain passes |" in table and "| trace | " in table


def test_help_needs_no_torch():
    """`tah trace --help` answers at once: the commands' module imports nothing heavy."""
    import subprocess

    code = (
        "import sys, importlib.util as u\n"
        "s = u.spec_from_file_location('tah_cli.app', 'src/tah/cli.py')\n"
        "m = sys.modules['tah_cli.app'] = u.module_from_spec(s)\n"
        "s.loader.exec_module(m)\n"
        "if 'tah_cli.see' not in sys.modules: m._register('cli_see')\n"
        "assert m.run(['trace', '--help']) == 0 and m.run(['tune', '--help']) == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Measure what iterating corrects and breaks." in done.stdout
