"""Mazes as rows of cells: their signs, shortest paths, answers and turned versions.

A maze is a row of rows x columns uint8 cells, ids into SIGNS: 0 open, 1 wall, 2 start, 3 goal, 4 path. A border need
not be wall. The question has no path; the answer is the question with one marked.
"""

from collections import deque

import numpy as np

SIGNS = " #SGo"
OPEN, WALL, START, GOAL, PATH = range(5)


def bordered(cells, cols):
    """Return the cells (N,) as a list with walls around, each row `cols` + 2 long."""
    return np.pad(cells.reshape(-1, cols), 1, constant_values=WALL).reshape(-1).tolist()


def breadth_first(cells, cols, start, wall):
    """Return, for each of the cells (N,), its steps from `start` and the cell before it; -1 for cells out of reach.

    The fixed order of neighbours (above, left, right, below) chooses between paths of equal length. `wall` must stand
    all around, in rows of `cols` cells.
    """
    steps, before = [-1] * len(cells), [-1] * len(cells)
    queue = deque([start])
    steps[start] = 0
    while queue:
        cell = queue.popleft()
        for step in (-cols, -1, 1, cols):
            near = cell + step
            if cells[near] != wall and steps[near] < 0:
                steps[near] = steps[cell] + 1
                before[near] = cell
                queue.append(near)
    return steps, before


def steps_to_goal(cells, cols):
    """Return the steps to the goal from each cell of `bordered`, -1 from cells that it can't be reached from."""
    grid = bordered(cells, cols)
    return breadth_first(grid, cols + 2, grid.index(GOAL), WALL)[0]


def solve(question, cols):
    """Return the answer (N,) uint8 with a shortest path marked; None if there is no path."""
    steps = steps_to_goal(question, cols)
    cell = bordered(question, cols).index(START)
    if steps[cell] < 0:
        return None
    answer = np.pad(question.reshape(-1, cols), 1, constant_values=WALL)
    while steps[cell] > 1:
        near = (cell - cols - 2, cell - 1, cell + 1, cell + cols + 2)
        cell = next(other for other in near if steps[other] == steps[cell] - 1)
        answer.flat[cell] = PATH
    return answer[1:-1, 1:-1].reshape(-1)


def problem_of(question):
    """Return why the cells (N,) are no maze, in words; "" if they are one."""
    for sign, id in (("S", START), ("G", GOAL)):
        count = int((question == id).sum())
        if count != 1:
            return f"{count} {sign}, expected 1"
    if (question == PATH).any():
        return "a question with a path in it"
    return ""


def fault(question, answer, cols):
    """Return how an answer (N,) is no path through the maze (N,), in words; "" if it is one unbroken path."""
    marked = answer == PATH
    if (question[marked] != OPEN).any() or (answer != question)[~marked].any():
        return "it changes the maze"
    walled = np.where(marked | (question == START) | (question == GOAL), answer, WALL)
    steps = steps_to_goal(walled, cols)
    start = bordered(question, cols).index(START)
    if steps[start] < 0:
        return "no path from S to G"
    return "" if steps[start] == marked.sum() + 1 else "marks beside the path"


def verdict(question, answer, cols):
    """Return (whether an answer (N,) is a path through a maze (N,), words on that)."""
    problem = fault(question, answer, cols)
    best = solve(question, cols)
    if problem:
        return False, "no path: the maze has none" if best is None else f"no path: {problem}"
    shortest = (answer == PATH).sum() == (best == PATH).sum()
    return True, "shortest path" if shortest else "a path, not the shortest"


def turned(cells, rows, cols, turn):
    """Return mazes (..., N) turned and mirrored; turns 0 to 7, of which 0 to 3 keep the shape of any rectangle."""
    places = np.arange(rows * cols).reshape(rows, cols)
    places = np.flipud(places) if turn & 1 else places
    places = np.fliplr(places) if turn & 2 else places
    places = places.T if turn & 4 else places
    return cells[..., places.reshape(-1)]


def turns(rows, cols):
    """Return how many turns keep the shape of a maze."""
    return 8 if rows == cols else 4


def turn_each(questions, answers, rows, cols, rng):
    """Return questions and answers (B, N), each pair in a random turn; rng: numpy Generator."""
    turn = rng.integers(turns(rows, cols), size=len(questions))
    places = np.stack([turned(np.arange(rows * cols), rows, cols, t) for t in range(turns(rows, cols))])[turn]
    return np.take_along_axis(questions, places, 1), np.take_along_axis(answers, places, 1)


def disguises(questions, rows, cols):
    """Return bytes (n,) that are the same for a maze (n, N) and its turned and mirrored versions."""
    versions = (turned(questions, rows, cols, turn) + np.uint8(1) for turn in range(turns(rows, cols)))
    labels = [np.ascontiguousarray(version).view(f"S{rows * cols}")[:, 0] for version in versions]
    least = labels[0]
    for label in labels[1:]:
        least = np.where(label < least, label, least)
    return least
