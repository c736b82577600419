"""Sudoku of 4 x 4, 6 x 6 (boxes of 2 rows, 3 columns) and 9 x 9 cells: puzzles with one solution, their symmetries.

A grid is a row of size^2 uint8 digits, 0 = blank. B puzzles, N = size^2 cells. `draw` is a random.Random.
"""

import hashlib
import random
from functools import cache, partial

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.workers import in_order

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
NODES = 400  # visited by a random fill before it restarts: the rare long searches cost more than all the short ones


@cache
def units(size):
    """Return the (row, column, box) of each cell."""
    high, wide = BOXES[size]
    return [(i // size, i % size, i // size // high * (size // wide) + i % size // wide) for i in range(size * size)]


@cache
def peers(size):
    """Return for each cell the other cells of its row, column and box."""
    places = units(size)
    return [
        [j for j, other in enumerate(places) if j != i and any(map(int.__eq__, place, other))]
        for i, place in enumerate(places)
    ]


def _search(grid, size, limit, draw=None, guesses=None):
    """Fill the blanks of the list `grid`, fewest candidates first; return the number of solutions, at most `limit`.

    With `draw` cell and digits are random, and the grid stays filled at the first solution; then 0 may also mean that
    NODES were not enough. The free digits of rows, columns and boxes are bit masks. guesses: a list that gets each cell
    with several candidates.
    """
    places = units(size)
    all_free = (1 << size) - 1
    rows, columns, boxes = [all_free] * size, [all_free] * size, [all_free] * size
    nodes = NODES

    def flip(cell, bit):
        row, column, box = places[cell]
        rows[row] ^= bit
        columns[column] ^= bit
        boxes[box] ^= bit

    def fill(blanks, wanted):
        nonlocal nodes
        if not blanks:
            return 1
        nodes -= 1
        if draw and nodes < 0:
            return 0
        fewest, tied = size + 1, []
        for cell in blanks:
            row, column, box = places[cell]
            free = rows[row] & columns[column] & boxes[box]
            count = free.bit_count()
            if count < fewest:
                fewest, tied = count, [(cell, free)]
                if count < 2 and not draw:
                    break
            elif draw and count == fewest:
                tied.append((cell, free))
        cell, free = draw.choice(tied) if draw else tied[0]
        if guesses is not None and fewest > 1:
            guesses.append(cell)
        others = [blank for blank in blanks if blank != cell]
        solutions = 0
        digits = [d for d in range(size) if free >> d & 1]
        if draw:
            draw.shuffle(digits)
        for digit in digits:
            flip(cell, 1 << digit)
            grid[cell] = digit + 1
            solutions += fill(others, wanted - solutions)
            flip(cell, 1 << digit)
            if solutions >= wanted:
                break
        if not solutions or not draw:
            grid[cell] = 0
        return solutions

    for cell, digit in enumerate(grid):
        if digit:
            flip(cell, 1 << digit - 1)
    return fill([cell for cell, digit in enumerate(grid) if not digit], limit)


def rate(puzzle, size):
    """Return how often a search must guess until it has solved the puzzle (N,) and seen that no other solution exists.

    The search fills a cell with the fewest candidates first. It never guesses where single candidates are enough.
    """
    guesses = []
    _search(np.asarray(puzzle).tolist(), size, 2, guesses=guesses)
    return len(guesses)


def sudoku(*, size, givens, n, seed, first=0):
    """Return puzzles and solutions, (n, N) uint8 each; puzzle i depends on (seed, first + i) only.

    A solution is a random fill of the empty grid. It is no shuffle of one pattern, because `augment` makes shuffles:
    held-out grids would then have been trained on. Cells are emptied in random order while the solution stays the only
    one, down to `givens` (0: until no cell can be emptied).
    """
    if size not in BOXES or not 0 <= givens <= size * size:
        raise UsageError(f"--size {size} --givens {givens}: sizes are 4, 6, 9, givens 0 to size^2")
    puzzles, solutions = np.zeros((2, n, size * size), np.uint8)
    for i in range(n):
        draw = random.Random(f"{seed} {first + i}")
        solutions[i] = grid = fill(size, draw)
        puzzles[i] = empty(grid, size, givens, draw)
    return puzzles, solutions


def fill(size, draw):
    """Return a random full grid, a list of N digits."""
    grid = [0] * (size * size)
    while not _search(grid, size, 1, draw):
        grid = [0] * (size * size)
    return grid


def empty(grid, size, givens, draw):
    """Return the full `grid` with cells emptied in random order, as in `sudoku`."""
    grid = list(grid)
    filled = size * size
    for cell in draw.sample(range(size * size), size * size):
        if filled <= givens:
            break
        digit = grid[cell]
        for other in set(range(1, size + 1)) - {grid[peer] for peer in peers(size)[cell]}:
            grid[cell] = other
            if other != digit and _search(list(grid), size, 1):  # a second solution: the digit must stay
                grid[cell] = digit
                break
        else:
            grid[cell] = 0
            filled -= 1
    return grid


def make(*, size, givens, train, val, seed, processes=1):
    """Return {split: (puzzles, solutions)}; no val solution is a relabelling or transposition of a train one.

    The result does not depend on the number of processes. Raises UsageError if too few solutions fall into a split.
    """
    share = val / max(1, train + val)
    needed = dict(train=train, val=val)
    pairs = dict(train=[], val=[])
    firsts = range(0, 20 * (train + val) + 1000, 100)
    for puzzles, solutions in in_order(partial(_block, size, givens, seed), firsts, processes):
        for puzzle, solution in zip(puzzles, solutions, strict=True):
            digest = hashlib.sha256(f"{seed} ".encode() + canonical(solution, size)).digest()
            split = "val" if int.from_bytes(digest[:8]) < share * 2**64 else "train"
            if len(pairs[split]) < needed[split]:
                pairs[split].append((puzzle, solution))
        if all(len(pairs[split]) == n for split, n in needed.items()):
            cells = size * size
            return {s: tuple(np.array(x, np.uint8).reshape(-1, 2, cells).swapaxes(0, 1)) for s, x in pairs.items()}
    raise UsageError(f"--size {size} --seed {seed}: too few different solutions for two splits\ntry: another --seed")


def _block(size, givens, seed, first):
    return sudoku(size=size, givens=givens, n=100, seed=seed, first=first)


def canonical(solution, size):
    """Return bytes that are the same for a solution, its relabellings and its transpositions."""
    grid = solution.reshape(size, size)
    high, wide = BOXES[size]
    grids = (grid, grid.T) if high == wide else (grid,)
    return min(_relabelled(g.reshape(-1)) for g in grids)


def _relabelled(cells):
    """Return the cells with digits renamed in order of appearance."""
    names = {}
    return bytes(names.setdefault(digit, len(names)) for digit in cells.tolist())


def augment(puzzles, solutions, *, size, rng, reveal=0.0):
    """Return (B, N) puzzles and solutions under random symmetries.

    rng: numpy Generator. reveal: share of the puzzles in which a random part of the blanks is filled.
    """
    cells, digits = symmetries(len(puzzles), size, rng)
    both = np.stack([puzzles, solutions], 1)  # (B, 2, N)
    each = np.arange(len(puzzles))[:, None, None]
    both = digits[each, both[each, np.arange(2)[:, None], cells[:, None]]]
    puzzles, solutions = both[:, 0], both[:, 1]
    share = rng.random((len(puzzles), 1)) * (rng.random((len(puzzles), 1)) < reveal)
    return np.where((puzzles == 0) & (rng.random(puzzles.shape) < share), solutions, puzzles), solutions


def symmetries(n, size, rng):
    """Draw n symmetries of digits, bands, stacks, their lines, and transposition -> cells (n, N), digits (n, size + 1).

    Cell i of a changed grid is digits[grid[cells[i]]]. rng: numpy Generator.
    """
    high, wide = BOXES[size]
    rows, columns = (_lines(n, size, block, rng) for block in (high, wide))
    cells = rows[:, :, None] * size + columns[:, None, :]  # (n, size, size): where each cell comes from
    if high == wide:  # transposition keeps the shape of a square box
        turned = rng.random(n) < 0.5
        cells = np.where(turned[:, None, None], cells.transpose(0, 2, 1), cells)
    digits = np.zeros((n, size + 1), np.uint8)
    digits[:, 1:] = rng.random((n, size)).argsort(1) + 1
    return cells.reshape(n, -1), digits


def undo(grids, cells, digits):
    """Return the grids (n, N) without the symmetries that made them: cells, digits as in `symmetries`."""
    each = np.arange(len(grids))[:, None]
    before = np.empty_like(grids)
    before[each, cells] = digits.argsort(1).astype(grids.dtype)[each, grids]
    return before


def _lines(n, size, block, rng):
    """Return n random orders of lines (n, size): blocks permuted, and lines within each block."""
    blocks = rng.random((n, size // block)).argsort(1)
    inside = rng.random((n, size // block, block)).argsort(2)
    return (blocks[:, :, None] * block + inside).reshape(n, size)


def solved(grids, size):
    """Return (B,) bool: whether every row, column and box of the (B, N) grids has every digit once."""
    valid = np.ones(len(grids), bool)
    for place in np.array(units(size)).T:
        groups = grids[:, place.argsort(kind="stable")].reshape(len(grids), size, size)
        valid &= (np.sort(groups, 2) == np.arange(1, size + 1)).all((1, 2))
    return valid


def parse_puzzle(text):
    """Return the puzzle (N,) uint8 of a text: size^2 digits, "." or 0 for a blank, white space ignored.

    Raises UsageError for another length or character, and for a digit twice in a row, column or box.
    """
    signs = "".join(text.split())
    size = {n * n: n for n in BOXES}.get(len(signs))
    if size is None:
        raise UsageError(f"a puzzle of {len(signs)} signs: expected 81 (or 16, 36), digits and . for blanks")
    for i, sign in enumerate(signs):
        if sign not in "." + "0123456789"[: size + 1]:
            raise UsageError(f"row {i // size + 1}, column {i % size + 1}: {sign!r} is not . or 0 to {size}")
    grid = np.array([int(sign) if sign != "." else 0 for sign in signs], np.uint8)
    seen = {}
    for i, places in enumerate(units(size)):
        for name, number in zip(("row", "column", "box"), places, strict=True):
            j = seen.setdefault((name, number, grid[i]), i) if grid[i] else i
            if j != i:
                where = " and ".join(f"row {k // size + 1}, column {k % size + 1}" for k in (j, i))
                raise UsageError(f"contradictory puzzle: {name} {number + 1} has {grid[i]} twice: {where}")
    return grid


def load_puzzles(folder):
    """Return {split: (puzzles, solutions)} of a prepared Sudoku folder, (n, N) uint8 memory maps each."""
    splits = {}
    for split in ("train", "val"):
        path = f"{folder}/{split}.npy"
        try:
            grids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise DataError(f"{path}: {str(e).splitlines()[0]}\ntry: python prepare_data.py sudoku --out DIR") from e
        cells = {n * n for n in BOXES}
        if grids.dtype != np.uint8 or grids.ndim != 3 or grids.shape[1] != 2 or grids.shape[2] not in cells:
            raise DataError(f"{path}: expected uint8 (n, 2, cells), found {grids.dtype} {grids.shape}")
        splits[split] = grids[:, 0], grids[:, 1]
    return splits
