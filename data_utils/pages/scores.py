"""How right answers are, one number a sample; pass@k; what a page's own names would have answered.

n samples, pages (n, R, C), targets and answers (n, L), symbols of any integer type, numpy or torch.
"""

import collections
import math

import numpy as np

from data_utils.pages import passages as texts
from data_utils.pages.mazes import WAY, ways
from data_utils.pages.render import layout, to_text
from models.glyphs import END, HOLE, PADDING

SPACE = 0


def score(task, pages, targets, answers):
    """Return {name: (n,) float64} for a task (tasks.Task); the first one selects the best model.

    read: characters, no_spaces, exact, cer (edits per character, 0 is best); continue: characters, names (of the cast
    of a story, copied into the answer; NaN where the target is no story), exact; fill: exact, characters; sudoku:
    exact, cells, blanks; maze: optimal, valid, cells (1 where the shortest way and nothing else is marked; where any
    unbroken one is); arc: exact (this pair), cells.
    """
    pages, targets, answers = (np.asarray(symbols).astype(np.int64) for symbols in (pages, targets, answers))
    scored = targets != PADDING
    right = (answers == targets) & scored
    exact = (right == scored).all(1).astype(float)
    characters = _share(right, scored)
    if task.name == "read":
        no_spaces = _share(right, scored & (targets != SPACE))
        cer = edits(targets, answers) / np.maximum(1, lengths(targets))
        return dict(characters=characters, no_spaces=no_spaces, exact=exact, cer=cer)
    if task.name == "continue":
        return dict(characters=characters, names=copied_names(targets, answers), exact=exact)
    if task.name == "fill":
        return dict(exact=exact, characters=characters)
    if task.name == "maze":
        grids = answers.reshape(pages.shape)
        valid = ways(pages, grids)
        shortest = (targets == WAY).sum(1) == (answers == WAY).sum(1)
        return dict(optimal=(valid & shortest).astype(float), valid=valid.astype(float), cells=characters)
    if task.name == "arc":
        return dict(exact=exact, cells=characters)
    return dict(exact=exact, cells=characters, blanks=_share(right, pages.reshape(targets.shape) == HOLE))


def _share(right, scored):
    """(n, L) bool, twice -> share of what is scored that is right, (n,); NaN where nothing is."""
    counts = scored.sum(1)
    return np.where(counts > 0, (right & scored).sum(1) / np.maximum(1, counts), math.nan)


def lengths(symbols):
    """Return how many of the symbols (n, L) stand before the first END or PADDING, (n,)."""
    ends = (symbols == END) | (symbols == PADDING)
    return np.where(ends.any(1), ends.argmax(1), symbols.shape[1])


def edits(targets, answers):
    """Return the Levenshtein distance of each pair of texts (n, L), up to their ends, (n,) int64.

    All n at once, one symbol of the answers after the other: a row of the table costs O(n L).
    """
    wanted, given = lengths(targets), lengths(answers)
    places = np.arange(targets.shape[1] + 1)
    row, found = np.tile(places, (len(targets), 1)), wanted.copy()
    for i in range(given.max(initial=0)):
        other = row + 1  # the symbol is too much
        np.minimum(other[:, 1:], row[:, :-1] + (targets != answers[:, i : i + 1]), out=other[:, 1:])
        row = np.minimum.accumulate(other - places, 1) + places  # or symbols are missing before it
        found = np.where(given == i + 1, row[np.arange(len(row)), wanted], found)
    return found


def copied_names(targets, answers):
    """Return the share of hero, thing and place of a story's last sentence that the answer holds as words, (n,)."""
    shares = np.full(len(targets), math.nan)
    for i, (target, answer) in enumerate(zip(targets, answers, strict=True)):
        if end := texts.ending(to_text(target)):
            words = set(texts.words(to_text(answer)))
            shares[i] = np.mean([name in words for name in end[0].values()])
    return shares


def pass_at_k(n, c, k):
    """Return the chance that k of n answers hold a right one, when c are right: 1 - C(n - c, k) / C(n, k).

    n and c: integers, or arrays of one shape; 1 <= k <= n. arXiv 2107.03374, equation 1.
    """
    n, c = np.broadcast_arrays(n, c)
    chances = [1 - math.comb(int(a - b), k) / math.comb(int(a), k) for a, b in zip(n.flat, c.flat, strict=True)]
    return np.array(chances, np.float64).reshape(n.shape)


def frequent_names(pages, length):
    """Return answers (n, `length`) to `fill`: the most frequent name of a page that is as long as its hole.

    Of several the first; only END where there is none. What a model must beat.
    """
    found = np.zeros((len(pages), length), np.uint8)
    for i, page in enumerate(np.asarray(pages)):
        names = collections.Counter(word for word in texts.words(to_text(page)) if len(word) == (page == HOLE).sum())
        names = [name for name, _ in names.most_common() if set(name) != {"_"}]
        found[i] = layout(names[0] if names else "", 1, length)[0]
    return found
