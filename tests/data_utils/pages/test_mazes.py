"""Mazes: the path is a shortest one, each shortest path counts, and nothing else does."""

import random

import numpy as np

from data_utils.pages import mazes
from data_utils.pages.mazes import GOAL, OPEN, PATH, START, WALL
from data_utils.pages.render import layout, to_symbols, to_text
from data_utils.reasoning.maze import breadth_first

TIES = """
#######
#S    #
# # # #
#     #
# # # #
#    G#
#######
"""


def page_of(text):
    rows = text.split()
    return np.stack([to_symbols(row.replace(".", " ")) for row in rows])


def simple_paths(page, cell, seen):
    """Yield all paths from a cell to the goal that enter no cell twice, as sets of cells."""
    if page[cell] == GOAL:
        yield seen
        return
    for r, c in ((-1, 0), (0, -1), (0, 1), (1, 0)):
        near = cell[0] + r, cell[1] + c
        if page[near] != WALL and near not in seen:
            yield from simple_paths(page, near, seen | {near})


def all_paths(page):
    start = tuple(int(i) for i in np.argwhere(page == START)[0])
    return list(simple_paths(page, start, {start}))


def mark(page, cells):
    answer = page.copy()
    for cell in cells:
        answer[cell] = PATH if answer[cell] == OPEN else answer[cell]
    return answer


def test_mazes_against_a_plain_search():
    maker, lengths = mazes.Mazes(11), []
    for seed in range(40):
        draw = random.Random(seed)
        content, walls = maker.subject(draw)
        sample = maker.sample(draw, walls)
        if sample is None:
            continue
        page, target = sample[0], sample[1].reshape(11, 11)
        assert ((page == START).sum(), (page == GOAL).sum()) == (1, 1) and set(content) == {WALL, OPEN}
        assert (page[[0, -1]] == WALL).all() and (page[:, [0, -1]] == WALL).all()
        assert (page[1::2, 1::2] != WALL).all() and (page[::2, ::2] == WALL).all()
        paths = all_paths(page)
        shortest = min(map(len, paths))
        assert shortest - 1 >= 11 and (target == PATH).sum() == shortest - 2
        assert any((mark(page, path) == target).all() for path in paths)
        steps, _ = breadth_first(walls, 11, 12, WALL)
        assert all(step >= 0 for step, cell in zip(steps, walls, strict=True) if cell != WALL)
        lengths.append(len(paths))
    assert len(lengths) > 20 and max(lengths) > 1


def test_all_paths_of_a_maze_with_ties_are_accepted():
    page = page_of(TIES.replace(" ", "."))
    answers = [mark(page, path) for path in all_paths(page)]
    assert len(answers) > 6
    assert mazes.are_paths(np.stack([page] * len(answers)), np.stack(answers)).all()


def test_gaps_branches_walls_and_rings_are_no_paths():
    page = page_of(TIES.replace(" ", "."))
    good = mark(page, min(all_paths(page), key=len))
    gap, branch, wall, none, goal, ring = (good.copy() for _ in range(6))
    first = tuple(np.argwhere(good == PATH)[2])
    gap[first] = OPEN
    others = np.argwhere(good == OPEN)
    branch[tuple(next(o for o in others if (abs(np.argwhere(good == PATH) - o).sum(1) == 1).sum() == 1))] = PATH
    wall[2, 2] = PATH
    none[none == PATH] = OPEN
    goal[5, 5] = PATH
    assert not mazes.are_paths(np.stack([page] * 5), np.stack([gap, branch, wall, none, goal])).any()
    wide = page_of(
        "#########\n#S....G##\n#########\n#.......#\n#.#####.#\n#.......#\n#########\n#########\n#########".strip()
    )
    good = mark(wide, min(all_paths(wide), key=len))
    ring = good.copy()
    ring[3:6, 1:8][wide[3:6, 1:8] == OPEN] = PATH
    assert mazes.are_paths(np.stack([wide, wide]), np.stack([good, ring])).tolist() == [True, False]


def test_the_page_is_plain_characters():
    draw = random.Random(3)
    maker = mazes.Mazes(11)
    page, target = maker.sample(draw, maker.subject(draw)[1])
    assert set(to_text(page)) == set("# SG") and set(to_text(target)) == set("# SGo")
    assert (layout(to_text(page), 11, 11) == page).all()
