"""Sudoku: one solution by a naive solver, no copies, symmetries against a plain loop, typing mistakes."""

import itertools

import numpy as np
import pytest

from data_utils.errors import UsageError
from data_utils.reasoning import sudoku as puzzles

HIGH = {4: 2, 6: 2, 9: 3}


def may_hold(grid, size, cell, digit):
    high = HIGH[size]
    wide = size // high
    row, column = divmod(cell, size)
    for other in range(size * size):
        r, c = divmod(other, size)
        near = r == row or c == column or (r // high == row // high and c // wide == column // wide)
        if near and other != cell and grid[other] == digit:
            return False
    return True


def naive_solutions(grid, size):
    """All solutions, by trying every digit in the blank with the fewest possible ones."""
    blanks = {}
    for cell in range(size * size):
        if not grid[cell]:
            blanks[cell] = [d for d in range(1, size + 1) if may_hold(grid, size, cell, d)]
    if not blanks:
        return [list(grid)]
    cell = min(blanks, key=lambda c: len(blanks[c]))
    return [s for d in blanks[cell] for s in naive_solutions([*grid[:cell], d, *grid[cell + 1 :]], size)]


@pytest.mark.parametrize("size, givens, n", [(4, 6, 20), (4, 0, 10), (6, 14, 8), (9, 40, 4), (9, 30, 2)])
def test_every_puzzle_has_one_solution(size, givens, n):
    grids, solutions = puzzles.sudoku(size=size, givens=givens, n=n, seed=3)
    assert grids.shape == solutions.shape == (n, size * size) and grids.dtype == solutions.dtype == np.uint8
    for puzzle, solution in zip(grids.tolist(), solutions.tolist(), strict=True):
        assert naive_solutions(puzzle, size) == [solution]
        assert all(p in (0, s) for p, s in zip(puzzle, solution, strict=True))
    if givens:
        assert ((grids > 0).sum(1) == givens).all()
    again, _ = puzzles.sudoku(size=size, givens=givens, n=n - 1, seed=3, first=1)
    assert (again == grids[1:]).all()


def test_minimal_puzzles_are_minimal():
    grids, _ = puzzles.sudoku(size=4, givens=0, n=3, seed=1)
    for puzzle in grids.tolist():
        for cell in np.flatnonzero(puzzle):
            assert len(naive_solutions([*puzzle[:cell], 0, *puzzle[cell + 1 :]], 4)) > 1


def test_fills_are_no_shuffles_of_one_pattern():
    _, solutions = puzzles.sudoku(size=9, givens=80, n=40, seed=0)

    def pattern(solution):  # how alike the rows of a band are: symmetries don't change that
        rows = solution.reshape(9, 3, 3)
        pairs = [tuple(sorted(len({*a} & {*b}) for b in rows[j])) for i in range(9) for j in range(9) if i != j
                 for a in rows[i]]  # fmt: skip
        return tuple(sorted(pairs))

    assert len({pattern(s) for s in solutions}) > 30
    assert puzzles.solved(solutions, 9).all()


def test_splits_share_no_solution_and_ignore_the_processes():
    splits = puzzles.make(size=4, givens=7, train=150, val=50, seed=1)
    assert {s: len(p) for s, (p, _) in splits.items()} == dict(train=150, val=50)
    keys = {split: {puzzles.canonical(s, 4) for s in solutions} for split, (_, solutions) in splits.items()}
    assert not keys["train"] & keys["val"]
    again = puzzles.make(size=4, givens=7, train=150, val=50, seed=1, processes=3)
    assert all((a == b).all() for split in splits for a, b in zip(splits[split], again[split], strict=True))


def test_canonical_is_that_of_relabelled_and_transposed():
    _, solutions = puzzles.sudoku(size=4, givens=16, n=30, seed=5)
    for a, b in itertools.combinations(solutions, 2):
        same = any((np.array([0, *p])[g.reshape(-1)] == b).all() for g in (a.reshape(4, 4), a.reshape(4, 4).T)
                   for p in itertools.permutations(range(1, 5)))  # fmt: skip
        assert same == (puzzles.canonical(a, 4) == puzzles.canonical(b, 4))


@pytest.mark.parametrize("size", [4, 6, 9])
def test_augmented_is_a_relabelled_permutation_of_lines(size):
    grids, solutions = puzzles.sudoku(size=size, givens=size * size // 2, n=6, seed=2)
    new, answers = puzzles.augment(grids, solutions, size=size, rng=np.random.default_rng(0))
    assert new.dtype == answers.dtype == np.uint8 and puzzles.solved(answers, size).all()
    assert ((new == 0) | (new == answers)).all() and ((new > 0).sum(1) == (grids > 0).sum(1)).all()
    high, turned = HIGH[size], 0
    for old, puzzle in zip(grids.reshape(-1, size, size), new.reshape(-1, size, size), strict=True):
        blank = [sorted(tuple(sorted((row == 0).sum(1))) for row in g.reshape(-1, high, size)) for g in (old, puzzle)]
        turned += blank[0] != blank[1]  # the blanks of a row, in bands: moved only where the axes are exchanged
    assert turned == 0 or size != 6
    assert (new != grids).any(1).all()
    again = puzzles.augment(grids, solutions, size=size, rng=np.random.default_rng(0))
    assert (again[0] == new).all() and (again[1] == answers).all()


def test_reveal_fills_blanks_in():
    grids, solutions = (np.repeat(x, 400, 0) for x in puzzles.sudoku(size=4, givens=4, n=1, seed=2))
    new, answers = puzzles.augment(grids, solutions, size=4, rng=np.random.default_rng(1), reveal=0.3)
    more = (new > 0).sum(1) > (grids > 0).sum(1)
    assert ((new == 0) | (new == answers)).all() and 0.15 < more.mean() < 0.35
    assert puzzles.augment(grids, solutions, size=4, rng=np.random.default_rng(1), reveal=1.0)[0].min(1).max() <= 1


def test_solved():
    _, solutions = puzzles.sudoku(size=6, givens=36, n=3, seed=0)
    wrong = solutions.copy()
    wrong[1, [0, 1]] = wrong[1, [1, 0]]
    assert puzzles.solved(wrong, 6).tolist() == [True, False, True]


def test_typed_puzzles():
    puzzle, solution = (x[0] for x in puzzles.sudoku(size=9, givens=40, n=1, seed=0))
    text = "".join(map(str, puzzle)).replace("0", ".")
    assert (puzzles.parse_puzzle(text) == puzzle).all()
    assert (puzzles.parse_puzzle(f" {text[:9]}\n{text[9:]} ") == puzzle).all()
    assert (puzzles.parse_puzzle("1" + "0" * 15) == [1] + [0] * 15).all()
    for bad, expected in [("12", "2 signs: expected 81"), ("x" + text[1:], "row 1, column 1: 'x'"),
                          ("5" + "." * 15, "'5' is not"), ("²" + text[1:], "row 1, column 1"),
                          (".1.1" + "." * 12, "row 1 has 1 twice: row 1, column 2 and row 1, column 4"),
                          ("2..." * 2 + "." * 8, "column 1 has 2 twice"),
                          ("3..." + ".3.." + "." * 8, "box 1 has 3 twice")]:  # fmt: skip
        with pytest.raises(UsageError, match=expected):
            puzzles.parse_puzzle(bad)
    with pytest.raises(UsageError, match="--size 5"):
        puzzles.sudoku(size=5, givens=3, n=1, seed=0)


def naive_guesses(grid, size):
    """Count the blanks in which a search over all solutions has several digits to try."""
    blanks = {cell: [d for d in range(1, size + 1) if may_hold(grid, size, cell, d)]
              for cell in range(size * size) if not grid[cell]}  # fmt: skip
    if not blanks:
        return 0
    cell = min(blanks, key=lambda c: len(blanks[c]))
    below = sum(naive_guesses([*grid[:cell], d, *grid[cell + 1 :]], size) for d in blanks[cell])
    return below + (len(blanks[cell]) > 1)


def test_the_rating_counts_guesses():
    for size, givens in ((4, 0), (4, 8), (6, 0), (9, 32)):
        grids, _ = puzzles.sudoku(size=size, givens=givens, n=4, seed=5)
        assert [puzzles.rate(grid, size) for grid in grids] == [naive_guesses(grid, size) for grid in grids.tolist()]
    easy, solutions = puzzles.sudoku(size=9, givens=70, n=3, seed=5)
    assert [puzzles.rate(grid, 9) for grid in (*easy, *solutions)] == [0] * 6


@pytest.mark.parametrize("size", [4, 6, 9])
def test_symmetries_are_undone(size):
    _, solutions = puzzles.sudoku(size=size, givens=0 if size < 9 else 75, n=5, seed=2)
    cells, digits = puzzles.symmetries(5, size, np.random.default_rng(1))
    changed = np.stack([d[grid[c]] for grid, c, d in zip(solutions, cells, digits, strict=True)])
    assert puzzles.solved(changed, size).all() and (changed != solutions).any(1).all()
    assert (puzzles.undo(changed, cells, digits) == solutions).all()
    same, _ = puzzles.augment(solutions, solutions, size=size, rng=np.random.default_rng(1))
    assert (same == changed).all()
