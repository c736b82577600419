"""Figures of train_multimodal.py: curves of a folder, pages with answers, and attention of capsules."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import data_utils.figures
import data_utils.pages.figures
import plot
from data_utils.errors import DataError
from data_utils.pages.figures import AMBER, RED, plot_page
from data_utils.pages.render import layout, to_symbols
from models.glyphs import END, HOLE, OUTSIDE, PADDING
from tests.helpers import SHARED

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("full_pictures")]
SCORES = {"sudoku4/exact": 0.9, "sudoku4/cells": 0.97, "read/characters": 0.8, "read/page": 0.1}


@pytest.fixture(autouse=True)
def closed():
    """Close the figures that a test caught, since matplotlib warns of more than 20 open ones."""
    yield
    data_utils.figures.plt.close("all")


# ---- curves ----------------------------------------------------------------------------------------------------------


def run(folder, evaluated=True, best=2):
    """A folder with metrics of two tasks, three evaluations; the scores of evaluation `best` are the highest."""
    rows = [dict(config={})]
    for step in range(10, 100, 10):
        task = ("read", "sudoku4")[step // 10 % 2]
        rows.append(dict(split="train", step=step, epoch=0, task=task, loss=30 / step, ce=3 / step, lr=1e-3))
        if evaluated and step % 30 == 0:
            scores = {name: score - 0.1 * abs(best - step / 30) for name, score in SCORES.items()}
            rows.append(dict(split="val", step=step, epoch=1, loss=20 / step) | scores)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def figures(monkeypatch):
    drawings = []
    for module in (data_utils.figures, data_utils.pages.figures):
        monkeypatch.setattr(module, "write_figure", lambda figure, out: drawings.append((figure, str(out))))
    return drawings


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_a_folder_is_drawn_by_task(tmp_path, monkeypatch, capsys):
    folder, drawings = run(tmp_path / "multimodal-hesc"), figures(monkeypatch)
    plot.main(plot.Config(runs=(folder,)))
    ((figure, out),) = drawings
    left, right = figure.axes
    assert out == f"{folder}/loss.png" and left.get_yscale() == "log"
    assert lines(left)["read"] == ([20, 40, 60, 80], [1.5, 0.75, 0.5, 0.375])
    assert lines(left)["multimodal-hesc"][0] == [30, 60, 90] and len(left.lines) == 3
    assert list(lines(right)) == ["sudoku4 exact 0.800", "read characters 0.700"]  # the first of each task
    assert np.allclose(lines(right)["sudoku4 exact 0.800"], ([30, 60, 90], [0.8, 0.9, 0.8]))
    shades = {line.get_label().split()[0]: to_rgb(line.get_color()) for line in right.lines}
    assert all(
        to_rgb(line.get_color()) == shades[line.get_label()] for line in left.lines[:2]
    )  # the same on both sides
    line, path = capsys.readouterr().out.splitlines()
    assert line.split() == [folder, *"step 60 loss 0.3333 sudoku4/exact 0.900 read/characters 0.800".split()]
    assert path == out


def test_rows_without_numbers_are_left_out_and_torn_ones_hide_none(tmp_path, monkeypatch, capsys):
    folder, drawings = run(tmp_path / "a"), figures(monkeypatch)
    rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    wrong = ['{"config": {"a": 1', '{"step": "7", "split": "train", "loss": 1.0}', '{"step": 8, "split": "train"}']
    wrong += ['{"step": 9, "split": "train", "loss": "abc"}', '{"step": null, "split": "val"}', "[1, 2]", "\0\0"]
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join([*wrong, *rows, ""]))
    plot.main(plot.Config(runs=(folder,)))
    left, right = drawings[0][0].axes
    assert lines(left)["read"] == ([20, 40, 60, 80], [1.5, 0.75, 0.5, 0.375]) and len(right.lines) == 2
    assert "step     60  loss 0.3333" in capsys.readouterr().out


def test_evaluations_without_a_loss_have_their_scores(tmp_path, monkeypatch, capsys):
    folder, drawings = run(tmp_path / "a"), figures(monkeypatch)
    path = tmp_path / "a" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | dict(loss=None)) + "\n" for row in rows))
    plot.main(plot.Config(runs=(folder,)))
    assert len(drawings[0][0].axes[1].lines) == 2 and "loss inf  sudoku4/exact 0.900" in capsys.readouterr().out


CASES = SHARED / "cases" / "pictures" / "plot"


@pytest.mark.skipif(not CASES.is_dir(), reason="no files of users here")
def test_files_of_users_are_drawn_or_refused(tmp_path):
    for file in sorted(CASES.iterdir()):
        try:
            plot.main(plot.Config(runs=(str(file),), out=str(tmp_path / "loss.png")))
        except DataError as e:
            assert "no row of metrics" in str(e)


def test_folders_are_overlaid_with_lines_of_their_own(tmp_path, monkeypatch):
    drawings = figures(monkeypatch)
    plot.main(plot.Config(runs=(run(tmp_path / "a"), run(tmp_path / "b")), out="both.png"))
    ((figure, out),) = drawings
    left, right = figure.axes
    assert out == "both.png" and list(lines(right)) == [
        f"{name} {score}" for name in "ab" for score in ("sudoku4 exact", "read characters")
    ]
    assert [line.get_linestyle() for line in right.lines] == ["-", "-", "--", "--"]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b"]


def test_before_the_first_evaluation(tmp_path, monkeypatch, capsys):
    drawings = figures(monkeypatch)
    plot.main(plot.Config(runs=(run(tmp_path / "a", evaluated=False),)))
    assert list(lines(drawings[0][0].axes[0]))[:2] == ["sudoku4", "read"] and not drawings[0][0].axes[1].lines
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no row of metrics"):
        plot.main(plot.Config(runs=(str(tmp_path / "a"),)))


# ---- pages -----------------------------------------------------------------------------------------------------------


def page_figure(monkeypatch, **options):
    drawings = figures(monkeypatch)
    plot_page("page.png", **options)
    ((figure, out),) = drawings
    assert out == "page.png"
    figure.draw_without_rendering()
    panels = [axes for part in figure.subfigs for axes in part.axes if axes.get_visible()]
    boxes = [axes.get_window_extent() for axes in panels] + [axes.title.get_window_extent() for axes in panels]
    boxes += [text.get_window_extent() for part in (figure, *figure.subfigs) for text in part.texts if text.get_text()]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
    return figure, {axes.get_title(): axes for axes in panels}


def tinted(axes, cells, columns, colour):
    """Which of the first cells are tinted, by the pixel in the corner of each, which no ASCII glyph reaches."""
    image = axes.images[0].get_array()
    tint = 0.55 + 0.45 * np.array(colour)
    return [np.allclose(image[14 * (i // columns), 8 * (i % columns)], tint) for i in range(cells)]


def test_a_grid_with_its_target_and_capsules(monkeypatch):
    target = to_symbols("1234341221434321")
    page = np.where(np.arange(16) % 3, HOLE, target).reshape(4, 4)
    answers = np.stack([target, target])
    answers[0, [1, 7]] = to_symbols("44")
    attention = np.zeros((12, 2, 4))
    attention[3, 1, 2] = 5
    options = dict(page=page, target=target, answers=answers, steps=(1, 16), q=(0.25, 0.991), attention=attention)
    figure, panels = page_figure(monkeypatch, title="sudoku4", **options)
    first, last = "1 step, 2 wrong, q 0.25", "16 steps, 0 wrong, q 0.99"
    assert list(panels) == ["page", "target", first, last, *(f"capsule {k + 1}" for k in range(12))]
    assert panels["page"].images[0].get_array().shape == (56, 32, 3)
    assert tinted(panels[first], 16, 4, RED) == [i in (1, 7) for i in range(16)]
    assert not any(tinted(panels[last], 16, 4, RED)) and figure.get_suptitle() == "sudoku4"
    heat = panels["capsule 4"].images[1]
    assert heat.get_extent() == [-0.5, 31.5, 55.5, -0.5] and heat.get_alpha()[1, 2] == heat.get_alpha().max() > 0.5
    assert not panels["capsule 1"].images[1].get_alpha().any()


def test_text_of_another_shape_that_ends(monkeypatch):
    page, target = layout("def f(name):\n    return ", 2, 28), np.full(64, PADDING)
    target[:5] = [*to_symbols("name"), END]
    answers = np.stack([to_symbols("nama" + "x" * 60), np.where(target == PADDING, 5, target)])
    _, panels = page_figure(monkeypatch, page=page, target=target, answers=answers, steps=(1, 4))
    assert list(panels) == ["page", "target", "1 step, 2 wrong", "4 steps, 0 wrong"]
    assert panels["target"].images[0].get_array().shape == (42, 224, 3)
    assert tinted(panels["1 step, 2 wrong"], 64, 28, RED) == [i in (3, 4) for i in range(64)]
    assert (panels["4 steps, 0 wrong"].images[0].get_array()[:, 48:56] == 1).all()  # nothing after its end


@pytest.mark.parametrize("rows, cols", [(2, 24), (16, 28), (30, 30), (1, 1)])
def test_pages_of_every_shape_without_a_target(monkeypatch, rows, cols):
    page = np.full((rows, cols), OUTSIDE)
    answers = np.stack([page.reshape(-1) * 0 + k for k in (1, 1, 2, 2, 2)])
    options = dict(answers=answers, steps=(1, 2, 4, 8, 16), attention=np.ones((12, rows, -(-cols // 2))))
    _, panels = page_figure(monkeypatch, page=page, **options)
    assert len(panels) == 18 and list(panels)[1:6] == ["1 step", "2 steps", "4 steps", "8 steps", "16 steps"]
    changed = [all(tinted(panels[name], rows * cols, cols, AMBER)) for name in list(panels)[1:6]]
    assert changed == [False, False, True, False, False]


def test_the_png_is_written(tmp_path):
    out = tmp_path / "figures" / "page.png"
    plot_page(out, page=np.full((1, 2), HOLE), answers=[[1, 2]], steps=[1])
    assert out.read_bytes()[:4] == b"\x89PNG"
