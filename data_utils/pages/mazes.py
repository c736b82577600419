"""Mazes of `side` x `side` cells with walls around them: passages carved depth first, and a few more openings.

A cell with an odd row and an odd column is a room. One with two even numbers is a pillar and always wall. So no 2 x 2
cells are all open, and the marks of a path can be read in one order only.
"""

import numpy as np

from data_utils.pages.render import to_symbols
from data_utils.reasoning.maze import breadth_first

WALL, OPEN, START, GOAL, PATH = to_symbols("# SGo").tolist()
OPENED = 0.1  # share of the walls between two rooms that are opened after carving


class Mazes:
    """Mazes for a task of pages (side, side); the walls must not leak. The path is at least `side` steps long."""

    def __init__(self, side):
        self.side, self.label = side, f"{side} x {side} mazes"
        self.spec = dict(name="maze", version=1, opened=OPENED)
        self.rooms = [r * side + c for r in range(1, side, 2) for c in range(1, side, 2)]

    def subject(self, draw):
        """Return a maze without start and goal, as bytes and as symbols (side^2)."""
        cells = carve(self.side, self.rooms, draw)
        return bytes(cells), cells

    def sample(self, draw, subject):
        """Return page (side, side) and target (side^2,), the page with its path marked; None if no path is so long."""
        start = draw.choice(self.rooms)
        steps, before = breadth_first(subject, self.side, start, WALL)
        far = [room for room in self.rooms if steps[room] >= self.side]
        if not far:
            return None
        goal = draw.choice(far)
        page = np.frombuffer(subject, np.uint8).reshape(self.side, self.side).copy()
        page.flat[start], page.flat[goal] = START, GOAL
        target, cell = page.reshape(-1).copy(), before[goal]
        while cell != start:
            target[cell], cell = PATH, before[cell]
        return page, target


def carve(side, rooms, draw):
    """Return the cells of a maze, a bytearray: all rooms joined by a depth-first walk, then some walls opened."""
    cells = bytearray([WALL]) * (side * side)
    to_do = set(rooms)
    stack = [draw.choice(rooms)]
    cells[stack[0]] = OPEN
    to_do.remove(stack[0])
    while stack:
        room = stack[-1]
        near = [step for step in (-side, -1, 1, side) if room + 2 * step in to_do]
        if not near:
            stack.pop()
            continue
        step = draw.choice(near)
        room += 2 * step
        cells[room - step] = cells[room] = OPEN
        to_do.remove(room)
        stack.append(room)
    for room in rooms:
        for step, last in ((1, room % side == side - 2), (side, room // side == side - 2)):
            if not last and cells[room + step] == WALL and draw.random() < OPENED:
                cells[room + step] = OPEN
    return cells


def are_paths(pages, answers):
    """Return (n,) bool: whether an answer is its page with one unbroken path marked from start to goal, no branches.

    pages, answers: (n, R, C) symbols. The path need not be the shortest.
    """
    marked = answers == PATH
    ends = (pages == START) | (pages == GOAL)
    on = np.pad(marked | ends, ((0, 0), (1, 1), (1, 1)))
    good = (np.where(marked, pages == OPEN, answers == pages)).all((1, 2))
    middle = on[:, 1:-1, 1:-1]
    good &= (~middle | (_near(on) == np.where(ends, 1, 2))).all((1, 2))
    reached = np.zeros_like(on)
    reached[:, 1:-1, 1:-1] = pages == START
    while True:  # cells connected to the start; closed rings elsewhere also have two neighbours in each cell
        wider = middle & ((_near(reached) > 0) | reached[:, 1:-1, 1:-1])
        if (wider == reached[:, 1:-1, 1:-1]).all():
            return good & (wider == middle).all((1, 2))
        reached[:, 1:-1, 1:-1] = wider


def _near(on):
    """Return how many of the four neighbours are set in (n, R + 2, C + 2) bool, as (n, R, C)."""
    on = on.astype(int)
    return on[:, :-2, 1:-1] + on[:, 2:, 1:-1] + on[:, 1:-1, :-2] + on[:, 1:-1, 2:]
