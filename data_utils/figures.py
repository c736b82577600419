"""The style of all figures, their files, and the figure of losses. Imported only where something is drawn.

matplotlib takes half a second to import, and is optional. So only the figures.py of a room imports this file at its
top. A room takes pyplot from here, where the backend is chosen before pyplot starts.
"""

import io
import sys
from itertools import cycle, zip_longest
from pathlib import Path

import matplotlib

if "ipykernel" not in sys.modules:  # a notebook keeps the backend that shows its figures
    matplotlib.use("Agg")  # draws files only and needs no screen
import matplotlib.pyplot as plt
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter

from data_utils.errors import DataError
from data_utils.files import MARK, is_marked, make_room, write_atomic

# A page that shows a figure of this width with 800 pixels gives letters a pixel per point. So no figure is wider, and
# no letter is smaller than SMALL.
WIDTH = 11  # inches
SMALL = 11  # points
plt.rcParams.update({"font.size": 12, "axes.titlesize": 12, "figure.titlesize": 12, "legend.fontsize": SMALL})
COLOURS = plt.get_cmap("tab10").colors
RED = COLOURS[3]
ROWS = "metrics.jsonl"
SHARES = "exact", "exact_short", "exact_halting", "cells", "recovery", "top1"  # scores of train_hrm.py and train_sr.py
MARKED = {".png": "Software", ".pdf": "Creator", ".svg": "Creator", ".ps": "Creator", ".eps": "Creator"}


# ---- files and style -------------------------------------------------------------------------------------------------


def write_figure(figure, out):
    """Write a figure atomically, with a mark that allows to replace it. An unmarked picture of that name is set aside.

    A name without an ending gets .png. Raises DataError.
    """
    out = Path(out) if Path(out).suffix else Path(f"{out}.png")
    key = MARKED.get(out.suffix.lower())
    content = io.BytesIO()
    try:
        show_dollars(figure)
        make_room(out, is_marked)
        metadata = {key: MARK.decode()} if key else None
        figure.savefig(content, dpi=130, format=out.suffix[1:], metadata=metadata)
        write_atomic(out, lambda file: file.write(content.getvalue()))
    except (OSError, ValueError) as e:
        raise DataError(f"{out} was not written: {(str(e).splitlines() or [type(e).__name__])[0]}") from e
    finally:
        plt.close(figure)


