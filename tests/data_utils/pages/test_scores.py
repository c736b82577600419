"""Scores against plain counting: edits, names, shortest paths."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_utils.pages import scores, tasks
from data_utils.pages.mazes import GOAL, OPEN, PATH, START, WALL
from data_utils.pages.render import layout, to_symbols
from models.glyphs import END, HOLE, PADDING

SMALL = dict(page_rows=2, page_cols=24, text_source="stories", stories="", code_dir="", arc_set="agi1", arc_side=10)


def samples(name, n=6):
    source = tasks.open_tasks([name], **SMALL)[name]
    drawn = [source.make(i, "train", 0) for i in range(n)]
    return source.task, np.stack([s.page for s in drawn]), np.stack([s.target for s in drawn])


def row(text, length):
    return layout(text, 1, length)[0]


def naive_edits(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(naive_edits(a[1:], b[1:]) + (a[0] != b[0]), naive_edits(a[1:], b) + 1, naive_edits(a, b[1:]) + 1)


@pytest.mark.parametrize("name", ["read", "continue", "sudoku4", "sudoku6", "maze"])
def test_right_answers(name):
    task, pages, targets = samples(name)
    shares = scores.score_answers(task, *map(torch.from_numpy, (pages, targets, targets.astype(np.int64))))
    for key, values in shares.items():
        assert values.shape == (6,) and values.dtype == np.float64 and (values == (key != "cer")).all(), key
    answers = targets.copy()
    answers[:3, 4] = 110
    shares = scores.score_answers(task, pages, targets, answers)
    first = next(iter(shares.values()))
    assert (first[:3] < 1).all() and (first[3:] == 1).all()
    counts = (targets != PADDING).sum(1)
    inner = shares.get("characters", shares.get("cells"))
    assert np.allclose(inner[:3], 1 - 1 / counts[:3])


def test_first_names_and_padding():
    firsts = dict(read="characters", fill="exact", sudoku9="exact", maze="optimal", arc="exact")
    page, target = np.full((1, 11, 11), 5), np.full((1, 121), 5)
    target[:, 100:] = PADDING
    for name, first in {**firsts, "continue": "characters"}.items():
        answer = np.where(target == PADDING, 7, target)
        shares = scores.score_answers(SimpleNamespace(name=name), page, target, answer)
        assert next(iter(shares)) == first and (shares[first] == 1).all() == (name != "maze")


def test_blank_cells_and_spaces():
    page = to_symbols("1234" * 4)
    page[:8] = HOLE
    target, answer = to_symbols("1234" * 4), to_symbols("1111" * 4)
    shares = scores.score_answers(SimpleNamespace(name="sudoku4"), page.reshape(1, 4, 4), target[None], answer[None])
    assert (shares["exact"][0], shares["cells"][0], shares["blanks"][0]) == (0, 0.25, 0.25)
    answer[8:] = target[8:]
    shares = scores.score_answers(SimpleNamespace(name="sudoku4"), page.reshape(1, 4, 4), target[None], answer[None])
    assert (shares["cells"][0], shares["blanks"][0]) == (0.625, 0.25)
    target, answer = row("a b c", 8)[None], row("a_b d", 8)[None]
    shares = scores.score_answers(SimpleNamespace(name="read"), target.reshape(1, 2, 4), target, answer)
    assert shares["characters"][0] == 4 / 6 and shares["no_spaces"][0] == 3 / 4 and shares["cer"][0] == 2 / 5


def test_edits_against_the_definition():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("ab"), rng.integers(0, 6))) for _ in range(80)]
    targets, answers = (np.stack([row(word, 5) for word in some]).astype(int) for some in (words[:40], words[40:]))
    expected = [naive_edits(a, b) for a, b in zip(words[:40], words[40:], strict=True)]
    assert scores.edits(targets, answers).tolist() == expected
    assert (targets[:, -1] == END).any()


def test_names_copied():
    text = " At last Bola took the kite home from the mill."
    answers = [text, " Then Bola left the mill at the kiteee for good.", " At last Bolan", ""]
    targets = np.stack([row(text, 64)] * 4)
    shares = scores.copied_names(targets, np.stack([row(answer, 64) for answer in answers]))
    assert shares.tolist() == [1, 2 / 3, 0, 0]
    assert np.isnan(scores.copied_names(row("import os", 64)[None], row(text, 64)[None]))[0]


def test_optimal_accepts_each_shortest_way_and_valid_longer_ones():
    page = np.full((7, 7), OPEN)
    page[[0, -1]] = page[:, [0, -1]] = WALL
    page[2:5:2, 2:5:2] = WALL
    page[1, 1], page[5, 5] = START, GOAL

    def along(*cells):
        answer = page.copy()
        for cell in cells:
            answer[cell] = PATH
        return answer.reshape(-1)

    edge = [(1, 2), (1, 3), (1, 4), (1, 5), (2, 5), (3, 5), (4, 5)]
    middle = [(2, 1), (3, 1), (3, 2), (3, 3), (4, 3), (5, 3), (5, 4)]
    longer = [(1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1), (4, 1), (5, 1), (5, 2), (5, 3), (5, 4)]
    answers = np.stack([along(*edge), along(*middle), along(*longer), along(*edge[:-1]), along(*edge, (3, 4))])
    pages, targets = np.stack([page] * 5), np.stack([along(*edge)] * 5)
    shares = scores.score_answers(SimpleNamespace(name="maze"), pages, targets, answers)
    assert shares["optimal"].tolist() == [1, 1, 0, 0, 0] and shares["valid"].tolist() == [1, 1, 1, 0, 0]
