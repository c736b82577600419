"""Published puzzles of a folder of `prepare_data.py puzzles` as tasks, in place of made-up ones."""

import shlex
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.files import unused
from data_utils.pages.render import to_symbols
from data_utils.reasoning import arc_tasks, maze, sudoku, trm_layout
from data_utils.reasoning.folder import puzzle_kind, read_meta
from data_utils.reasoning.puzzle_layouts import Problems
from data_utils.reasoning.puzzle_rows import form_of
from models.glyphs import HOLE

DIGIT = np.uint8(ord("0") - 32)  # symbol of the digit 0
MAZE_SYMBOLS = to_symbols(maze.SIGNS)


def task_of(folder):
    """Return the name of the task of a folder of puzzles. Raises UsageError for another folder."""
    kind = puzzle_kind(folder)
    if not kind:
        raise UsageError(
            f"--puzzles {folder}: no folder of puzzles from prepare_data.py\ntry: python prepare_data.py puzzles --help"
        )
    return "arc" if kind == "arc" else form_of(read_meta(folder)).task


def load_tasks(folder):
    """Return the ARC tasks of a folder for arc.Arc: [(name, group, demonstrations, tests)]; tests have answers."""
    _, tasks = arc_tasks.read_tasks(Path(folder, "arc.json"), Problems())
    return [
        (task.name, task.group, [*task.train], [pair for pair in task.test if pair[1] is not None]) for task in tasks
    ]


def to_pages(cells, form):
    """Return Sudokus or mazes (n, N) as symbols (n, N) uint8; a blank cell of a Sudoku is a hole."""
    if form.kind == "maze":
        return MAZE_SYMBOLS[cells]
    return np.where(cells == 0, np.uint8(HOLE), cells + DIGIT)


def to_cells(symbols, form):
    """Return symbols (..., N) as cells of `form` (..., N) uint8; 0 for a symbol that stands for none."""
    table = np.zeros(256, np.uint8)
    table[to_pages(np.arange(form.ids, dtype=np.uint8), form)] = np.arange(form.ids)
    return table[symbols]


class Published:
    """Puzzles of a folder, as makers of samples. Training puzzles come again and again, each time in another version.

    Raises DataError for a folder without training puzzles, or with less than two held-out ones.
    """

    def __init__(self, folder):
        meta = read_meta(folder)
        self.form = form_of(meta)
        self.grids = sudoku.load_puzzles(folder, self.form.cells)
        self.spec = dict(name=f"published {self.form.task}", version=1, hash=meta.get("data_sha256", ""))
        counts = {split: len(questions) for split, (questions, _) in self.grids.items()}
        if not counts["train"] or counts["val"] < 2:
            raise DataError(
                f"{folder}: {counts['train']} training and {counts['val']} held-out puzzles, 1 and 2 are needed\n"
                "fix: prepare them with a larger --val_ratio"
            )
        self.order = (-1, None)  # the number of a pass over the training puzzles, and their order in it

    def limit(self, split):
        """Return the largest number of samples; 0 means no limit."""
        return len(self.grids["val"][0]) if split == "test" else 0

    def pair(self, index, split, seed):
        """Return question and answer (N,) of sample `index` of "train" or "test"; the first pass changes nothing."""
        if split == "test":
            return [cells[index] for cells in self.grids["val"]]
        turn, place = divmod(index, len(self.grids["train"][0]))
        if self.order[0] != (seed, turn):
            n = len(self.grids["train"][0])
            self.order = (seed, turn), np.random.default_rng((seed, turn)).permutation(n)
        row = self.order[1][place]
        question, answer = (np.asarray(cells[row : row + 1]) for cells in self.grids["train"])
        if turn:
            rng = np.random.default_rng((seed, turn, place))
            if self.form.kind == "maze":
                question, answer = maze.turn_each(question, answer, self.form.rows, self.form.cols, rng)
            else:
                question, answer = sudoku.augment(question, answer, size=self.form.rows, rng=rng)
        return question[0], answer[0]

    def sample(self, index, split, seed):
        """Return (page (R, C), target (N,), content that must not leak) of a sample."""
        question, answer = self.pair(index, split, seed)
        secret = question if self.form.kind == "maze" else answer
        page = to_pages(question, self.form).reshape(self.form.rows, self.form.cols)
        return page, to_pages(answer, self.form), secret.tobytes()


def adopt(cfg):
    """Point the flags of train_multimodal.py at published puzzles: those of --puzzles, or of the first of --data_paths.

    The pages of the puzzles are built in the folder `pages` among them. Raises DataError, UsageError.
    """
    first, *others = cfg.data_paths
    if trm_layout.is_here(cfg.puzzles or first):
        source = cfg.puzzles or first
        words = ["--source", source, "--out", str(unused(source, "_prepared"))]
        raise UsageError(
            f"{source}: the layout of HRM and TRM\ntry: python prepare_data.py puzzles {shlex.join(words)}"
        )
    if not cfg.puzzles and not puzzle_kind(first):
        return
    folder = cfg.puzzles or first
    name = task_of(folder)
    if name not in cfg.tasks and cfg.puzzles:
        remedy = f"--arch {name}" if cfg.tasks == (cfg.arch,) else f"--tasks {name}"  # its width fits the task
        raise UsageError(f"--puzzles {folder} holds {name}, --tasks are {' '.join(cfg.tasks)}\ntry: {remedy}")
    if name not in cfg.tasks:
        cfg.tasks = (name,)
        cfg.task_weights = ()
    cfg.puzzles = str(folder)
    cfg.data_paths = (str(Path(folder, "pages")), *others)
