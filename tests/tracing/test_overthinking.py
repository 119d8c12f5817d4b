"""The statistics of a trace: by hand, and against plain loops."""

import json
import math

import numpy as np
import pytest

from helpers.traces import guided, made, model_of, random_trace, trace
from tah.tracing.overthinking import compare, statistics
from tah.tracing.tables import as_markdown

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
        ValueError, match="the first trace .made. and the second trace .made. have different tokenizers"
    ):
        compare(one, made(RANK, PROB, texts=TEXTS, tokenizer="u"))
    other = made(RANK, PROB, texts=[0] * 4 + [1] * 6)
    with pytest.raises(ValueError, match="row 0 is not the same text"):
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
