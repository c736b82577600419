"""The figure of losses: a name per run, and lines where there are numbers. Every figure: legible letters."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import report, run
from benchmarks.quality import sudoku
from data_utils import figures
from data_utils.figures import plot_losses, run_names
from data_utils.formulas.figures import plot_fit
from data_utils.pages.figures import plot_page
from tests.helpers import letters

pytestmark = pytest.mark.usefixtures("full_pictures")
NAMED = {  # files of metrics: their names
    ("a/metrics.jsonl", "b/metrics.jsonl"): ["a", "b"],
    ("c/x_expert_metrics.jsonl", "c/y_expert_metrics.jsonl"): ["x_expert", "y_expert"],
    ("c/x_metrics.jsonl", "d/x_metrics.jsonl"): ["c", "d"],
    ("c/x_metrics.jsonl", "d/x_metrics.jsonl", "d/y_metrics.jsonl"): ["c/x", "d/x", "d/y"],
    ("one/run/metrics.jsonl", "two/run/metrics.jsonl"): ["one", "two"],
    ("one/run/metrics.jsonl", "two/run/metrics.jsonl", "two/other/metrics.jsonl"): ["one/run", "two/run", "two/other"],
    ("one/deep/run/metrics.jsonl", "two/deep/run/metrics.jsonl"): ["one", "two"],
    ("c/x_metrics.jsonl", "c/x_metrics.jsonl"): ["x", "x"],
}


@pytest.mark.parametrize("paths, names", NAMED.items())
def test_runs_are_named_by_what_differs(paths, names):
    assert run_names(paths) == names


def row(step, **domains):
    numbers = {name: dict(loss=value, bpb=value, tokens=9 * (value > 0)) for name, value in domains.items()}
    return dict(step=step, split="val", loss=1.0, bpb=1.0, domains=numbers)


def test_a_domain_that_comes_goes_or_has_no_window_is_drawn_where_it_has_numbers(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "_points", lambda ax, points, *style, label, **more: drawn.update({label: points}))
    rows = [row(1, old=3.0, both=2.0), row(2, both=1.0, new=0.0), row(3, both=1.5, new=4.0)]
    plot_losses([("c/x_metrics.jsonl", rows)], tmp_path / "x.png")
    assert drawn == {
        "x": [(1, 1.0), (2, 1.0), (3, 1.0)],
        "old 3.00": [(1, 3.0)],
        "both 1.50": [(1, 2.0), (2, 1.0), (3, 1.5)],
        "new 4.00": [(3, 4.0)],
    }
    assert (tmp_path / "x.png").exists()


def test_every_run_is_drawn_however_many_there_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_points", lambda ax, points, *style, label, **more: drawn.append(label))
    plot_losses([(f"{n}/metrics.jsonl", [row(1, a=1.0)]) for n in range(13)], tmp_path / "x.png")
    assert {*drawn} == {*map(str, range(13))}


def test_letters_are_legible_where_a_page_shows_a_figure_with_800_pixels(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *where, **how: sizes.append(letters(figure)))
    weights = row(1, a=1.0)
    weights["domains"]["a"] |= dict(weight_x=0.4, weight_y=0.6)
    plot_losses([("c/x_metrics.jsonl", [row(1, a=1.0)])], tmp_path / "a.png")
    plot_losses([("c/x_metrics.jsonl", [weights])], tmp_path / "b.png")
    x = np.arange(5.0)
    answers = [SimpleNamespace(front=True, length=n, fvu=10.0**-n) for n in (1, 4)]
    for search in ((), answers):
        plot_fit(x[:, None], x, x, ["x", "y"], "y = x", tmp_path / "c.png", search)
    page = np.ones((4, 4), np.uint8)
    plot_page(tmp_path / "d.png", page=page, answers=[page.reshape(-1)], steps=[1], attention=np.ones((12, 4, 4)))
    run.draw(run.page(report.RESULTS, {}, {}, "results.png")[1], tmp_path / "e.png")
    stored = json.loads(report.results_file("quality.sudoku").read_text())["sudoku"]["figures"]
    sudoku.draw(stored, tmp_path / "f.png")
    assert len(sizes) == 7 and min(sizes) >= 11
