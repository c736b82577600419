"""Draw a page, its answers after some supervision steps, and the attention of each capsule."""

import numpy as np
import torch

from data_utils.figures import COLOURS, RED, SMALL, WIDTH, plt, write_figure
from models.glyphs import CELL_HEIGHT, CELL_WIDTH, END, PADDING, to_images

AMBER = 1.0, 0.75, 0.1


def plot_page(out, *, page, answers, steps, target=None, q=None, attention=None, title=""):
    """Write a figure to `out`: a page, its answers after some supervision steps, and the attention of each capsule.

    page (R, C), target (L,) and answers (S, L) hold symbols of models/glyphs.py; symbols after END are blank. Wrong
    cells are red. Without a target, cells that differ from the answer before are amber. steps: (S,) numbers of
    supervision steps. q: (S,) probability by the halting head that the answer is right. attention: weights (K, r, c)
    >= 0 of K capsules; r and c divide the page evenly, into patches or cells.
    """
    page = np.asarray(page)
    answers = [_blank_after_end(np.asarray(answer)) for answer in answers]
    columns = len(page[0])
    page_panels = [("page", _cells(page.reshape(-1), columns), None)]
    answer_panels, capsule_panels = [], []
    for i, answer in enumerate(answers):
        words = ["1 step" if steps[i] == 1 else f"{steps[i]} steps"]
        if target is None:
            marked, colour = answer != answers[max(0, i - 1)], AMBER
        else:
            marked, colour = (answer != target) & (np.asarray(target) != PADDING), RED
            words.append(f"{marked.sum()} wrong")
        if q is not None:
            words.append(f"q {q[i]:.2f}")
        answer_panels.append((", ".join(words), _cells(answer, columns, marked, colour), None))
    if target is not None:
        panel = "target", _cells(_blank_after_end(target), columns), None
        if len(target) == page.size:  # beside the page, with the same shape
            page_panels.append(panel)
        else:
            answer_panels.insert(0, panel)
    if attention is not None:
        for k, weights in enumerate(attention):
            strength = np.asarray(weights) / (np.max(weights) or 1)
            capsule_panels.append((f"capsule {k + 1}", page_panels[0][1], strength))
    marks = "changed cells amber" if target is None else "wrong cells red"
    groups = [("", 9, page_panels), (f"answer after supervision steps, {marks}", 4, answer_panels)]
    if capsule_panels:
        groups.append(("attention of each capsule, full colour for its largest weight", 4, capsule_panels))
    _write_groups(out, title, groups)


def _write_groups(out, title, groups):
    """Write groups (title, square inches of a panel, [(title, image, weights or None)]), one below the other."""
    sizes = []
    for _, area, panels in groups:
        high, wide = panels[0][1].shape[:2]
        inches = min(WIDTH - 0.2, (area * wide / high) ** 0.5)
        rows = -(-len(panels) // int(WIDTH // inches))
        columns = -(-len(panels) // rows)
        sizes.append((rows, columns, rows * (inches * high / wide + 0.3) + 0.35))
    total = sum(height for *_, height in sizes)
    figure = plt.figure(figsize=(WIDTH, total + (0.4 if title else 0)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=[height / total for *_, height in sizes])
    for part, (heading, _, panels), (rows, columns, _) in zip(parts.flat, groups, sizes, strict=True):
        part.suptitle(heading)
        axes = list(part.subplots(rows, columns, squeeze=False).flat)
        for ax in axes:
            ax.set(xticks=[], yticks=[], visible=False)
        for ax, (name, image, weights) in zip(axes, panels, strict=False):
            ax.set_visible(True)
            ax.set_title(name, fontsize=SMALL)
            ax.imshow(image)
            if weights is not None:
                colour = np.broadcast_to(COLOURS[1], (*weights.shape, 3))
                ax.imshow(colour, alpha=0.65 * weights, extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5))
    if title:
        figure.suptitle(title)
    write_figure(figure, out)


def _blank_after_end(answer):
    """Return the symbols (L,) of an answer with PADDING after its first END."""
    ended = np.maximum.accumulate(np.asarray(answer) == END)
    return np.where(np.concatenate([[False], ended[:-1]]), PADDING, answer)


def _cells(symbols, columns, marked=None, colour=None):
    """Draw symbols (L,) in rows of at most `columns` cells, marked ones tinted; return (height, width, 3), 0 to 1."""
    columns = min(columns, len(symbols))
    padding = -len(symbols) % columns
    page = np.pad(symbols.astype(np.uint8), (0, padding), constant_values=PADDING).reshape(-1, columns)
    image = 1 - to_images(torch.from_numpy(page[None]))[0].numpy()[..., None].repeat(3, 2) / 255
    if marked is not None:
        pixels = np.pad(marked, (0, padding)).reshape(page.shape).repeat(CELL_HEIGHT, 0).repeat(CELL_WIDTH, 1)
        image[pixels] = 0.55 * image[pixels] + 0.45 * np.array(colour)
    return image
