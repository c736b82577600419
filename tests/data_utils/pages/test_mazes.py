"""Mazes: the way is shortest, each shortest way counts and nothing else does."""

import random

import numpy as np

from data_utils.pages import mazes
from data_utils.pages.mazes import GOAL, OPEN, START, WALL, WAY
from data_utils.pages.render import layout, to_symbols, to_text

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


def simple_ways(page, cell, seen):
    """All ways from a cell to the goal that enter no cell twice, as sets of cells."""
    if page[cell] == GOAL:
        yield seen
        return
    for r, c in ((-1, 0), (0, -1), (0, 1), (1, 0)):
        near = cell[0] + r, cell[1] + c
        if page[near] != WALL and near not in seen:
            yield from simple_ways(page, near, seen | {near})


def all_ways(page):
    start = tuple(int(i) for i in np.argwhere(page == START)[0])
    return list(simple_ways(page, start, {start}))


def mark(page, cells):
    answer = page.copy()
    for cell in cells:
        answer[cell] = WAY if answer[cell] == OPEN else answer[cell]
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
        found = all_ways(page)
        shortest = min(map(len, found))
        assert shortest - 1 >= 11 and (target == WAY).sum() == shortest - 2
        assert any((mark(page, way) == target).all() for way in found)
        assert all(step >= 0 for step, cell in zip(mazes.search(walls, 11, 12)[0], walls, strict=True) if cell != WALL)
        lengths.append(len(found))
    assert len(lengths) > 20 and max(lengths) > 1


def test_ways_accepts_every_way_of_a_maze_with_ties():
    page = page_of(TIES.replace(" ", "."))
    answers = [mark(page, way) for way in all_ways(page)]
    assert len(answers) > 6
    assert mazes.ways(np.stack([page] * len(answers)), np.stack(answers)).all()


def test_ways_rejects_gaps_branches_walls_rings_and_other_pages():
    page = page_of(TIES.replace(" ", "."))
    good = mark(page, min(all_ways(page), key=len))
    gap, branch, wall, none, goal, ring = (good.copy() for _ in range(6))
    first = tuple(np.argwhere(good == WAY)[2])
    gap[first] = OPEN
    others = np.argwhere(good == OPEN)
    branch[tuple(next(o for o in others if (abs(np.argwhere(good == WAY) - o).sum(1) == 1).sum() == 1))] = WAY
    wall[2, 2] = WAY
    none[none == WAY] = OPEN
    goal[5, 5] = WAY
    assert not mazes.ways(np.stack([page] * 5), np.stack([gap, branch, wall, none, goal])).any()
    wide = page_of(
        "#########\n#S....G##\n#########\n#.......#\n#.#####.#\n#.......#\n#########\n#########\n#########".strip()
    )
    good = mark(wide, min(all_ways(wide), key=len))
    ring = good.copy()
    ring[3:6, 1:8][wide[3:6, 1:8] == OPEN] = WAY
    assert mazes.ways(np.stack([wide, wide]), np.stack([good, ring])).tolist() == [True, False]


def test_the_page_is_plain_characters():
    draw = random.Random(3)
    maker = mazes.Mazes(11)
    page, target = maker.sample(draw, maker.subject(draw)[1])
    assert set(to_text(page)) == set("# SG") and set(to_text(target)) == set("# SGo")
    assert (layout(to_text(page), 11, 11) == page).all()
