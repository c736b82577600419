"""Scores of held-out pages against plain loops."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_utils import distributed
from data_utils.pages import evaluate as module
from data_utils.pages.evaluate import auc, examine, judge, report, traces
from data_utils.pages.scores import score_answers
from models.glyphs import PADDING
from models.optim.ema import Average
from models.planning import select
from tests.models.test_multimodal import KNOWN, PLAIN, batch, build, one_thread  # noqa: F401

CPU = dict(device=torch.device("cpu"), autocast=nullcontext())
T, N, K = 5, 12, 3


def random_traces(name, seed=0, paths=K):
    """Return held-out pages and random traces of them, with answers that are right in part or in full."""
    g, samples = torch.Generator().manual_seed(seed), batch(build([name], **PLAIN), name, N)
    held = {key: samples[key] for key in ("page", "target", "id")}
    wanted = held["target"][:, None, None].expand(N, T, paths, -1)
    share = torch.rand((N, T, paths, 1), generator=g) * 1.6
    hit = torch.rand(wanted.shape, generator=g) < share
    answers = torch.where(hit, wanted, (wanted + 1) % 95)
    halt = torch.randn((N, T, paths), generator=g) - 0.5
    nats = torch.rand((N, T, paths), generator=g)
    return held, dict(answers=answers, halt=halt, nats=nats)


def test_auc_counts_pairs():
    draw = np.random.default_rng(0)
    for n in (1, 2, 7, 30):
        for _ in range(5):
            values, good = draw.permutation(n).astype(float), draw.random(n) < 0.4
            pairs = [(a > b) for a in values[good] for b in values[~good]]
            assert auc(values, good) == pytest.approx(np.mean(pairs) if pairs else math.nan, nan_ok=True)


@pytest.mark.parametrize("ties", [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
def test_auc_does_not_depend_on_the_order_of_ties(ties):
    values, good = np.array(ties), np.array([True, True, False, False])
    pairs = [(a > b) + (a == b) / 2 for a in values[good] for b in values[~good]]
    assert auc(values, good) == pytest.approx(np.mean(pairs))
    assert auc(values[::-1], good[::-1]) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("name", ["fill", "sudoku4", "arc"])
@pytest.mark.parametrize("how", ["score", "first_to_halt", "vote"])
def test_judging_equals_a_loop(name, how):
    task, (held, trace) = KNOWN[name], random_traces(name)
    row = judge(task, held, trace, how)
    targets, answers, halt = held["target"].numpy(), trace["answers"].numpy(), trace["halt"].numpy()
    path = select(trace["answers"].movedim(0, 1), trace["halt"].movedim(0, 1), how).T.numpy()  # (n, T)

    def right(b, t, k):
        return all(a == w or w == PADDING for a, w in zip(answers[b, t, k], targets[b], strict=True))

    def exact(choose):  # choose(b) -> step, path
        return np.mean([right(b, *choose(b)) for b in range(N)])

    assert row["exact"] == pytest.approx(exact(lambda b: (T - 1, path[b, -1])))
    for t in (1, 2, 4):
        assert row[f"exact@{t}"] == pytest.approx(exact(lambda b, t=t: (t - 1, path[b, t - 1])))
    assert "exact@8" not in row and "exact@5" not in row
    leave = [next((t for t in range(T) if halt[b, t, path[b, t]] > 0), T - 1) for b in range(N)]
    assert row["halted"] == pytest.approx(exact(lambda b: (leave[b], path[b, leave[b]])))
    assert row["halt_steps"] == pytest.approx(np.mean(leave) + 1)
    assert row["path_0"] == pytest.approx(exact(lambda b: (T - 1, 0)))
    assert row["oracle"] == pytest.approx(np.mean([any(right(b, T - 1, k) for k in range(K)) for b in range(N)]))
    assert row["gap"] == pytest.approx(row["oracle"] - row["exact"]) and row["gap"] >= 0
    good = np.array([right(b, T - 1, path[b, -1]) for b in range(N)])
    logits = np.array([halt[b, -1, path[b, -1]] for b in range(N)])
    pairs = [a > b for a in logits[good] for b in logits[~good]]
    assert row["halt_auc"] == pytest.approx(np.mean(pairs) if pairs else math.nan, nan_ok=True)
    assert row["largest_share"] == max(np.bincount(path[:, -1])) / N
    symbols = (targets != PADDING).sum(1)
    nats = np.mean([trace["nats"][b, -1, path[b, -1]].item() / symbols[b] for b in range(N)])
    assert row["loss"] == pytest.approx(nats)
    final = np.stack([answers[b, -1, path[b, -1]] for b in range(N)])
    for key, values in score_answers(task, held["page"].numpy(), targets, final).items():
        numbers = values[~np.isnan(values)]
        assert row[key] == pytest.approx(numbers.mean() if len(numbers) else math.nan, nan_ok=True)
    assert next(iter(row)) == "exact"  # what selects


def test_one_path_has_no_rows_of_several():
    held, trace = random_traces("sudoku4", paths=1)
    assert not {"path_0", "oracle", "gap", "largest_share"} & judge(KNOWN["sudoku4"], held, trace).keys()


def test_codes_are_counted():
    held, trace = random_traces("read")
    trace["codes"] = torch.tensor([0, 3, 3, 1]).repeat(N, 2, 1)
    row = judge(KNOWN["read"], held, trace)
    assert row["codes_used"] == pytest.approx(3)
    assert row["perplexity"] == pytest.approx(math.exp(1.5 * math.log(2)))


@pytest.mark.parametrize("name", ["read", "fill", "arc"])
def test_traces_are_complete_whatever_the_size_of_a_batch(name):
    model = build().eval()
    samples = batch(model, name, 7)
    held = {key: samples[key] for key in ("page", "target", "id")}
    results = [traces(model, name, KNOWN[name], held, size=size, seed=0, **CPU, steps=3)
             for size in (2, 7, 50)]  # fmt: skip
    assert results[0]["answers"].shape == (7, 3, 3, KNOWN[name].length) and results[0]["codes"].shape[:2] == (7, 3)
    for other in results[1:]:
        assert torch.equal(results[0]["answers"], other["answers"])
        torch.testing.assert_close(results[0]["halt"], other["halt"])
        torch.testing.assert_close(results[0]["nats"], other["nats"])


def test_ranks_share_the_pages(monkeypatch):
    model = build().eval()
    samples = batch(model, "read", 7)
    held = {key: samples[key] for key in ("page", "target", "id")}
    parts = []

    def traced(gather, **ranks):
        monkeypatch.setattr(distributed, "gather", gather)
        return traces(model, "read", KNOWN["read"], held, size=2, seed=0, steps=2, **CPU, **ranks)

    alone = traced(lambda part: [part])
    for rank in (0, 1):
        traced(lambda part: parts.append(part) or [part], rank=rank, world=2)
    both = traced(lambda part: [parts[1], parts[0]], rank=0, world=2)
    assert torch.equal(both["answers"], alone["answers"]) and [len(batches) for _, batches in parts] == [2, 2]
    stopped = [(True, []), parts[1]]
    assert traced(lambda part: stopped, rank=0, world=2) is None


class Held:
    """Held-out pages of a few tasks; what selects is not what is reported."""

    def __init__(self, model, names):
        self.parts = {name: batch(model, name, 6) for name in names}

    def held_out(self, name, split):
        every = slice(("val", "test").index(split), None, 2)
        return {key: self.parts[name][key][every] for key in ("page", "target", "id")}


def test_a_report_has_every_task_both_weights_and_the_controls():
    model = build(["read", "arc"], enable_mtp=False)
    data, sources = Held(model, model.tasks), {name: SimpleNamespace(task=KNOWN[name]) for name in model.tasks}
    options = dict(paths=0, noise=0.0, select="score", size=4, seed=0, **CPU)
    average = Average(dict(model.named_parameters()), 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = [p.clone() for p in model.state_dict().values()]
    row = report(model, average, sources, data, "test", controls=True, **options)
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    plain = {key for key in row if not key.startswith(("raw/", "shuffled/", "blank/"))}
    for control in ("raw/", "shuffled/", "blank/"):
        assert {control + key for key in plain} <= row.keys()
    assert row["score"] == pytest.approx((row["read/characters"] + row["arc/exact"]) / 2)
    assert row["loss"] == pytest.approx((row["read/loss"] + row["arc/loss"]) / 2) != row["raw/loss"]
    assert list(row)[:2] == ["score", "loss"]
    model.eval()
    with average.in_place():
        alone = examine(model, sources, data, "test", **options)
        blank = examine(model, sources, data, "test", change=torch.zeros_like, **options)
    for name, other in (("", alone), ("blank/", blank)):
        control = {key: row[name + key] for key in other}
        assert control == pytest.approx(other, nan_ok=True)
    short = report(model, Average({}, 0), sources, data, "val", controls=False, **options)
    assert not [key for key in short if key.startswith(("raw/", "shuffled/", "blank/"))]


def test_a_report_that_is_stopped_is_none():
    model = build(["read"], **PLAIN)
    data, sources = Held(model, model.tasks), dict(read=SimpleNamespace(task=KNOWN["read"]))
    options = dict(paths=0, noise=0.0, select="score", size=4, seed=0, **CPU, controls=True)
    average = Average(dict(model.named_parameters()), 0.9)
    assert report(model, average, sources, data, "val", stop=True, **options) is None and model.training


def test_shuffled_pages_are_those_of_others():
    pages = torch.arange(4)[:, None, None].expand(4, 2, 3)
    moved = module.CONTROLS["shuffled"](pages)
    assert not (moved == pages).any() and sorted(moved[:, 0, 0].tolist()) == [0, 1, 2, 3]


def test_a_control_is_scored_by_its_unchanged_page(monkeypatch):
    """Otherwise a solution of another maze would be right wherever its page has a path of that length."""
    model, seen = build(["read"], **PLAIN), []
    data, sources = Held(model, model.tasks), dict(read=SimpleNamespace(task=KNOWN["read"]))
    monkeypatch.setattr(
        module, "score_answers", lambda task, pages, *others: seen.append(pages) or score_answers(task, pages, *others)
    )
    options = dict(paths=0, noise=0.0, select="score", size=4, seed=0, **CPU)
    examine(model.eval(), sources, data, "test", change=torch.zeros_like, **options)
    expected = data.held_out("read", "test")["page"].numpy()
    assert seen and all((pages == expected).all() for pages in seen)
