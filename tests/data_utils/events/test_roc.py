"""ROC curves against scikit-learn and against counting by hand."""

import numpy as np
import pytest

from data_utils.events.roc import POINTS, auc, compare, roc


def scores(n, m, ties):
    rng = np.random.default_rng(n + m)
    signal, background = rng.normal(0.7, 1, n), rng.normal(0, 1, m)
    return (signal.round(1), background.round(1)) if ties else (signal, background)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n, m", [(1, 1), (1, 7), (60, 40), (3000, 500)])
def test_areas_and_curves_are_those_of_scikit_learn(n, m, ties):
    metrics = pytest.importorskip("sklearn.metrics")
    signal, background = scores(n, m, ties)
    truth, both = np.repeat([1, 0], [n, m]), np.concatenate([signal, background])
    assert auc(signal, background) == pytest.approx(metrics.roc_auc_score(truth, both), abs=1e-12)
    false, true, thresholds = metrics.roc_curve(truth, both, drop_intermediate=False)
    theirs = dict(zip(thresholds, zip(false, true, strict=True), strict=True))
    points = list(zip(*roc(signal, background), strict=True))
    assert len(points) <= 2 * POINTS and points[-1][1:] == (1, 1)
    assert len(points) == len(thresholds) - 1 or n + m > POINTS  # theirs begin with infinity
    for threshold, *shares in points:
        assert shares == pytest.approx(theirs[threshold], abs=1e-12)


def test_areas_by_counting():
    assert auc(np.array([2.0, 1.0]), np.array([1.0, 0.0, 3.0])) == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 0) / 6)
    assert auc(np.array([0.0]), np.array([1.0, 2.0])) == 0 and auc(np.array([3.0]), np.array([1.0, 2.0])) == 1


def test_groups_are_the_file_and_its_labels():
    background = dict(label=np.zeros(4, int), rec_tokens=np.arange(4.0), rec_types=np.ones(4))
    signal = dict(label=np.array([0, 5, 5]), rec_tokens=np.array([9.0, 8, -1]), rec_types=np.ones(3))
    groups = ("b", 3), ("b label 0", 1), ("b label 5", 2)
    rows = compare(background, signal, "b")
    assert [(row["score"], row["signal"], row["events"]) for row in rows] == [
        (score, *group) for score in ("rec_tokens", "rec_types") for group in groups
    ]
    assert [row["auc"] for row in rows] == [pytest.approx(2 / 3), 1, 0.5, 0.5, 0.5, 0.5]
    assert len(compare(background, signal | dict(label=np.zeros(3)), "b")) == 2
    rows = compare(signal, signal, "b")  # each label against the rest
    assert [(row["signal"], row["events"], row["background_events"]) for row in rows[:2]] == [
        ("b label 0", 1, 2),
        ("b label 5", 2, 1),
    ]
    assert [row["auc"] for row in rows[:2]] == [1, 0] and compare(background, background, "b") == []
