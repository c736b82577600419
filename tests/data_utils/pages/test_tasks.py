"""Samples of the tasks: pure, on the right side, what a puzzle's page shows agrees with its target."""

import random
import subprocess
import sys

import numpy as np
import pytest

from data_utils.errors import DataError, UsageError
from data_utils.pages import tasks
from data_utils.pages.render import to_text
from data_utils.reasoning import sudoku as puzzles
from models.glyphs import HOLE
from tests.helpers import ROOT

SMALL = dict(page_rows=2, page_cols=24, text_source="both", stories="", code_dir="", arc_set="agi1", arc_side=10)


def opened(*names, **more):
    return tasks.open_tasks(names, **SMALL | more)


def write_code(folder, files):
    for i in range(files):
        lines = [f"    value_{i} = total_{j} + value_{i}  # note {j}" for j in range(12)]
        (folder / f"file{i}.py").write_text("\n".join([f"def make_{i}(value_{i}):", *lines]))


def same(a, b):
    return (a.page == b.page).all() and (a.target == b.target).all() and (a.key, a.id) == (b.key, b.id)


@pytest.mark.parametrize("size, givens", [(4, 6), (6, 14), (9, 40)])
def test_sudoku_pages_have_one_solution(size, givens):
    source = opened(f"sudoku{size}")[f"sudoku{size}"]
    example = np.array([int(sign) for sign in source.task.example().replace(".", "0")])
    assert puzzles.solve(example, size)[0] == 1
    assert source.task.length == size * size and source.limit("train") == 0 and not source.task.causal
    for split in ("train", "test"):
        sample = source.make(3, split, 7)
        assert sample.page.shape == (size, size) and sample.page.dtype == sample.target.dtype == np.uint8
        typed = to_text(sample.page).replace("_", ".")
        assert sum(sign != "." for sign in typed) == givens
        puzzles.parse_puzzle(typed)  # no contradiction
        assert puzzles.solved(sample.target[None] - (ord("0") - 32), size)[0]
        shown = sample.page.reshape(-1) != HOLE
        assert (sample.page.reshape(-1)[shown] == sample.target[shown]).all()


def test_the_fill_is_that_of_whole_puzzles():
    grids, solutions = puzzles.sudoku(size=6, givens=14, n=1, seed=3)
    draw = random.Random("3 0")
    grid = puzzles.fill(6, draw)
    assert (solutions[0] == grid).all() and (grids[0] == puzzles.empty(grid, 6, 14, draw)).all()


@pytest.mark.parametrize("name", ["sudoku4", "maze", "read", "continue", "fill"])
def test_samples_are_pure_and_splits_disjoint(name, tmp_path):
    write_code(tmp_path, 200)
    source = opened(name, code_dir=str(tmp_path))[name]
    keys = {"train": set(), "test": set()}
    for split, split_keys in keys.items():
        for seed in range(3):
            samples = [source.make(i, split, seed) for i in range(20 if split == "test" else 60)]
            assert same(samples[9], opened(name, code_dir=str(tmp_path))[name].make(9, split, seed))
            assert len({sample.page.tobytes() for sample in samples}) > 14
            for sample in samples:
                assert sample.page.shape == (source.task.rows, source.task.cols)
                assert sample.target.shape == (source.task.length,) and len(sample.key) == 16
                assert sample.page.dtype == sample.target.dtype == np.uint8
            split_keys |= {sample.key for sample in samples}
    assert not keys["train"] & keys["test"] and all(map(tasks.is_test, keys["test"]))
    assert not any(map(tasks.is_test, keys["train"])) and len(keys["train"]) > 90


def test_sources_take_turns_in_both_halves_of_the_test_split(tmp_path):
    write_code(tmp_path, 200)
    sources = {which: opened("read", text_source=which, code_dir=str(tmp_path))["read"] for which in ("both", "code")}
    both, code = ([source.make(i, "test", 0) for i in range(8)] for source in sources.values())
    assert [same(a, b) for a, b in zip(both, code, strict=True)] == [False, False, True, True] * 2
    specs = [sources[which].spec for which in sources]
    assert specs[0] != specs[1] and specs[0]["sources"][1] == specs[1]["sources"][0]


def test_a_source_too_small_for_the_split():
    class One:
        spec, label = {}, "one grid"

        def subject(self, draw):
            return b"one", None

    source = tasks.Source(opened("sudoku4")["sudoku4"].task, [One()])
    with pytest.raises(DataError, match="no test sample 0 in 20000 draws, 20000 of them of the other split,\nfrom one"):
        source.make(0, "test", 0)


def test_samples_that_few_draws_have_are_found(monkeypatch):
    class Rare:
        spec, label, drawn = {}, "rare ones", 0

        def subject(self, draw):
            return str(draw.random()).encode(), None

        def sample(self, draw, subject):
            self.drawn += 1
            return (0, 0) if self.drawn == 90 else None

    monkeypatch.setattr(tasks, "ATTEMPTS", 100)
    task = opened("sudoku4")["sudoku4"].task
    for split in ("train", "test"):  # of which 1 draw in 20 is
        assert tasks.is_test(tasks.Source(task, [Rare()]).make(0, split, 0).key) == (split == "test")
    monkeypatch.setattr(tasks, "ATTEMPTS", 80)
    with pytest.raises(
        DataError, match=r"no test sample 0 in \d{4} draws, \d{4} of them of the other split,\nfrom rare"
    ):
        tasks.Source(task, [Rare()]).make(0, "test", 0)


def test_small_pages_have_names_to_fill_in():
    source = opened("fill", page_rows=1)["fill"]  # of the library: a name stands twice in 1 of 200 pieces
    assert all(HOLE in source.make(i, "test", 0).page for i in range(12, 20))


def test_processes_that_make_samples_start_without_torch():
    code = """
import sys
from functools import partial
from data_utils.pages import shard_builder, tasks
call = tasks.open_tasks, (("read", "continue", "fill", "sudoku4", "maze"),), tuple(FLAGS.items())
for task in call[1][0]:
    shard_builder._make(call, 0, ("train", task, 0, 2))
assert "torch" not in sys.modules
""".replace("FLAGS", repr(SMALL))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_unknown_names():
    with pytest.raises(UsageError, match="no such task .did you mean sudoku"):
        opened("sudoku5")
