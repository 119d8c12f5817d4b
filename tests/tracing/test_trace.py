"""Traces: against the slow reference and plain loops, and what may be traced."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.families import tiny
from helpers.models import shake, token_ids
from helpers.reference import by_labels, by_policy, reference, unused
from helpers.scores import plain_scores
from helpers.traces import fails, guided, model_of, rows, trace, works
from tah import TaHForCausalLM
from tah.benchmarks.bench_trace import markdown, throughput
from tah.benchmarks.measure import save
from tah.core import fast
from tah.core.fast import RememberingOutput
from tah.core.head import Head
from tah.policy import Confidence, DepthState, Policy
from tah.tracing.overthinking import CONFIDENCE, ENTROPY, compare, of_nats, statistics
from tah.tracing.tables import as_markdown, different_weights
from tah.tracing.texts import read_rows, texts_of
from tah.tracing.trace import TraceRequest
from tah.tracing.trace_file import load_trace


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
                map_pass_logits=unused,
                embeds=unused,
            )
            said[depth, position] = model.decider(state).sigmoid().item()
            return True

        full = reference(model, torch.from_numpy(text.ids[:-1]).long(), everyone)
        for d in range(model.config.max_depth):
            for at, target in enumerate(text.ids[1:]):
                rank, prob, entropy, best, probs = plain_scores(full.depth_logits[d][at], target, 3)
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
    derived, run_again = (trace(model, words, its, policy=policy, run_policy=own) for own in (None, True))
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
    wrong = trace(model, words, rows(), run_policy=False)
    assert (traced.header["final"], wrong.header["final"]) == ("run", "approximate")
    for text in traced.texts:
        truth = reference(model, torch.from_numpy(text.ids[:-1]).long(), by_policy(model.decider, 0.5))
        assert (truth.depth_count == torch.from_numpy(text.depth)).all()
        for at, target in enumerate(text.ids[1:]):
            rank, prob, _, best, _ = plain_scores(truth.logits[at], target, 1)
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
        tops = [plain_scores(logits, 0, 1)[3][0] for logits in truth.logits]
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
def test_a_look_ahead_gives_what_a_look_of_its_own_does(family, monkeypatch):
    """The next inputs from the logits a policy looked at, also where only some tokens go on: bit for bit, and one
    product with the head less for each pass that is not the last."""
    monkeypatch.setattr(fast, "MEMO", 0)  # else the logits of all tokens are kept, which saves the same products
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
    count, finish = [], Head.finish
    monkeypatch.setattr(Head, "finish", lambda head, logits: count.append(len(logits)) or finish(head, logits))
    shared = trace(model, words, rows())
    assert sum(count) == 3 * sum(len(text.ids) - 1 for text in shared.texts)
    alone = RememberingOutput.map_logits
    monkeypatch.setattr(RememberingOutput, "map_logits", lambda self, tokens, f, ahead=False: alone(self, tokens, f))
    for one, other in zip(shared.texts, trace(model, words, rows()).texts, strict=True):
        for name in ("rank", "prob", "entropy", "max_prob", "top_ids", "top_probs", "decider", "depth", "final_prob"):
            assert (getattr(one, name) == getattr(other, name)).all()
    assert sum(count) == 8 * sum(len(text.ids) - 1 for text in shared.texts)


def test_a_model_that_is_not_finite_is_refused(words):
    model = model_of("own")
    with torch.no_grad():
        model.base.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="computes NaN"):
        trace(model, words, rows(), policy="never")


def test_more_passes_than_the_model_has_are_refused(words):
    with pytest.raises(ValueError, match="^max_depth=4 must be at most 3, the max_depth of the model$"):
        trace(model_of(), words, rows(), max_depth=4)


def test_a_model_of_one_pass(words):
    model = model_of(max_depth=1, policy="never", decider=None)
    stats = statistics(trace(model, words, rows(), run_policy=True))
    assert len(stats["depths"]) == 1 and stats["passes"] == [] and stats["curves"] == {}
    assert stats["policies"]["own policy"]["accuracy"] == stats["policies"]["never"]["accuracy"]
    assert "## Policies" in as_markdown(stats)


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
    with pytest.raises(ValueError, match="no row to trace among the 1 rows of one: no assistant tokens"):
        texts_of([{"text": ""}], tokenizer, 10, "one")


def test_arguments_are_checked(words):
    model = model_of("own")
    for options, message in (
        ({"max_length": 65}, "max_length=65 must be at least 2 and at most 64"),
        ({"top_k": 98}, "top_k=98 must be at least 1 and at most 97"),
        ({"threshold": 2.0}, "threshold=2.0 must be a number"),
        ({"policy": "sometimes"}, "unknown policy 'sometimes'; choose from"),
    ):
        with pytest.raises(ValueError, match=message):
            trace(model, words, rows(), **options)
    with pytest.raises(ValueError, match="has the token 97, but the model has only 97 tokens"):
        trace(model, words, [{"input_ids": [1, 97], "supervised": [False, True]}])


# -- the command -------------------------------------------------------------------------------------------------------


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
        ("empty.txt", "", "empty.txt has no text"),
        ("empty.jsonl", "", "is empty: it has no rows"),
        ("one.jsonl", '{"text": ""}\n', "no row to trace among the 1 rows of one.jsonl: no assistant tokens"),
        ("form.jsonl", '{"words": "a"}\n', "has the columns words; needed: messages"),
        (
            "page.pdf",
            "%PDF",
            "the file suffix .pdf is not supported; use one of .jsonl, .json, .parquet, .csv, .txt, .md",
        ),
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
    assert "trace.jsonl is not a trace" in fails(capsys, "trace", model, "page.txt", "-o", "trace.jsonl")
    for path in checkpoint.glob("*token*"):
        path.unlink()
    assert "has no usable tokenizer" in fails(capsys, "trace", model, "page.txt")


def test_throughput_is_measured(words, tmp_path):
    found = throughput(model_of("duo", max_depth=2), words, (20, 30), TraceRequest(tokens_per_batch=32), repeats=1)
    assert found["ratio"]["plain"] == 1 and set(found["ratio"]) == {"plain", "trace", "trace, run again"}
    assert all(rate > 0 for rate in found["tokens_per_second"].values())
    save(found, markdown(found), tmp_path, "bench_trace")
    assert json.loads((tmp_path / "bench_trace.json").read_text()) == found
    table = (tmp_path / "bench_trace.md").read_text()
    assert "| run | tokens/s | ratio to 2 plain passes |" in table and "| trace | " in table


@pytest.mark.parametrize("policy", ["decider", "confidence", "always"])
@pytest.mark.parametrize("attention", ["own", "duo"])
def test_of_a_mixture(words, attention, policy):
    """The predictions under the policy are those of a forward: the weights are the policy's, in both runs."""
    mix = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0}
    model = model_of(attention, threshold=0.5 if policy == "decider" else 0.97, policy=policy, **mix)
    traced = trace(model, words, rows())
    assert traced.header["output"] == "mixture"
    for text in traced.texts:
        ids = torch.from_numpy(text.ids).long()
        out = model(ids[None, :-1])
        prob = out.logits[0].exp().gather(1, ids[1:, None])[:, 0]
        assert text.depth.tolist() == out.depth_count[0].tolist()
        assert text.final_prob == pytest.approx(prob.detach().numpy(), rel=2e-4)
        if policy == "decider":
            said = out.continue_prob[0, :, 0].detach().numpy()
            assert text.decider[0] == pytest.approx(said, abs=1e-5)
    depths = np.concatenate([text.depth for text in traced.texts])
    assert (len(np.unique(depths)) == 1) == (policy == "always")


