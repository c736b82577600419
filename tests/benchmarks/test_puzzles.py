"""Hard Sudokus: the rows of the benchmark at toy size, its puzzles, votes and paths against plain loops."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.quality import puzzles as bench
from benchmarks.report import RESULTS, load
from data_utils.reasoning import sudoku


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("puzzles")


def measured(home, *flags):
    """Run the benchmark at toy size -> {id: figure}."""
    out = home / "figures.json"
    threads = ["--threads", str(torch.get_num_threads())]
    bench.main(["--quick", *threads, "--home", str(home), "--out", str(out), *flags])
    return {figure["id"]: figure for row in json.loads(out.read_text()).values() for figure in row["figures"]}


def test_the_picture_has_a_line_for_each_rating(tmp_path, monkeypatch):
    drawings = []
    monkeypatch.setattr("data_utils.figures.write_figure", lambda picture, out: drawings.append((picture, out)))
    stored = load(RESULTS / "quality_puzzles.json")["models"]["figures"]
    bench.draw(stored, tmp_path / "ratings.png")
    ((picture, out),) = drawings
    assert [ax.get_title().partition(",")[0] for ax in picture.axes] == ["train_hrm", "train_multimodal"]
    assert [line.get_label().partition(" (")[0] for line in picture.axes[0].lines] == [
        "1 to 9",
        "10 to 49",
        "50 and more",
    ]
    (hard,) = (f for f in stored if f["id"] == "puzzles.models.train_hrm.17_to_26_givens")
    last = ", ".join(f"{share:.1f}" for share in picture.axes[0].lines[2].get_ydata())
    assert f"with 50 and more guesses {last} of 124" in hard["spread"] and out.name == "ratings.png"
    bench.draw([f for f in stored if "official" in f["id"]], tmp_path / "none.png")
    assert len(drawings) == 1


@pytest.mark.slow
def test_models_run_at_toy_size_and_are_read_again(home):
    flags = "--rows", "models", "--arms", "train_"
    figures = measured(home, *flags)
    assert len(figures) == 2 * 3
    hard = figures["puzzles.models.train_hrm.17_to_26_givens"]
    for part in (
        "cells",
        "after 1, 2, 4, 8, 16 segments",
        "halting",
        "2 views of 16 segments vote",
        "guesses",
        "4 steps in",
    ):
        assert part in hard["spread"]
    assert 0 <= hard["ours"] <= 100 and 0 <= hard["baseline"] <= 100 and "--rows models" in hard["command"]
    assert measured(home, *flags) == figures


@pytest.mark.slow
def test_official_code_runs_beside_and_its_weights_are_read(home):
    clones = peers.CLONES / "TinyRecursiveModels", peers.CLONES / "HRM"
    figures = measured(home, "--rows", "models", "--arms", "official")
    if not all(clone.exists() for clone in clones):
        missing = {figure["baseline"] for figure in figures.values() if "ours" not in figure}
        assert missing and missing <= {peers.GET["TRM"], peers.GET["HRM"]}
        pytest.skip("; ".join(sorted(missing)))
    for name in ("official_TRM", "official_TRM_with_mlp_t", "official_HRM"):
        assert figures[f"puzzles.models.{name}.read"]["ours"] <= 1e-5
        assert "halting" in figures[f"puzzles.models.{name}.32_givens"]["spread"]


@pytest.mark.slow
def test_the_recipe_runs_beside_its_controls(home):
    figures = measured(home, "--rows", "recipe")
    ids = [id.rpartition(".")[2] for id in figures if id.startswith("puzzles.recipe.")]
    assert ids == ["recursion", "once", "no_curriculum"]
    recursion, once = figures["puzzles.recipe.recursion"], figures["puzzles.recipe.once"]
    assert recursion["target"] == ">= 30" and "target" not in once
    for way in ("2 views vote", "surest cells first, 16 rounds", "surest of 2 paths with noise 0.1", "4 segments"):
        assert f"{way} " in recursion["spread"]
    assert "one pass " in once["spread"] and "segments" not in once["spread"]  # which has none
    for id in ids:
        assert "CPU s" in figures[f"puzzles.recipe.{id}"]["spread"]


@pytest.mark.slow
def test_the_pretrained_model_is_scored(home):
    figures = measured(home, "--rows", "pretrained")
    hard = figures["puzzles.pretrained.sudoku9"]
    assert hard["target"] == ">= 30" and "surest cells first, 16 rounds " in hard["spread"]


def test_easier_puzzles_come_from_hard_ones():
    rng = np.random.default_rng(0)
    x, y = sudoku.sudoku(size=9, givens=30, n=6, seed=0)
    for givens in (25, 30, 41, 81):
        filled = bench.reveal(x, y, givens, rng)
        assert ((filled > 0).sum(1) == max(30, givens)).all()
        assert ((filled == y) | (filled == 0)).all() and ((filled == x) | (x == 0)).all()
    each = np.array([[30], [35], [40], [45], [50], [20]])
    assert (bench.reveal(x, y, each, rng) > 0).sum(1).tolist() == [30, 35, 40, 45, 50, 30]


@pytest.mark.parametrize("curriculum", [True, False])
def test_the_curriculum_goes_from_many_givens_to_few(curriculum):
    x, y = sudoku.sudoku(size=9, givens=26, n=3, seed=0)
    for share, least in ((0.0, 40), (0.25, 28), (0.5, 26), (1.0, 26)):
        stream = bench.batches((x, y), 12, 2, lambda share=share: share, curriculum)
        (first, target, a), (again, _, b), (new, _, c) = (next(stream) for _ in range(3))
        assert (a, b, c) == (0, 1, 0) and torch.equal(first, again) and not torch.equal(first, new)
        assert sudoku.solved(target.numpy(), 9).all() and ((first == target) | (first == 0)).all()
        givens = (first > 0).sum(1)
        assert (givens[:6] == (least if curriculum else 26)).all() and givens.max() <= 40
        if curriculum:
            assert givens.min() >= least


def test_views_that_disagree_are_outvoted():
    """An arm that is right on all symmetric versions but the puzzle itself."""
    x, y = sudoku.sudoku(size=9, givens=60, n=3, seed=0)
    known = {bytes(grid) for grid in x.tolist()}

    def solving(ids, segments, noise, generator):
        answers = []
        for grid in ids.tolist():
            answer = list(grid)
            sudoku._search(answer, 9, 1, random.Random(0))
            answers.append([1] * 81 if bytes(grid) in known else answer)
        return torch.tensor(answers)[:, None], torch.zeros(len(ids), 1)

    arm = SimpleNamespace(trace=solving, once=False)
    assert bench.percent(bench.solved(bench.think(arm, x, 1)[0], y)) == 0
    assert bench.percent(bench.solved(bench.voted(arm, x, 1, 3), y)) == 100


def test_the_surest_path_answers():
    _, y = sudoku.sudoku(size=9, givens=75, n=2, seed=0)

    def trace(ids, segments, noise, generator):
        sure = torch.rand(len(ids), generator=generator)
        right = sure > torch.tensor(best) - 1e-6  # only the surest of all paths is right
        answers = torch.where(right[:, None], torch.from_numpy(y).long(), 0)
        return answers[:, None].expand(-1, segments, -1), sure[:, None].expand(-1, segments)

    draws = [torch.rand(2, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    best = torch.stack(draws).amax(0).tolist()
    arm = SimpleNamespace(trace=trace, once=False)
    assert bench.percent(bench.solved(bench.surest(arm, y, 2, 0.5, 5), y)) == 100


def test_the_surest_blanks_are_filled_first():
    tokens = torch.tensor([7, 2, 5, 1])  # the blank, and what may stand in its place
    given = tokens[torch.randint(4, (6, 11), generator=torch.Generator().manual_seed(0))]
    given[0] = 2  # no blank at all
    logits = torch.randn(6, 11, 9, generator=torch.Generator().manual_seed(1))
    for left in (4, 1):
        filled = bench.fill_surest(given, logits, tokens, left)
        for puzzle, answer, scores in zip(given.tolist(), filled.tolist(), logits, strict=True):
            blanks = [i for i, token in enumerate(puzzle) if token == 7]
            sure = {i: scores[i, [2, 5, 1]].softmax(-1).max().item() for i in blanks}
            chosen = sorted(blanks, key=sure.get)[::-1][: math.ceil(len(blanks) / left)]
            expected = list(puzzle)
            for i in chosen:
                expected[i] = max([2, 5, 1], key=lambda token: scores[i, token].item())
            assert answer == expected
