"""Score how right answers are, one number per sample.

n samples, pages (n, R, C), targets and answers (n, L), symbols of any integer type, numpy or torch.
"""

import math

import numpy as np

from data_utils.pages import passages as texts
from data_utils.pages.mazes import PATH, are_paths
from data_utils.pages.render import to_text
from models.glyphs import END, HOLE, PADDING

SPACE = 0


def score_answers(task, pages, targets, answers):
    """Return {name: (n,) float64} for a task (tasks.Task); the first score selects the best model.

    read      characters, no_spaces, exact, cer (edits per character, 0 is best)
    continue  characters, names (share of a story's cast in the answer; NaN if the target is no story), exact
    fill      exact, characters
    sudoku    exact, cells, blanks
    maze      optimal (1 for a shortest path and no other mark), valid (1 for any unbroken path), cells
    arc       exact (this pair), cells
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
        valid = are_paths(pages, grids)
        shortest = (targets == PATH).sum(1) == (answers == PATH).sum(1)
        return dict(optimal=(valid & shortest).astype(float), valid=valid.astype(float), cells=characters)
    if task.name == "arc":
        return dict(exact=exact, cells=characters)
    return dict(exact=exact, cells=characters, blanks=_share(right, pages.reshape(targets.shape) == HOLE))


def _share(right, scored):
    """Return the share (n,) of `right` among the `scored` places, both (n, L) bool; NaN without a scored place."""
    counts = scored.sum(1)
    return np.where(counts > 0, (right & scored).sum(1) / np.maximum(1, counts), math.nan)


def lengths(symbols):
    """Return how many of the symbols (n, L) stand before the first END or PADDING, (n,)."""
    ends = (symbols == END) | (symbols == PADDING)
    return np.where(ends.any(1), ends.argmax(1), symbols.shape[1])


def edits(targets, answers):
    """Return the Levenshtein distance (n,) int64 of each pair of texts (n, L), up to their ends.

    All n pairs at once, one symbol of the answers after the other: a row of the table costs O(n L).
    """
    target_lengths, answer_lengths = lengths(targets), lengths(answers)
    places = np.arange(targets.shape[1] + 1)
    row, distances = np.tile(places, (len(targets), 1)), target_lengths.copy()
    for i in range(answer_lengths.max(initial=0)):
        costs = row + 1  # delete the symbol
        np.minimum(costs[:, 1:], row[:, :-1] + (targets != answers[:, i : i + 1]), out=costs[:, 1:])  # or replace it
        row = np.minimum.accumulate(costs - places, 1) + places  # or insert symbols before it
        distances = np.where(answer_lengths == i + 1, row[np.arange(len(row)), target_lengths], distances)
    return distances


def copied_names(targets, answers):
    """Return the share (n,) of hero, thing and place in a story's last sentence that are words of the answer."""
    shares = np.full(len(targets), math.nan)
    for i, (target, answer) in enumerate(zip(targets, answers, strict=True)):
        if end := texts.ending(to_text(target)):
            words = set(texts.words(to_text(answer)))
            shares[i] = np.mean([name in words for name in end[0].values()])
    return shares
