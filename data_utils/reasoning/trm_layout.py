"""The training layout that HRM (sapientinc/HRM) and TRM (SamsungSAILMontreal/TinyRecursiveModels) publish, both ways.

train/, test/       dataset.json with sizes, and five arrays: all__inputs and all__labels (examples, seq_len),
                    all__puzzle_identifiers (puzzles,), all__puzzle_indices (puzzles + 1,), all__group_indices
                    (groups + 1,)
identifiers.json    the name of each identifier; 0 is <blank>
test_puzzles.json   ARC: the tasks of test/, as its evaluation reads them

A puzzle is a range of examples: one, or the pairs of an ARC task. A group is a range of puzzles: an original, then its
augmented versions. Token 0 pads, and a label of 0 is ignored.
    Sudoku  seq_len 81, vocab_size 11: 1 blank, digit + 1
    maze    seq_len rows * columns, vocab_size 6: place in "# SGo" + 1
    ARC     seq_len 900, vocab_size 12: 1 at the lower and right end of a grid, colour + 2
"""

import json
import math
from pathlib import Path

import numpy as np

from data_utils.errors import DataError
from data_utils.reasoning import maze
from data_utils.reasoning.arc_tasks import MOST, ArcTask
from data_utils.reasoning.sudoku import BOXES

ARRAYS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")
SPLITS = dict(train="train", test="val")
CHARSET = "# SGo"  # of their mazes
TO_MAZE = np.array([0, *(CHARSET.index(sign) + 1 for sign in maze.SIGNS)], np.uint8)[1:]  # our cell -> their token
END, COLOUR = 1, 2  # ARC: token of the end of a grid, and of colour 0
SEPARATOR = "|||"  # between the name of an ARC task and its change


def turned(grid, turn):
    """Return a grid in one of eight turns, numbered as in their dataset/common.py."""
    if turn < 4:
        return np.rot90(grid, turn)
    return (np.fliplr, np.flipud, np.transpose, lambda g: np.fliplr(np.rot90(g)))[turn - 4](grid)


# ---- write -----------------------------------------------------------------------------------------------------------


def sudoku_tokens(cells):
    """Return the tokens of Sudokus (n, N); 0 is a blank cell."""
    return cells + np.uint8(1)


def maze_tokens(cells):
    """Return the tokens of mazes (n, N)."""
    return TO_MAZE[cells]


def grid_tokens(grid, down=0, right=0):
    """Return the tokens (900,) of a grid at an offset, with an end below and beside it where there is room."""
    page = np.zeros((MOST, MOST), np.uint8)
    rows, cols = down + grid.shape[0], right + grid.shape[1]
    page[down:rows, right:cols] = grid + np.uint8(COLOUR)
    page[rows : rows + 1, right:cols] = END
    page[down:rows, cols : cols + 1] = END
    return page.reshape(-1)


def to_arrays(groups):
    """Return the five arrays of groups [[(identifier, [(input tokens, label tokens)])]]."""
    puzzles = [puzzle for group in groups for puzzle in group]
    pairs = [pair for _, examples in puzzles for pair in examples]
    sizes = [len(examples) for _, examples in puzzles]
    return dict(
        inputs=np.stack([pair[0] for pair in pairs]),
        labels=np.stack([pair[1] for pair in pairs]),
        puzzle_identifiers=np.array([number for number, _ in puzzles], np.int32),
        puzzle_indices=np.cumsum([0, *sizes]).astype(np.int32),
        group_indices=np.cumsum([0, *map(len, groups)]).astype(np.int32),
    )


def one_each(inputs, labels, versions):
    """Return the five arrays of puzzles of one example each, of which `versions` in a row are a group."""
    n = len(inputs)
    return dict(
        inputs=inputs,
        labels=labels,
        puzzle_identifiers=np.zeros(n, np.int32),
        puzzle_indices=np.arange(n + 1, dtype=np.int32),
        group_indices=np.arange(0, n + 1, versions, dtype=np.int32),
    )


def metadata(arrays, vocab_size, identifiers):
    """Return the content of dataset.json."""
    puzzles = len(arrays["puzzle_indices"]) - 1
    return dict(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=vocab_size,
        seq_len=arrays["inputs"].shape[1],
        num_puzzle_identifiers=identifiers,
        total_groups=len(arrays["group_indices"]) - 1,
        mean_puzzle_examples=len(arrays["inputs"]) / puzzles,
        total_puzzles=puzzles if vocab_size == 12 else len(arrays["group_indices"]) - 1,  # as their builders count
        sets=["all"],
    )


