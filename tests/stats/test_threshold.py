"""Thresholds for a share of tokens or the lowest loss, and the quality of a decider, by hand on few tokens."""

import numpy as np
import pytest

from tah.stats.threshold import Decisions, quality, threshold_for_loss, threshold_for_share


def decisions():
    return Decisions(
        probability=np.array([0.9, 0.8, 0.3, 0.2, 0.1]),
        hard=np.array([True, False, True, False, False]),
        loss_one=np.array([2.0, 0.1, 1.0, 0.1, 0.1]),
        loss_two=np.array([0.5, 0.6, 0.2, 0.9, 0.9]),
    )


def test_thresholds():
    p = decisions().probability
    assert threshold_for_share(p, 0.4) == pytest.approx(0.55)
    assert threshold_for_share(p, 0.0) == pytest.approx(0.95)
    assert threshold_for_share(p, 1.0) == pytest.approx(0.05)
    assert threshold_for_loss(decisions()) == pytest.approx(0.25)  # gains 1.5, -0.5, 0.8, ...: best after three
    worse = decisions()
    worse.loss_two = worse.loss_one + 1
    assert (worse.probability > threshold_for_loss(worse)).sum() == 0


def test_quality():
    found = quality(decisions(), 0.55)
    assert found["precision"] == 0.5 and found["recall"] == 0.5 and found["iterated_share"] == 0.4
    assert found["auroc"] == pytest.approx(5 / 6) and found["hard_share"] == 0.4
    assert found["average_precision"] == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert found["loss"]["decider"] == pytest.approx((0.5 + 0.6 + 1.0 + 0.1 + 0.1) / 5)
    assert found["loss"]["oracle"] == pytest.approx((0.5 + 0.1 + 0.2 + 0.1 + 0.1) / 5)
    assert sum(b["tokens"] for b in found["calibration"]) == 5
    none = quality(decisions(), 1.0)
    assert none["precision"] is None and none["recall"] == 0


def test_best_threshold_parts_no_equal_probabilities():
    p = np.array([0.9, 0.5, 0.5, 0.1])
    tied = Decisions(p, p > 0, np.array([1.0, 2.0, 1.0, 1.0]), np.array([0.5, 1.0, 1.5, 3.0]))
    assert threshold_for_loss(tied) == pytest.approx(0.3)  # all of 0.5 go: +1 and -0.5
