"""Scores of a validation set, and the threshold at which a reasoner stops early.

N rows, K segments. A trace is {name: tensor (N, K)} of numbers after each segment (see models/hrm.py).
"""

import math

import torch

THRESHOLDS = -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.inf  # of the halting logit
SLACK = 0.005  # share of right answers that stopping early may cost on the rows that chose the threshold


def stops(halt, threshold):
    """Return the segment after which each row stops (N,): the first with halt (N, K) above `threshold`, else K - 1."""
    above = halt > threshold
    return torch.where(above.any(1), above.int().argmax(1), halt.shape[1] - 1)


def pick_threshold(trace):
    """Return the threshold that stops soonest among those within SLACK of the best share of right answers."""
    results = []
    for threshold in THRESHOLDS:
        last = stops(trace["halt"], threshold)
        right = trace["right"].gather(1, last[:, None]).double().mean().item()
        results.append((right, last.double().mean().item(), threshold))
    best = max(right for right, _, _ in results)
    return min((used, threshold) for right, used, threshold in results if right >= best - SLACK)[1]


def summarize(traces, segments):
    """Return (row of metrics after `segments` segments, halting threshold; inf without halting) of batches.

    Each trace also has, per row (N,): labels, their number; blanks, the cells to fill in; bytes, of the text of the
    answer; short, whether the prompt is a short one. Blanks, bytes and short may be missing. Rows with a short prompt
    get a score of their own.
    """
    trace = {name: torch.cat([part[name] for part in traces]) for name in traces[0]}
    numbers = {name: values.double() for name, values in trace.items()}
    last = segments - 1
    nats = numbers["nats"][:, last].sum().item()
    right = numbers["right"][:, last]
    threshold = math.inf
    row = dict(loss=nats / numbers["labels"].sum().item(), exact=right.mean().item())
    if "blanks" in numbers:
        row["cells"] = (numbers["hits"][:, last].sum() / numbers["blanks"].sum().clamp_min(1)).item()
    if "bytes" in numbers:
        row["bpb"] = nats / math.log(2) / max(1.0, numbers["bytes"].sum().item())
    if "short" in trace and trace["short"].any():
        short = trace["short"]
        row |= dict(exact=right[~short].mean().item(), exact_short=right[short].mean().item())
    if "halt" in trace:
        threshold = pick_threshold(trace)
        stop = stops(trace["halt"], threshold)
        row["exact_halting"] = numbers["right"].gather(1, stop[:, None]).mean().item()
        row["segments"] = stop.double().mean().item() + 1
    return row, threshold
