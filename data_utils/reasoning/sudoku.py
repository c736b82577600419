"""Sudoku of 4 x 4, 6 x 6 (boxes of 2 rows, 3 columns) and 9 x 9 cells: puzzles with one solution, their symmetries.

A grid is a row of size^2 uint8 digits, 0 = blank. B puzzles, N = size^2 cells. `draw` is a random.Random.
"""

import hashlib
import random
import shlex
from functools import cache, partial

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.workers import in_order

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
NODES = 400  # visited by a random fill before it restarts: the rare long searches cost more than all the short ones
MOST_NODES = 100_000  # visited by `solve` before it gives up: some seconds


class _TooLongError(Exception):
    """A search visited more nodes than it may."""


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


def _search(grid, size, limit, draw=None, solutions=None, most=0, guesses=None):
    """Fill the blanks of the list `grid`, fewest candidates first; return the number of solutions, at most `limit`.

    With `draw` cell and digits are random, and the grid stays filled at the first solution; then 0 may also mean that
    NODES were not enough. solutions: a list that gets each solution. most: nodes after which _TooLongError is raised.
    guesses: a list that gets each cell with several candidates. The free digits of rows, columns and boxes are bit
    masks.
    """
    places = units(size)
    all_free = (1 << size) - 1
    rows, columns, boxes = [all_free] * size, [all_free] * size, [all_free] * size
    nodes = most or NODES

    def flip(cell, bit):
        row, column, box = places[cell]
        rows[row] ^= bit
        columns[column] ^= bit
        boxes[box] ^= bit

    def fill(blanks, wanted):
        nonlocal nodes
        if not blanks:
            if solutions is not None:
                solutions.append(list(grid))
            return 1
        nodes -= 1
        if draw and nodes < 0:
            return 0
        if most and nodes < 0:
            raise _TooLongError
        fewest, tied = size + 1, []
        for cell in blanks:
            row, column, box = places[cell]
            free = rows[row] & columns[column] & boxes[box]
            candidates = free.bit_count()
            if candidates < fewest:
                fewest, tied = candidates, [(cell, free)]
                if candidates < 2 and not draw:
                    break
            elif draw and candidates == fewest:
                tied.append((cell, free))
        cell, free = draw.choice(tied) if draw else tied[0]
        if guesses is not None and fewest > 1:
            guesses.append(cell)
        others = [blank for blank in blanks if blank != cell]
        count = 0
        digits = [d for d in range(size) if free >> d & 1]
        if draw:
            draw.shuffle(digits)
        for digit in digits:
            flip(cell, 1 << digit)
            grid[cell] = digit + 1
            count += fill(others, wanted - count)
            flip(cell, 1 << digit)
            if count >= wanted:
                break
        if not count or not draw:
            grid[cell] = 0
        return count

    for cell, digit in enumerate(grid):
        if digit:
            flip(cell, 1 << digit - 1)
    return fill([cell for cell, digit in enumerate(grid) if not digit], limit)


def solve(puzzle, size, most=MOST_NODES):
    """Return (number of solutions, a solution (N,) uint8 or None) of a puzzle (N,) without contradictions.

    The number is 0, 1, or 2 for several; None if `most` nodes of the search were not enough.
    """
    solutions = []
    try:
        count = _search(puzzle.tolist(), size, 2, solutions=solutions, most=most)
    except _TooLongError:
        count = None
    return count, np.array(solutions[0], np.uint8) if solutions else None


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
    raise UsageError(
        f"--size {size} --seed {seed}: too few different solutions \nfix: fewer of them, or another --seed"
    )


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


def disguises(grids, size):
    """Return bytes (n,) that are the same for a grid (n, N), its relabellings, its turned and mirrored versions."""
    cells = np.arange(size * size).reshape(size, size)
    high, wide = BOXES[size]
    turns = range(4) if high == wide else (0, 2)  # a quarter turn would give boxes of 3 rows and 2 columns
    least = None
    for turn in turns:
        for order in (np.rot90(cells, turn), np.fliplr(np.rot90(cells, turn))):
            labels = _in_order_of_appearance(grids[:, order.reshape(-1)], size)
            least = labels if least is None else np.where(labels < least, labels, least)
    return least


def _in_order_of_appearance(grids, size):
    """Return the grids (n, N) as bytes (n,), with digits renamed in order of appearance and blanks as they are."""
    n, cells = grids.shape
    if grids.all():  # the first row has every digit
        order = grids[:, :size].argsort(1)
    else:
        first = [np.where((hit := grids == d).any(1), hit.argmax(1), cells) for d in range(1, size + 1)]
        order = np.stack(first, 1).argsort(1, kind="stable").argsort(1)
    names = np.zeros((n, size + 1), np.uint8)
    names[:, 1:] = order + 1
    places = grids + np.arange(0, n * (size + 1), size + 1, dtype=np.int32)[:, None]
    labels = names.reshape(-1).take(places) + np.uint8(1)  # bytes of numpy must not end with 0
    return labels.view(f"S{cells}")[:, 0]


def repeats(grids, size):
    """Return (n,) bool: whether a digit stands twice in a row, column or box of the (n, N) grids; 0 is a blank."""
    twice = np.zeros(len(grids), bool)
    for place in np.array(units(size)).T:
        groups = np.sort(grids[:, place.argsort(kind="stable")].reshape(len(grids), size, size), 2)
        twice |= ((groups[:, :, 1:] == groups[:, :, :-1]) & (groups[:, :, 1:] > 0)).any((1, 2))
    return twice


def fault(puzzle, answer, size):
    """Return how an answer (N,) breaks the rules of a puzzle (N,), in words; "" if it solves it."""
    changed = np.flatnonzero((puzzle > 0) & (puzzle != answer))
    if len(changed):
        i = int(changed[0])
        return f"the given {puzzle[i]} in row {i // size + 1}, column {i % size + 1} became {answer[i]}"
    for name, places in zip(("row", "column", "box"), np.array(units(size)).T, strict=True):
        for number in range(size):
            digits = answer[places == number].tolist()
            missing = sorted(set(range(1, size + 1)) - set(digits))
            if missing:
                return f"{name} {number + 1} has no {missing[0]}"
    return ""


def verdict(puzzle, answer, size):
    """Return (whether an answer (N,) solves a puzzle (N,), words on that and on the puzzle itself)."""
    problem = fault(puzzle, answer, size)
    count, _ = solve(puzzle, size)
    state = {0: "the puzzle has no solution", 2: "the puzzle has several solutions"}.get(count, "")
    words = f"not solved: {problem}" if problem else "solved"
    return not problem, f"{words}; {state}" if state else words


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


def load_puzzles(folder, cells=0):
    """Return {split: (puzzles, solutions)} of a prepared Sudoku folder, (n, N) uint8 memory maps each.

    cells: N of another kind of puzzle.
    """
    splits = {}
    for split in ("train", "val"):
        path = f"{folder}/{split}.npy"
        try:
            grids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            advice = f"try: python prepare_data.py sudoku --out {shlex.quote(str(folder))} --fresh"
            raise DataError(f"{path}: {str(e).splitlines()[0]}\n{advice}") from e
        sizes = {cells} if cells else {n * n for n in BOXES}
        if grids.dtype != np.uint8 or grids.ndim != 3 or grids.shape[1] != 2 or grids.shape[2] not in sizes:
            raise DataError(f"{path}: expected uint8 (n, 2, cells), found {grids.dtype} {grids.shape}")
        splits[split] = grids[:, 0], grids[:, 1]
    return splits
