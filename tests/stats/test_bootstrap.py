"""Intervals by resampling texts, and rankings, against plain counting."""

import numpy as np
import pytest

from tah.stats.bootstrap import Resampled, ranking


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
