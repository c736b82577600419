"""The figure of a page: the answer to it after some supervision steps, and where each capsule looks."""

import numpy as np
import torch

from data_utils.figures import COLOURS, RED, plt, write_figure
from models.glyphs import CELL_HEIGHT, CELL_WIDTH, END, PADDING, to_images

PAGE = 11  # inches, width of a figure of a page
AMBER = 1.0, 0.75, 0.1


def plot_page(out, *, page, answers, steps, target=None, q=None, attention=None, title=""):
    """Write to `out` a page, its answer after some supervision steps, and where on the page each capsule looked.

    page (R, C), target (L,) and answers (S, L) hold symbols of models/glyphs.py; what follows END is blank. Cells that
    are wrong are red; without a target, those that changed since the answer before are amber. steps (S,) counts
    supervision steps, q (S,) is the chance of being right in the model's eyes. attention: weights (K, r, c) >= 0 of K
    capsules, any r and c that share the page out evenly: patches or cells.
    """
    page, answers = np.asarray(page), [_ended(np.asarray(answer)) for answer in answers]
    columns = len(page[0])
    given = [("page", _cells(page.reshape(-1), columns), None)]
    answered, looked = [], []
    for i, answer in enumerate(answers):
        wrong = answer != (answers[max(0, i - 1)] if target is None else target)
        wrong = wrong if target is None else wrong & (np.asarray(target) != PADDING)
        words = [f"{steps[i]} step{'s' * (steps[i] != 1)}"] + [f"{wrong.sum()} wrong"] * (target is not None)
        words += [] if q is None else [f"q {q[i]:.2f}"]
        answered.append((", ".join(words), _cells(answer, columns, wrong, AMBER if target is None else RED), None))
    if target is not None:  # beside the page if it has its shape
        goal = "target", _cells(_ended(target), columns), None
        if len(target) == page.size:
            given.append(goal)
        else:
            answered.insert(0, goal)
    for k, weights in enumerate(() if attention is None else attention):
        looked.append((f"capsule {k + 1}", given[0][1], np.asarray(weights) / (np.max(weights) or 1)))
    marks = "changed cells amber" if target is None else "wrong cells red"
    groups = [("", 9, given), (f"answer after supervision steps, {marks}", 4, answered)]
    groups += [("where each capsule looks, full colour for its largest weight", 4, looked)] * bool(looked)
    _write_groups(out, title, groups)


def _write_groups(out, title, groups):
    """Write groups (title, square inches of a panel, [(title, image, weights or None)]), one below the other."""
    sizes = []
    for _, area, panels in groups:
        high, wide = panels[0][1].shape[:2]
        inches = min(PAGE - 0.2, (area * wide / high) ** 0.5)
        rows = -(-len(panels) // int(PAGE // inches))
        columns = -(-len(panels) // rows)
        sizes.append((rows, columns, rows * (inches * high / wide + 0.3) + 0.35))
    total = sum(height for *_, height in sizes)
    figure = plt.figure(figsize=(PAGE, total + 0.4 * bool(title)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=[height / total for *_, height in sizes])
    for part, (heading, _, panels), (rows, columns, _) in zip(parts.flat, groups, sizes, strict=True):
        part.suptitle(heading, fontsize=10)
        axes = list(part.subplots(rows, columns, squeeze=False).flat)
        for ax in axes:
            ax.set(xticks=[], yticks=[], visible=False)
        for ax, (name, image, weights) in zip(axes, panels, strict=False):
            ax.set_visible(True)
            ax.set_title(name, fontsize=8)
            ax.imshow(image)
            if weights is not None:
                colour = np.broadcast_to(COLOURS[1], (*weights.shape, 3))
                ax.imshow(colour, alpha=0.65 * weights, extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5))
    if title:
        figure.suptitle(title, fontsize=11)
    write_figure(figure, out)


def _ended(answer):
    """The symbols (L,) of an answer, those after its first END blank."""
    over = np.maximum.accumulate(np.asarray(answer) == END)
    return np.where(np.concatenate([[False], over[:-1]]), PADDING, answer)


def _cells(symbols, columns, marked=None, colour=None):
    """Symbols (L,) -> a picture (high, wide, 3) from 0 to 1 in rows of at most `columns` cells, those marked tinted."""
    columns = min(columns, len(symbols))
    more = -len(symbols) % columns
    page = np.pad(symbols.astype(np.uint8), (0, more), constant_values=PADDING).reshape(-1, columns)
    image = 1 - to_images(torch.from_numpy(page[None]))[0].numpy()[..., None].repeat(3, 2) / 255
    if marked is not None:
        where = np.pad(marked, (0, more)).reshape(page.shape).repeat(CELL_HEIGHT, 0).repeat(CELL_WIDTH, 1)
        image[where] = 0.55 * image[where] + 0.45 * np.array(colour)
    return image