def arc_groups(tasks, versions, rng):
    """Return ({split: groups of `to_arrays`}, [name of each identifier], {name: task} of test_puzzles.json).

    Demonstrations of all tasks are trained, and so are the tests of tasks of the group training, if there are others.
    versions: changed copies of each task (turned, with other colours, at other places), beside the original.
    """
    held_out = {task.name for task in tasks if task.group == "evaluation"} or {task.name for task in tasks}
    names = ["<blank>"]
    splits = dict(train=[], test=[])
    puzzles = {}
    for task in tasks:
        tested = task.name in held_out
        sides = dict(train=[*task.train], test=[])
        tests = [(grid, np.zeros((1, 1), np.uint8) if answer is None else answer) for grid, answer in task.test]
        sides["test" if tested else "train"] += tests
        groups = dict(train=[], test=[])
        for version in range(1 + versions):
            turn = int(rng.integers(8)) if version else 0
            colours = np.array([0, *rng.permutation(np.arange(1, 10))], np.uint8) if version else np.arange(10)
            change = f"{SEPARATOR}t{turn}{SEPARATOR}{''.join(map(str, colours))}" if version else ""
            for split, pairs in sides.items():
                examples = []
                for pair in pairs:
                    grids = [turned(colours.astype(np.uint8)[grid], turn) for grid in pair]
                    room = [MOST - max(grid.shape[axis] for grid in grids) for axis in (0, 1)]
                    moves = bool(version) and split == "train"
                    place = [int(rng.integers(free + 1)) if moves else 0 for free in room]
                    examples.append(tuple(grid_tokens(grid, *place) for grid in grids))
                if examples:
                    groups[split].append((len(names), examples))
            names.append(task.name + change)
        for split, group in groups.items():
            if group:
                splits[split].append(group)
        if tested:
            sides = dict(train=task.train, test=tests)
            puzzles[task.name] = {
                side: [dict(input=grid.tolist(), output=answer.tolist()) for grid, answer in pairs]
                for side, pairs in sides.items()
            }
    return splits, names, puzzles


# ---- read ------------------------------------------------------------------------------------------------------------


def is_here(folder):
    """Return whether a folder has this layout."""
    return Path(folder, "train", "dataset.json").is_file() or Path(folder, "test", "dataset.json").is_file()