MIXES = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0}


def own_losses(model, texts):
    """Loss of supervised tokens by the model's own forward, under each policy that a trace has a row for."""
    rules = {"never": {"policy": "never"}, "own policy": {}, "always": {"policy": "always"}}
    rules["decider"] = {"policy": "decider"}
    rules["confidence"] = {"policy": "confidence", "threshold": CONFIDENCE}
    rules["entropy"] = {"policy": Confidence("entropy"), "threshold": of_nats(ENTROPY)}
    found = {}
    for name, rule in rules.items():
        losses = []
        for text in texts:
            ids = torch.from_numpy(text.ids).long()
            logp = model(ids[None, :-1], **rule).logits[0].log_softmax(-1)
            losses.append(-logp.gather(1, ids[1:, None])[:, 0][torch.from_numpy(text.supervised)])
        found[name] = torch.cat(losses).mean().item()
    return found


@pytest.mark.parametrize("policy", ["decider", "confidence", "always", "random"])
def test_each_row_of_a_mixture_is_what_the_model_does(words, policy):
    """A trace has the weights of one policy. Rows of policies with other weights are left out."""
    model = model_of("own", policy=policy, random_rate=0.4, **MIXES)
    traced = trace(model, words, rows())
    stats = statistics(traced)
    own = own_losses(model, traced.texts)
    kept = {name: row["loss"]["value"] for name, row in stats["policies"].items() if name in own}
    assert kept == pytest.approx({name: own[name] for name in kept}, rel=1e-4)
    assert abs(own["always"] - own["decider"]) > 1e-3
    certain = policy in ("always", "random")
    assert kept.keys() == {"never", "own policy", "always" if certain else policy}
    assert ("oracle" in stats["policies"]) == ("hindsight" in stats["policies"]) == bool(stats["headroom"]) == certain
    assert stats["curves"].keys() == ({policy} if not certain else set())
    text = as_markdown(stats)
    assert "The output is a mixture." in text and ("Headroom" in text) == certain
    assert "exact" not in text  # with attention own all rows that are left are


def test_two_traces_of_a_mixture_with_different_weights(words):
    model = model_of("own", **MIXES)
    one, other = (trace(model, words, rows(), policy=policy) for policy in ("decider", "always"))
    assert compare(one, other)["difference"].keys() == {"never", "own policy"}
    assert compare(other, other)["difference"].keys() == {"never", "always", "own policy"}
    weights = [statistics(traced, samples=2)["weights"] for traced in (one, other)]
    assert "decider's continue probabilities" in different_weights(*weights)
    assert different_weights(weights[0], weights[0]) == ""


def test_a_duo_mixture_names_its_exact_rows(words):
    text = as_markdown(statistics(trace(model_of("duo", **MIXES), words, rows())))
    assert "only these rows are exact: never, own policy." in text


def test_the_header_of_drawn_decisions_has_no_threshold(words):
    model = model_of("own", decision="sample", **MIXES)
    traced = trace(model, words, rows())
    assert traced.header["threshold"] is None
    assert "policy decider, decisions drawn." in as_markdown(statistics(traced))
    given = trace(model, words, rows(), policy=model.decider)  # as an object
    assert "decisions drawn." in as_markdown(statistics(given))