def show_dollars(figure):
    """Show texts of a figure as they are: matplotlib would read what stands between two `$` as a formula.

    Names of columns and runs may have such signs. Only the ticks of logarithmic axes are matplotlib's own formulas.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatter):
                for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                    tick.label1.set_parse_math(True)


def open_frame(ax, grid=True):
    """Remove the frame of axes above and on the right, and add a light grid."""
    if grid:
        ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def small_legend(target, **options):
    """Add a small legend without a frame to axes or to a figure."""
    target.legend(frameon=False, fontsize=SMALL, **options)


def scale(ax, values, linear=False):
    """Label whole steps on the x axis; make y logarithmic for values of more than a decade, unless `linear`."""
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
    """Return the names of scores in a validation row: the first TASK/SCORE of each task, else the SHARES in it."""
    first = {}
    for name in row:
        first.setdefault(name.split("/")[0], name)
    return [name for name in first.values() if "/" in name] or [name for name in SHARES if name in row]


def _run_name(path):
    """Return the name of a run by its metrics file; metrics.jsonl takes the name of its folder."""
    path = Path(path)
    return path.resolve().parent.name if path.name == ROWS else path.name.removesuffix(f"_{ROWS}")


def run_names(paths):
    """Return a name per metrics file. Of runs with the same name, the folders that differ are part of it."""
    names = [_run_name(path) for path in paths]
    if len(set(names)) == len(names):
        return names
    words = []  # of each path: its name, then its folders, the innermost one first
    for name, path in zip(names, map(Path, paths), strict=True):
        folders = path.resolve().parents[1 if path.name == ROWS else 0]  # metrics.jsonl has the name of its folder
        words.append([name, *reversed(folders.parts)])
    columns = [column for column in zip_longest(*words, fillvalue="") if len(set(column)) > 1]
    labels = ["/".join(filter(None, reversed(parts))) for parts in zip(*columns, strict=True)]
    return labels or names


def plot_losses(runs, out):
    """Write a figure to `out`: training and validation loss over steps, and validation bits per byte by domain.

    runs: (path of metrics.jsonl, its rows) of each run. With several runs the right panel has one line per run, over
    all domains. A single run with a router gets a panel below, its mean weights by domain. A run of tasks has one
    training line per task, and in place of bits the first score of each. Raises DataError for a file without rows.
    """
    single = len(runs) == 1
    weights = _weights(runs[0][1]) if single else {}
    rows = [["losses", "scores"]] + [["weights", "weights"]] * bool(weights)
    figure, panels = plt.subplot_mosaic(rows, figsize=(WIDTH, 4.2 * len(rows)), layout="constrained")
    left, right = panels["losses"], panels["scores"]
    names = run_names([path for path, _ in runs])
    for colour, dashes, name, (path, rows) in zip(cycle(COLOURS), cycle(("-", "--", ":", "-.")), names, runs):
        rows = rows_with_steps(rows)
        train = [row for row in rows if row.get("split") == "train"]
        val = [row for row in rows if row.get("split") == "val"]
        if not train and not val:
            raise DataError(f"{path}: no row of metrics")
        scores = score_names(val[-1]) if val else []
        _plot_training(left, train, scores, single, colour)
        if any("task" in row for row in train):
            scale(left, [row["loss"] for row in (*train, *val) if row["loss"] is not None])
        _points(left, [(row["step"], row["loss"]) for row in val], color=colour, label=name)
        if val and "domains" not in val[-1]:
            _plot_scores(right, val, scores, single, name, dashes)
            continue
        right.set(ylabel="bits per byte", title="validation, by domain" if single else "validation")
        if not single:
            _points(right, [(row["step"], row["bpb"]) for row in val], color=colour, label=name)
            continue
        # Domains may come and go between two parts of a run: each has points where it has numbers.
        domains = dict.fromkeys(domain for row in val for domain in row.get("domains", {}))
        for shade, domain in zip(cycle(COLOURS[1:]), domains):
            having = [(row["step"], row["domains"][domain]) for row in val if domain in row.get("domains", {})]
            points = [(step, numbers["bpb"]) for step, numbers in having if numbers.get("tokens", 1)]
            if points:  # older files have rows of domains without a window
                _points(right, points, color=shade, label=f"{domain} {points[-1][1]:.2f}")
    left.set(xlabel="step", ylabel="loss (nats per token)", title="loss: training thin, validation thick")
    right.set(xlabel="step")
    if weights:
        _plot_weights(panels["weights"], weights)
    for axes in panels.values():
        open_frame(axes)
    for axes, place in ((left, {}), (right, dict(loc="center left", bbox_to_anchor=(1, 0.5)))):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, **place)
    write_figure(figure, out)


def _points(ax, points, style="o-", **more):
    ax.plot([step for step, _ in points], [value for _, value in points], style, ms=3.5, **more)


def _plot_training(ax, train, scores, single, colour):
    """Draw training losses: a line per task, in a colour of its own if the run is the only one."""
    tasks = [*(score.split("/")[0] for score in scores), *(row.get("task") for row in train)]
    shades = dict(zip(dict.fromkeys(tasks), COLOURS[1:], strict=False))
    for task in dict.fromkeys(row.get("task") for row in train):
        style = dict(color=shades[task], label=task) if task and single else dict(color=colour)
        points = [(row["step"], row["loss"]) for row in train if row.get("task") == task]
        ax.plot([step for step, _ in points], [loss for _, loss in points], alpha=0.35, lw=1, **style)


def _plot_scores(ax, val, scores, single, name, dashes):
    """Draw the shares of right answers in validation."""
    for shade, score in zip(COLOURS[1:], scores, strict=False):
        words = score.replace("/", " ")
        label = f"{words} {val[-1][score]:.3f}" if single else f"{name} {words}"
        points = [(row["step"], row[score]) for row in val if row.get(score) is not None]
        _points(ax, points, f"o{dashes}", color=shade, label=label)
    ax.set(ylabel="share of right answers", title="validation")


def _weights(rows):
    """Return {expert: {domain: mean weight}} of the last evaluation; {} for a run without a router."""
    domains = next((row["domains"] for row in reversed(rows) if "domains" in row), {})
    names = [n.removeprefix("weight_") for row in list(domains.values())[:1] for n in row if n.startswith("weight_")]
    return {name: {domain: row[f"weight_{name}"] for domain, row in domains.items()} for name in names}


def _plot_weights(ax, weights):
    """Draw the `_weights` of a router as stacked bars, a bar per domain."""
    bottom = dict.fromkeys(next(iter(weights.values())), 0)
    for expert, by_domain in weights.items():
        ax.bar(by_domain.keys(), by_domain.values(), bottom=list(bottom.values()), label=expert, width=0.7)
        bottom = {domain: bottom[domain] + weight for domain, weight in by_domain.items()}
    ax.set(ylabel="mean weight", title="the router's weight of each expert", ylim=(0, 1.2))
    ax.legend(frameon=False, ncols=3, loc="upper center")
