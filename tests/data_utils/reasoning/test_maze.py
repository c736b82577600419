"""Mazes: shortest paths against a naive search, answers, turned versions."""

import numpy as np
import pytest

from data_utils.reasoning import maze


def cells(*lines):
    return np.array([maze.SIGNS.index(sign) for line in lines for sign in line], np.uint8)


def random_maze(rng, rows, cols):
    grid = (rng.random(rows * cols) < 0.35).astype(np.uint8)
    start, goal = rng.choice(rows * cols, 2, replace=False)
    grid[start], grid[goal] = maze.START, maze.GOAL
    return grid


def naive_steps(grid, rows, cols):
    """Steps from S to G by repeated relaxation over a table; None without a way."""
    far = rows * cols + 1
    steps = np.full((rows, cols), far)
    page = grid.reshape(rows, cols)
    steps[page == maze.START] = 0
    for _ in range(rows * cols):
        for r in range(rows):
            for c in range(cols):
                if page[r, c] != maze.WALL:
                    near = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
                    best = min((steps[i, j] for i, j in near if 0 <= i < rows and 0 <= j < cols), default=far)
                    steps[r, c] = min(steps[r, c], best + 1)
    answer = int(steps[page == maze.GOAL][0])
    return answer if answer < far else None


@pytest.mark.parametrize("rows, cols", [(4, 7), (6, 6)])
def test_paths_are_shortest_and_end_where_they_should(rows, cols):
    rng = np.random.default_rng(0)
    blocked = 0
    for _ in range(60):
        grid = random_maze(rng, rows, cols)
        expected, answer = naive_steps(grid, rows, cols), maze.solve(grid, cols)
        assert (answer is None) == (expected is None)
        if answer is None:
            blocked += 1
            assert maze.verdict(grid, grid, cols) == (False, "no path: the maze has none")
            continue
        assert (answer == maze.PATH).sum() == expected - 1 and maze.fault(grid, answer, cols) == ""
        assert maze.verdict(grid, answer, cols) == (True, "shortest path")
    assert 0 < blocked < 60


def test_wrong_answers_are_told_apart():
    question = cells("S  ", "## ", "G  ")
    way = cells("Soo", "##o", "Goo")
    assert maze.fault(question, way, 3) == ""
    assert maze.fault(question, cells("Soo", "## ", "Goo"), 3) == "no path from S to G"
    assert maze.fault(question, cells("Soo", "o#o", "Goo"), 3) == "it changes the maze"
    assert maze.fault(question, cells("Goo", "##o", "Soo"), 3) == "it changes the maze"
    open_field = cells("S  ", "   ", "  G")
    assert maze.verdict(open_field, cells("S o", "   ", "ooG"), 3)[0] is False
    assert maze.fault(open_field, cells("Soo", "o o", "ooG"), 3) == "marks beside the path"
    detour = cells("S   ", "    ", "   G"), cells("Soo ", "  oo", "   G")
    assert maze.verdict(*detour, 4) == (True, "shortest path")
    assert maze.verdict(cells("SG", "  "), cells("SG", "oo"), 2)[0] is False


def test_what_is_no_maze():
    assert maze.problem_of(cells("SG")) == ""
    assert maze.problem_of(cells("S ")) == "0 G, expected 1" and maze.problem_of(cells("SSG")) == "2 S, expected 1"
    assert "path" in maze.problem_of(cells("SoG"))


def test_turned_mazes_are_disguises_and_keep_their_paths():
    rng = np.random.default_rng(1)
    for rows, cols in ((5, 5), (3, 6)):
        grid = random_maze(rng, rows, cols)
        while (answer := maze.solve(grid, cols)) is None:
            grid = random_maze(rng, rows, cols)
        versions = [maze.turned(grid, rows, cols, turn) for turn in range(maze.turns(rows, cols))]
        assert len({version.tobytes() for version in versions}) == (8 if rows == cols else 4)
        assert len(set(maze.disguises(np.stack(versions), rows, cols).tolist())) == 1
        for turn, version in enumerate(versions):
            assert maze.fault(version, maze.turned(answer, rows, cols, turn), cols) == ""
        questions, answers = maze.turn_each(np.stack([grid] * 20), np.stack([answer] * 20), rows, cols, rng)
        assert all(maze.fault(q, a, cols) == "" for q, a in zip(questions, answers, strict=True))
        assert len({q.tobytes() for q in questions}) > 2
    others = np.stack([random_maze(rng, 5, 5) for _ in range(50)])
    assert len(set(maze.disguises(others, 5, 5).tolist())) == 50
