"""Figures: their style, files with a mark, and the losses of runs. Needs matplotlib.

matplotlib takes half a second to import and may be missing. So only the figures.py of a room imports this file at its
top; other files do so where they draw. Rooms take pyplot from here, where its backend is chosen first.
"""

import io
import sys
from itertools import cycle
from pathlib import Path

import matplotlib

if "ipykernel" not in sys.modules:  # in a notebook the user's own figures must still show
    matplotlib.use("Agg")  # writes files without a screen
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from data_utils.errors import DataError
from data_utils.files import MARK, is_marked, make_room, write_atomic

COLOURS = plt.get_cmap("tab10").colors
RED = COLOURS[3]
ROWS = "metrics.jsonl"
SHARES = "exact", "exact_short", "exact_halting", "cells", "recovery", "top1"  # scores of train_hrm.py, train_sr.py
METADATA_KEYS = {".png": "Software", ".pdf": "Creator", ".svg": "Creator", ".ps": "Creator", ".eps": "Creator"}


# ---- files and style -------------------------------------------------------------------------------------------------


def write_figure(figure, out):
    """Write a figure atomically, with MARK in its metadata: a marked picture may be drawn again, another is renamed.

    A name without an ending becomes a PNG. Raises DataError.
    """
    out = Path(out) if Path(out).suffix else Path(f"{out}.png")
    key = METADATA_KEYS.get(out.suffix.lower())
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
    """Give axes a light grid, and no frame above and on the right."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def scale(ax, values, linear=False):
    """Label x with integers; make y logarithmic if `values` span more than a decade, unless `linear`."""
    ax.xaxis.get_major_locator().set_params(integer=True)
    if not linear and values and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


# ---- rows of metrics.jsonl -------------------------------------------------------------------------------------------


def rows_with_steps(rows):
    """Return the rows of metrics whose step is a number; a loss that is no number becomes None."""
    rows = [row for row in rows if _is_number(row.get("step"))]
    return [row | dict(loss=row.get("loss") if _is_number(row.get("loss")) else None) for row in rows]


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def score_names(row):
    """Return the names of scores in a validation row: the first TASK/SCORE of each task, else those of SHARES."""
    first = {}
    for name in row:
        first.setdefault(name.split("/")[0], name)
    return [name for name in first.values() if "/" in name] or [name for name in SHARES if name in row]


def _run_name(path):
    """Return the name of a run: that of its metrics file, or of its folder if the file has the standard name."""
    path = Path(path)
    return path.resolve().parent.name if path.name == ROWS else path.name.removesuffix(f"_{ROWS}")


def _router_weights(rows):
    """Return {expert: {domain: mean weight}} of the last evaluation; {} for a run without a router."""
    domains = next((row["domains"] for row in reversed(rows) if "domains" in row), {})
    first = next(iter(domains.values()), {})
    names = [name.removeprefix("weight_") for name in first if name.startswith("weight_")]
    return {name: {domain: row[f"weight_{name}"] for domain, row in domains.items()} for name in names}


def plot_losses(runs, out):
    """Write a figure of losses and scores over steps to `out`. Raises DataError for a file without rows.

    runs: (path of metrics.jsonl, its rows) of each run. The left panel has training and validation loss; a run of
    several tasks has one training line per task. The right panel has validation bits per byte, by domain if there is
    one run, or the scores of runs whose answers are scored. A single run with a router gets a third panel: the mean
    weight of each expert by domain.
    """
    single = len(runs) == 1
    router = _router_weights(runs[0][1]) if single else {}
    figure, panels = plt.subplots(1, 3 if router else 2, figsize=(15.5 if router else 11, 4.2), layout="constrained")
    left, right = panels[:2]
    for colour, dashes, (path, rows) in zip(COLOURS, cycle(("-", "--", ":", "-.")), runs):
        name = _run_name(path)
        rows = rows_with_steps(rows)
        train = [row for row in rows if row.get("split") == "train"]
        val = [row for row in rows if row.get("split") == "val"]
        if not train and not val:
            raise DataError(f"{path}: no row of metrics")
        scores = score_names(val[-1]) if val else []
        tasks = [*(score.split("/")[0] for score in scores), *(row.get("task") for row in train)]
        task_colours = dict(zip(dict.fromkeys(tasks), COLOURS[1:], strict=False))
        for task in dict.fromkeys(row.get("task") for row in train):
            style = dict(color=task_colours[task], label=task) if task and single else dict(color=colour)
            _plot_column(
                left, [row for row in train if row.get("task") == task], "loss", "-", alpha=0.35, lw=1, **style
            )
        if any("task" in row for row in train):
            scale(left, [row["loss"] for row in (*train, *val) if row["loss"] is not None])
        _plot_column(left, val, "loss", "o-", color=colour, ms=3.5, label=name)
        if val and "domains" not in val[-1]:  # a run whose answers are scored
            right.set(ylabel="share of right answers", title="validation")
            for shade, score in zip(COLOURS[1:], scores, strict=False):
                words = score.replace("/", " ")
                label = f"{words} {val[-1][score]:.3f}" if single else f"{name} {words}"
                scored = [row for row in val if row.get(score) is not None]
                _plot_column(right, scored, score, f"o{dashes}", color=shade, ms=3.5, label=label)
        elif single:
            right.set(ylabel="bits per byte", title="validation, by domain")
            for shade, domain in zip(COLOURS[1:], val[-1]["domains"] if val else (), strict=False):
                by_domain = [dict(step=row["step"], bpb=row["domains"][domain]["bpb"]) for row in val]
                label = f"{domain} {by_domain[-1]['bpb']:.2f}"
                _plot_column(right, by_domain, "bpb", "o-", color=shade, ms=3.5, label=label)
        else:
            right.set(ylabel="bits per byte", title="validation")
            _plot_column(right, val, "bpb", "o-", color=colour, ms=3.5, label=name)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="loss: training thin, validation thick")
    right.set(xlabel="step")
    if router:
        _plot_router(panels[2], router)
    for axes in panels:
        open_frame(axes)
    for axes, place in ((left, {}), (right, dict(loc="center left", bbox_to_anchor=(1, 0.5)))):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, **place)
    write_figure(figure, out)


def _plot_column(axes, rows, name, form, **style):
    axes.plot([row["step"] for row in rows], [row[name] for row in rows], form, **style)


def _plot_router(axes, router):
    """Draw one stacked bar per domain: the mean weights {expert: {domain: weight}}."""
    bottom = dict.fromkeys(next(iter(router.values())), 0.0)
    for expert, weights in router.items():
        axes.bar(
            weights.keys(), weights.values(), bottom=[bottom[domain] for domain in weights], label=expert, width=0.7
        )
        bottom = {domain: bottom[domain] + weight for domain, weight in weights.items()}
    axes.set(ylabel="mean weight", title="trust of the router in each expert", ylim=(0, 1.2))
    axes.legend(frameon=False, ncols=3, loc="upper center")
