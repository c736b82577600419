"""ROC curves of scores that are higher for signal events than for background events, and their areas."""

import numpy as np

POINTS = 300  # of a curve in a file, evenly spaced; as many more where little background passes


def auc(signal, background):
    """Return the area under the ROC curve: how often signal (N,) scores above background (M,); ties count half."""
    ordered = np.sort(background)
    below = np.searchsorted(ordered, signal, "left") + np.searchsorted(ordered, signal, "right")
    return float(below.mean() / 2 / len(ordered))


def roc(signal, background):
    """Return thresholds (K,), falling, and the shares of background and of signal that reach them, (K,) each.

    At most 2 POINTS thresholds are kept; those that are kept are exact.
    """
    thresholds = np.unique(np.concatenate([signal, background]))[::-1]
    even = np.linspace(0, len(thresholds) - 1, POINTS)
    first = np.geomspace(1, len(thresholds), POINTS) - 1
    thresholds = thresholds[np.unique(np.concatenate([even, first]).round().astype(int))]
    passing = [1 - np.searchsorted(np.sort(x), thresholds, "left") / len(x) for x in (background, signal)]
    return thresholds, *passing


def compare(background, signal, name):
    """Compare tables of scores: return a list of dicts, one for each score and each group of signal events.

    background, signal: {column: (N,)} with `label` and scores. The groups are all signal events, called `name`, and
    those of each label if there are several. If both are the same table, the groups are its labels, and the background
    of each is the rest. A dict: score, signal, events, background_events, auc, and the curve, which `roc` returns.
    """
    labels = signal["label"]
    same = signal is background
    groups = {} if same else {name: np.ones(len(labels), bool)}
    if len(np.unique(labels)) > 1:
        groups |= {f"{name} label {label}": labels == label for label in np.unique(labels)}
    curves = []
    for score in [column for column in signal if column.startswith("rec_")]:
        for group, members in groups.items():
            pair = signal[score][members], signal[score][~members] if same else background[score]
            counts = dict(events=len(pair[0]), background_events=len(pair[1]))
            curves.append(dict(score=score, signal=group, **counts, auc=auc(*pair), curve=roc(*pair)))
    return curves