def read_split(folder):
    """Return (dataset.json, the five arrays) of train/ or test/. Raises DataError unless they fit each other."""
    path = Path(folder, "dataset.json")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: meta[name] for name in ("pad_id", "vocab_size", "seq_len")}
        sets = meta["sets"]
        _expect(all(type(size) is int and 0 <= size < 2**20 for size in sizes.values()), f"sizes {sizes}")
        _expect(all(isinstance(name, str) and Path(name).name == name for name in sets) and sets, f"sets {sets}")
        parts = []
        for name in sets:
            arrays = {}
            for array in ARRAYS:
                path = Path(folder, f"{name}__{array}.npy")
                arrays[array] = np.load(path, mmap_mode="r", allow_pickle=False)
            _check(arrays, meta)
            parts.append(arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as e:
        raise DataError(f"{path}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}") from e
    return meta, _joined(parts)


def _expect(condition, problem):
    if not condition:
        raise ValueError(problem)


def _check(arrays, meta):
    """Raise ValueError unless shapes, types and ranges fit."""
    n, puzzles, groups = (len(arrays[name]) for name in ("inputs", "puzzle_identifiers", "group_indices"))
    for name in ("inputs", "labels"):
        x = arrays[name]
        fits = x.ndim == 2 and x.shape == (n, meta["seq_len"]) and x.dtype.kind in "iu"
        _expect(fits, f"{name} is {x.dtype} {x.shape}, expected whole numbers ({n}, {meta['seq_len']})")
        _expect(not x.size or 0 <= x.min() <= x.max() < meta["vocab_size"], f"{name} has tokens beyond vocab_size")
    for name, last, length in (("puzzle_indices", n, puzzles + 1), ("group_indices", puzzles, groups)):
        x = arrays[name]
        rises = (
            x.ndim == 1 and x.dtype.kind in "iu" and len(x) == length > 0 and (np.diff(x.astype(np.int64)) >= 0).all()
        )
        _expect(rises and x[0] == 0 and x[-1] == last, f"{name} does not divide what it indexes, 0 to {last}")


def _joined(parts):
    """Return the arrays of several sets as one."""
    first, *others = parts
    for part in others:
        ends = dict(puzzle_indices=first["puzzle_indices"][-1], group_indices=first["group_indices"][-1])
        shifted = {name: np.asarray(part[name][1:]) + end for name, end in ends.items()}
        first = {name: np.concatenate([first[name], shifted.get(name, part[name])]) for name in ARRAYS}
    return first


def kind_of(meta):
    """Return ("sudoku", size), ("maze", cells) or ("arc", 30) of a dataset.json. Raises DataError for another one."""
    vocab_size, seq_len = meta["vocab_size"], meta["seq_len"]
    side = math.isqrt(seq_len)
    if side * side == seq_len and side in BOXES and vocab_size == side + 2:
        return "sudoku", side
    if vocab_size == len(CHARSET) + 1:
        return "maze", seq_len
    if (vocab_size, seq_len) == (12, MOST * MOST):
        return "arc", MOST
    raise DataError(f"vocab_size {vocab_size}, seq_len {seq_len}: neither Sudoku (11, 81), maze (6) nor ARC (12, 900)")


def originals(arrays):
    """Return the examples (n,) that are no augmented versions: those of the first puzzle of each group.

    The trainers make versions of their own. A group whose puzzles have other numbers of some token holds different
    puzzles, and all of them stay.
    """
    starts = np.asarray(arrays["puzzle_indices"], np.int64)
    groups = np.asarray(arrays["group_indices"], np.int64)
    if (np.diff(groups) == 1).all() and (np.diff(starts) == 1).all():
        return np.arange(len(arrays["inputs"]))
    rows = []
    for first, last in zip(groups[:-1], groups[1:], strict=True):
        examples = np.asarray(arrays["inputs"][starts[first] : starts[last]])
        blanks = (examples == 1).sum(1)  # blanks of a Sudoku, walls of a maze: no change moves their number
        several = len(blanks) and (blanks != blanks[0]).any()
        rows.append(np.arange(starts[first], starts[last] if several else starts[min(first + 1, last)]))
    return np.concatenate(rows) if rows else np.zeros(0, np.int64)


def cells_of(tokens, kind):
    """Return Sudokus or mazes (n, N) of tokens; 255 for a token that stands for none."""
    if kind == "sudoku":
        table = np.concatenate([[255], np.arange(255)]).astype(np.uint8)
    else:
        table = np.full(256, 255, np.uint8)
        table[TO_MAZE] = np.arange(len(TO_MAZE))
    return table[np.asarray(tokens).astype(np.uint8)]


def grid_of(tokens):
    """Return the grid that the tokens (900,) of ARC show, wherever it stands. Raises ValueError if it has a gap."""
    page = np.asarray(tokens).reshape(MOST, MOST)
    coloured = page >= COLOUR
    rows, cols = np.flatnonzero(coloured.any(1)), np.flatnonzero(coloured.any(0))
    _expect(len(rows), "no colour in it")
    grid = page[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    _expect((grid >= COLOUR).all(), "no rectangle of colours")
    return (grid - COLOUR).astype(np.uint8)


def read_names(folder):
    """Return the names in identifiers.json; [] without that file. Raises DataError."""
    path = Path(folder, "identifiers.json")
    if not path.is_file():
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        _expect(isinstance(names, list), "expected a list of names")
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: {e}") from e
    return [str(name) for name in names]


def read_arc(folder, splits, problems):
    """Return the ArcTasks of {split: arrays}, the original of each group; those with a test are of group evaluation."""
    names = read_names(folder)
    pairs = {}
    for split, arrays in splits.items():
        starts = np.asarray(arrays["puzzle_indices"], np.int64)
        for puzzle in np.unique(arrays["group_indices"][:-1]).tolist():
            number = int(arrays["puzzle_identifiers"][puzzle])
            name = names[number] if 0 <= number < len(names) else f"puzzle {number}"
            sides = pairs.setdefault(name, dict(train=[], test=[]))
            for i in range(starts[puzzle], starts[puzzle + 1]):
                try:
                    sides[split].append(tuple(grid_of(arrays[array][i]) for array in ("inputs", "labels")))
                except ValueError as e:
                    problems.add(f"{folder}/{split}: row {i}", "pairs with a grid that is none", str(e))
    return [
        ArcTask(name, "evaluation" if sides["test"] else "training", tuple(sides["train"]), tuple(sides["test"]))
        for name, sides in pairs.items()
    ]
