"""Figures: their style, a file with a mark, and the losses of runs. Imported only where something is drawn.

matplotlib takes half a second and need not be installed, so no other file of data_utils/ imports this one on top, but
for the figures.py of a room. They take pyplot from here, where its backend is chosen before it starts.
"""

import io
import sys
from itertools import cycle
from pathlib import Path

import matplotlib

if "ipykernel" not in sys.modules:  # else a notebook's own figures would no longer show
    matplotlib.use("Agg")  # files only, so that no screen is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from data_utils.errors import DataError
from data_utils.files import MARK, is_marked, make_room, write_atomic

COLOURS = plt.get_cmap("tab10").colors
RED = COLOURS[3]
ROWS = "metrics.jsonl"
SHARES = "exact", "exact_short", "exact_halting", "cells", "recovery", "top1"  # of train_hrm.py and train_sr.py
MARKED = {".png": "Software", ".pdf": "Creator", ".svg": "Creator", ".ps": "Creator", ".eps": "Creator"}


# ---- files and style -------------------------------------------------------------------------------------------------


def write_figure(figure, out):
    """Write a figure whole or not at all, with a mark that it may be drawn again; another picture is set aside.

    A name without an ending is of a PNG. Raises DataError.
    """
    out = Path(out) if Path(out).suffix else Path(f"{out}.png")
    key = MARKED.get(out.suffix.lower())
    content = io.BytesIO()
    try:
        make_room(out, is_marked)
        metadata = {key: MARK.decode()} if key else None
        figure.savefig(content, dpi=130, format=out.suffix[1:], metadata=metadata)
        write_atomic(out, lambda file: file.write(content.getvalue()))
    except (OSError, ValueError) as e:
        raise DataError(f"{out} was not written: {(str(e).splitlines() or [type(e).__name__])[0]}") from e
    finally:
        plt.close(figure)


def open_frame(ax):
    """Give axes a light grid and take their frame away above and on the right."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def scale(ax, values, linear=False):
    """Whole epochs below; a logarithmic axis with plain numbers for values of more than a decade, unless `linear`."""
    ax.xaxis.get_major_locator().set_params(integer=True)
    if not linear and values and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


# ---- rows of metrics.jsonl -------------------------------------------------------------------------------------------


def numbered(rows):
    """Return the rows of metrics whose step is a number; a loss that is none is None."""
    rows = [row for row in rows if _is_number(row.get("step"))]
    return [row | dict(loss=row.get("loss") if _is_number(row.get("loss")) else None) for row in rows]


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def score_names(row):
    """Return the shares in a row of validation: of each task, TASK/SCORE, the first one; else those of answers."""
    first = {}
    for name in row:
        first.setdefault(name.split("/")[0], name)
    return [name for name in first.values() if "/" in name] or [name for name in SHARES if name in row]


def _run_name(path):
    """What a file of metrics is called: by its folder when it has no name of its own."""
    path = Path(path)
    return path.resolve().parent.name if path.name == ROWS else path.name.removesuffix(f"_{ROWS}")


def _weights(rows):
    """{expert: {domain: mean weight}} of the last evaluation; {} for a run without a router."""
    domains = next((row["domains"] for row in reversed(rows) if "domains" in row), {})
    names = [n.removeprefix("weight_") for row in list(domains.values())[:1] for n in row if n.startswith("weight_")]
    return {name: {domain: row[f"weight_{name}"] for domain, row in domains.items()} for name in names}


def plot_losses(runs, out):
    """Write a figure to `out`: training and validation loss over steps, and validation bits per byte by domain.

    runs: (path of metrics.jsonl, its rows) of each run. With several the right panel has one line per run, over all
    domains; a single run with a router gets a third panel, its mean weights by domain. A run of tasks has one line of
    training for each of them, and instead of bits the first score of each. Raises DataError for a file without rows.
    """
    single = len(runs) == 1
    shares = _weights(runs[0][1]) if single else {}
    figure, panels = plt.subplots(1, 3 if shares else 2, figsize=(15.5 if shares else 11, 4.2), layout="constrained")
    left, right = panels[:2]
    for colour, dashes, (path, rows) in zip(COLOURS, cycle(("-", "--", ":", "-.")), runs):
        name = _run_name(path)
        rows = numbered(rows)
        train, val = ([row for row in rows if row.get("split") == split] for split in ("train", "val"))
        if not train and not val:
            raise DataError(f"{path}: no row of metrics")
        scores = score_names(val[-1]) if val else []
        tasks = [*(score.split("/")[0] for score in scores), *(row.get("task") for row in train)]
        shades = dict(zip(dict.fromkeys(tasks), COLOURS[1:], strict=False))
        for task in dict.fromkeys(row.get("task") for row in train):
            style = dict(color=shades[task], label=task) if task and single else dict(color=colour)
            steps = [row["step"] for row in train if row.get("task") == task]
            losses = [row["loss"] for row in train if row.get("task") == task]
            left.plot(steps, losses, alpha=0.35, lw=1, **style)
        if any("task" in row for row in train):
            scale(left, [row["loss"] for row in (*train, *val) if row["loss"] is not None])
        left.plot([r["step"] for r in val], [r["loss"] for r in val], "o-", color=colour, ms=3.5, label=name)
        if val and "domains" not in val[-1]:  # answers: the shares of them that are right
            for shade, score in zip(COLOURS[1:], scores, strict=False):
                words = score.replace("/", " ")
                label = f"{words} {val[-1][score]:.3f}" if single else f"{name} {words}"
                scored = [r for r in val if r.get(score) is not None]
                right.plot([r["step"] for r in scored], [r[score] for r in scored], f"o{dashes}", color=shade, ms=3.5,
                           label=label)  # fmt: skip
            right.set(ylabel="share of answers that are right", title="validation")
            continue
        right.set(ylabel="bits per byte", title="validation" + ", by domain" * single)
        if not single:
            right.plot([r["step"] for r in val], [r["bpb"] for r in val], "o-", color=colour, ms=3.5, label=name)
            continue
        for shade, domain in zip(COLOURS[1:], val[-1]["domains"] if val else (), strict=False):
            numbers = [r["domains"][domain]["bpb"] for r in val]
            label = f"{domain} {numbers[-1]:.2f}"
            right.plot([r["step"] for r in val], numbers, "o-", color=shade, ms=3.5, label=label)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="loss: training thin, validation thick")
    right.set(xlabel="step")
    for name, by_domain in shares.items():
        before = [sum(shares[n][d] for n in list(shares)[: list(shares).index(name)]) for d in by_domain]
        panels[2].bar(by_domain.keys(), by_domain.values(), bottom=before, label=name, width=0.7)
        panels[2].set(ylabel="mean weight", title="how far the router believes each expert", ylim=(0, 1.2))
        panels[2].legend(frameon=False, ncols=3, loc="upper center")
    for axes in panels:
        open_frame(axes)
    for axes, place in ((left, {}), (right, dict(loc="center left", bbox_to_anchor=(1, 0.5)))):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, **place)
    write_figure(figure, out)
