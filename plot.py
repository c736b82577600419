"""Draw what runs wrote: metrics of one or several runs -> PNG.

python plot.py checkpoints/transformer_expert_metrics.jsonl                       # -> ..._loss.png beside it
python plot.py checkpoints/*_metrics.jsonl --out experts.png                      # several runs, one figure
python plot.py outputs/runs/run_20251103-140953_*                                 # of train_ae.py -> figures/runs.png
python plot.py checkpoints/multimodal-hesc                           # of train_multimodal.py, train_hrm.py -> loss.png
python plot.py outputs/multiruns/exp_*                                            # sweeps -> summary.csv and PNGs there
"""

import csv
import io
import math
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import shorten

from data_utils.config import from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import launch


@dataclass
class Config:
    runs: tuple[str, ...] = ()  # metrics files, run folders, or folders of sweeps; the flag's name may be left out
    out: str = ""  # PNG to write; "" = beside the first file, or in the first run's figures
    fresh: bool = False  # rename a picture of that name that is not from here to *.bak


if __name__ == "__main__":
    words = sys.argv[1:]
    cfg = from_cli(Config, __doc__, ["--runs", *words] if words and not words[0].startswith("-") else words)

import matplotlib

if "ipykernel" not in sys.modules:  # else a notebook's own figures would no longer show
    matplotlib.use("Agg")  # files only, so that no screen is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from data_utils.events.facts import read_events, read_histories
from data_utils.files import MARK, begins, check_replaceable, is_marked, make_room, write_atomic
from data_utils.metrics import read_rows
from data_utils.overrides import SWEEP

COLOURS = plt.get_cmap("tab10").colors
ROWS = "metrics.jsonl"
SHARES = "exact", "exact_short", "exact_halting", "cells", "recovery", "top1"  # of train_hrm.py and train_sr.py


def plot_losses(paths, out):
    """Write a figure to `out`: training and validation loss over steps, and validation bits per byte by domain.

    With several runs the right panel has one line a run, over all domains; a single run with a router gets a third
    panel, its mean weights by domain. A run of tasks has one line of training for each of them, and instead of bits the
    first score of each. Raises DataError for a file without rows.
    """
    shares = _weights(paths[0]) if len(paths) == 1 else {}
    figure, panels = plt.subplots(1, 3 if shares else 2, figsize=(15.5 if shares else 11, 4.2), layout="constrained")
    left, right = panels[:2]
    for colour, dashes, path in zip(COLOURS, cycle(("-", "--", ":", "-.")), paths):
        name = _name(path)
        rows = _numbered(path)
        train, val = ([row for row in rows if row.get("split") == split] for split in ("train", "val"))
        if not train and not val:
            raise DataError(f"{path}: no row of metrics")
        scores = _scores(val[-1]) if val else []
        tasks = [*(score.split("/")[0] for score in scores), *(row.get("task") for row in train)]
        shades = dict(zip(dict.fromkeys(tasks), COLOURS[1:], strict=False))
        for task in dict.fromkeys(row.get("task") for row in train):
            style = dict(color=shades[task], label=task) if task and len(paths) == 1 else dict(color=colour)
            own = [row for row in train if row.get("task") == task]
            left.plot([r["step"] for r in own], [r["loss"] for r in own], alpha=0.35, lw=1, **style)
        if any("task" in row for row in train):
            _scale(left, [row["loss"] for row in (*train, *val) if row["loss"] is not None])
        left.plot([r["step"] for r in val], [r["loss"] for r in val], "o-", color=colour, ms=3.5, label=name)
        if val and "domains" not in val[-1]:  # answers: the shares of them that are right
            for shade, score in zip(COLOURS[1:], scores, strict=False):
                said = score.replace("/", " ")
                label = f"{said} {val[-1][score]:.3f}" if len(paths) == 1 else f"{name} {said}"
                known = [r for r in val if r.get(score) is not None]
                right.plot([r["step"] for r in known], [r[score] for r in known], f"o{dashes}", color=shade, ms=3.5,
                           label=label)  # fmt: skip
            right.set(ylabel="share of answers that are right", title="validation")
            continue
        right.set(ylabel="bits per byte", title="validation" + ", by domain" * (len(paths) == 1))
        if len(paths) > 1:
            right.plot([r["step"] for r in val], [r["bpb"] for r in val], "o-", color=colour, ms=3.5, label=name)
            continue
        for domain_colour, domain in zip(COLOURS[1:], val[-1]["domains"] if val else (), strict=False):
            numbers = [r["domains"][domain]["bpb"] for r in val]
            label = f"{domain} {numbers[-1]:.2f}"
            right.plot([r["step"] for r in val], numbers, "o-", color=domain_colour, ms=3.5, label=label)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="loss: training thin, validation thick")
    right.set(xlabel="step")
    for name, by_domain in shares.items():
        before = [sum(shares[n][d] for n in list(shares)[: list(shares).index(name)]) for d in by_domain]
        panels[2].bar(by_domain.keys(), by_domain.values(), bottom=before, label=name, width=0.7)
        panels[2].set(ylabel="mean weight", title="how far the router believes each expert", ylim=(0, 1.2))
        panels[2].legend(frameon=False, ncols=3, loc="upper center")
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes, place in ((left, {}), (right, dict(loc="center left", bbox_to_anchor=(1, 0.5)))):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, **place)
    _write(figure, out)


def _numbered(path):
    """Rows of metrics whose step is a number; a loss that is none is None."""
    rows = [row for row in read_rows(path) if _is_number(row.get("step"))]
    return [row | dict(loss=row.get("loss") if _is_number(row.get("loss")) else None) for row in rows]


def _loss(row):
    return math.inf if row["loss"] is None else row["loss"]


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(path):
    """What a file of metrics is called: by its folder when it has no name of its own."""
    path = Path(path)
    return path.resolve().parent.name if path.name == ROWS else path.name.removesuffix(f"_{ROWS}")


def _scores(row):
    """Names of the shares in a row of validation: of each task, TASK/SCORE, the first one; else those of answers."""
    first = {}
    for name in row:
        first.setdefault(name.split("/")[0], name)
    return [name for name in first.values() if "/" in name] or [name for name in SHARES if name in row]


MARKED = {".png": "Software", ".pdf": "Creator", ".svg": "Creator", ".ps": "Creator", ".eps": "Creator"}


def _write(figure, out):
    """Write a figure whole or not at all, with a mark that it may be drawn again; another picture is set aside.

    A name without an ending is of a PNG.
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


def _weights(path):
    """{expert: {domain: mean weight}} of the last evaluation; {} for a run without a router."""
    domains = next((row["domains"] for row in reversed(read_rows(path)) if "domains" in row), {})
    names = [n.removeprefix("weight_") for row in list(domains.values())[:1] for n in row if n.startswith("weight_")]
    return {name: {domain: row[f"weight_{name}"] for domain, row in domains.items()} for name in names}


def plot_fit(X, y, predicted, names, target, title, out):
    """Write points X (M, D), y (M,) and what a formula gives for them to `out`: fit and residuals.

    Over x for one variable; for more, what was found over what is so.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    x = X[:, 0] if X.shape[1] == 1 else y
    order = x.argsort()
    left.plot(x, y, "o", ms=4, alpha=0.7, label="data") if X.shape[1] == 1 else None
    style, label = ("-", "formula") if X.shape[1] == 1 else ("o", "points")
    left.plot(x[order], predicted[order], style, ms=4, color=COLOURS[1], label=label)
    if X.shape[1] > 1:
        left.axline((y.mean(), y.mean()), slope=1, color="grey", lw=1, label="equal")
    left.set(
        xlabel=names[0] if X.shape[1] == 1 else f"{target}, data",
        ylabel=f"{target}, formula" if X.shape[1] > 1 else target,
    )
    right.axhline(0, color="grey", lw=1)
    right.plot(x, y - predicted, "o", ms=4, color=COLOURS[2])
    right.set(xlabel=left.get_xlabel(), ylabel="data minus formula", title="residuals")
    left.legend(frameon=False)
    left.set_title(title if len(title) < 70 else title[:67] + "...", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _write(figure, out)


def handle_event(cfg, families, moment, payload):
    """Draw what the flags of train_ae.py ask for -> {run_dir}/figures/<family>-<moment>-e<epoch>.png, each family once.

    families: those that the loop has. payload: run_dir, epoch, last (whether it is the last epoch), histories (numbers
    of each epoch by name), codes (K,) counts of validation, rows (before, after) of test events. What can't be drawn
    is said, and training goes on.
    """
    often = moment != "on_epoch_end" or payload["last"] or (payload["epoch"] + 1) % cfg.plot_every == 0
    for family in FAMILIES if moment in cfg.plot_moments and often else ():
        if family not in families or not getattr(cfg, f"plot_{family}"):
            continue
        figure = None
        try:
            if figure := FAMILIES[family](payload, cfg.plot_detail == "full"):
                name = f"{family}-{moment}-e{payload['epoch']:03d}.png"
                _write(figure, Path(payload["run_dir"], "figures", name))
        except Exception as e:  # a figure is never worth a run
            print(f"warning: no figure of {family}: {type(e).__name__}: {e}", file=sys.stderr)
        finally:
            plt.close("all")


def _panels(count, height=3.2):
    """A figure with `count` axes in rows of at most three."""
    wide = min(3, count)
    figure, axes = plt.subplots(-(-count // wide), wide, figsize=(4.6 * wide, height * -(-count // wide)),
                                layout="constrained", squeeze=False)  # fmt: skip
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, axes.flat


def _curves(ax, histories, names, **about):
    """Lines over epochs, counted from 1; rates and errors that span more than a decade get a logarithmic axis."""
    drawn, values = [name for name in names if _known(histories, name)], []
    for order, name in enumerate(drawn):
        points = [(e + 1, v) for e, v in enumerate(histories[name]) if v is not None]
        size = dict(lw=2.4, ms=5) if len(drawn) == 2 and not order else dict(lw=1.4, ms=3)  # seen below an equal one
        ax.plot(*zip(*points, strict=True), "o-", label=LABELS.get(name, name.replace("_", " ")), **size)
        values += [v for _, v in points]
    ax.set(xlabel="epoch", **about)
    _scale(ax, values, "ylim" in about)
    if len(drawn) > 1:
        ax.legend(frameon=False, fontsize=8)


def _scale(ax, values, linear=False):
    """Whole epochs below; a logarithmic axis with plain numbers for values of more than a decade, unless `linear`."""
    ax.xaxis.get_major_locator().set_params(integer=True)
    if not linear and values and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 300 * min(values) else (1,)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def _known(histories, name):
    return any(v is not None for v in histories.get(name, ()))


def _of_epochs(payload, panels, height=3.2):
    """A figure with a panel for each (names, about) that something is known of; None without one."""
    panels = [(names, about) for names, about in panels if any(_known(payload["histories"], name) for name in names)]
    if not panels:
        return None
    figure, axes = _panels(len(panels), height)
    for ax, (names, about) in zip(axes, panels, strict=False):
        _curves(ax, payload["histories"], names, **about)
    return figure


def _losses(payload, full):
    return _of_epochs(payload, [(("train_loss", "val_loss"), dict(ylabel="loss", title="loss of an epoch"))], 3.6)


def _metrics(payload, full):
    histories = payload["histories"]
    names = sorted(name for name in histories if name not in ELSEWHERE and any(histories[name]))
    return _of_epochs(payload, [([name], dict(ylabel=LABELS.get(name, name.replace("_", " ")))) for name in names], 2.6)


def _codebook(payload, full):
    histories, codes = payload["histories"], payload.get("codes")
    if not codes or not any(codes):  # another latent space
        return None
    figure, axes = _panels(5)
    _curves(axes[0], histories, ["perplexity"], ylabel="perplexity", title=f"perplexity, of {len(codes)} codes")
    _curves(axes[1], histories, ["usage"], ylabel="share of codes used", title="usage", ylim=(0, 1.05))
    _curves(axes[2], histories, ["commit"], ylabel="commitment loss", title="commitment")
    _curves(axes[3], histories, ["revived"], ylabel="codes in a step, mean", title="revived")
    share = sorted((n / max(1, sum(codes)) for n in codes), reverse=True)
    axes[4].plot(range(1, len(share) + 1), share, color=COLOURS[1], label="codes")
    axes[4].axhline(1 / len(share), color="grey", lw=1, ls="--", label="all alike")
    axes[4].set(xlabel="code, by frequency", ylabel="share of the latents", title="how often each code is used")
    axes[4].legend(frameon=False, fontsize=8)
    return figure


def _latency(payload, full):
    panels = [(["epoch_time_s"], dict(ylabel="seconds of an epoch", title="training and validation", ylim=(0, None)))]
    panels += [(["throughput"], dict(ylabel="events/s", title="training", ylim=(0, None)))] * full
    return _of_epochs(payload, panels, 3.6)


def _recon(payload, full):
    if not full or payload.get("rows") is None:
        names = "rec_tokens", "eps_loss", "rec_types", "rec_globals"
        return _of_epochs(payload, [([name], dict(ylabel=LABELS[name], title="validation")) for name in names])
    from data_utils.events.kinematics import kinematics

    before, after = map(kinematics, payload["rows"])
    figure, axes = _panels(len(before))
    for ax, (name, values) in zip(axes, before.items(), strict=False):
        low, high = RANGES[name]
        edges, width = np.linspace(low, high, 51), (high - low) / 50
        shown, made = (np.histogram(v, edges)[0] / width / max(1, len(v)) for v in (values, after[name]))
        ax.stairs(shown, edges, color="0.75", fill=True, label="input")
        ax.stairs(made, edges, color=COLOURS[3], lw=1.5, label="reconstructed")
        top = min(max(shown.max(), made.max()), 3 * shown.max())  # a spike does not flatten all the rest
        unit = f" [{UNITS[name]}]" if UNITS[name] else ""
        ax.set(xlabel=f"{NAMES[name]}{unit}", ylabel=f"density{unit and f' [1/{UNITS[name]}]'}", xlim=(low, high),
               ylim=(0, 1.25 * top))  # fmt: skip
        ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    return figure


def _adversarial(payload, full):
    return _of_epochs(payload, [
        (("d_loss", "g_loss"), dict(ylabel="loss", title="discriminator and generator")),
        (("d_acc_real", "d_acc_fake"), dict(ylabel="share judged rightly", title="discriminator", ylim=(0, 1.05))),
        (["adv_w"], dict(ylabel="weight", title="weight of the verdict", ylim=(0, None))),
        (["latent_d_loss"], dict(ylabel="cross-entropy, nats", title="critic of latents")),
    ])  # fmt: skip


def _diffusion(payload, full):
    names, title = ("ddim_mse", "ddim_mse_shuffled"), "made from noise, given a latent"
    return _of_epochs(payload, [
        ([f"eps_q{k}" for k in range(4)], dict(ylabel="squared error of the noise", title="by noise level")),
        (names, dict(ylabel="squared error of particles", title=title)),
    ], 3.6)  # fmt: skip


FAMILIES = dict(losses=_losses, metrics=_metrics, codebook=_codebook, latency=_latency, recon=_recon,
                adversarial=_adversarial, diffusion=_diffusion)  # fmt: skip
LABELS = dict(
    train_loss="training", val_loss="validation", rec_tokens="squared error of particles",
    rec_globals="squared error of MET",
    eps_loss="squared error of the noise", rec_types="cross-entropy of types, nats",
    d_loss="discriminator", g_loss="generator", d_acc_real="real events",
    d_acc_fake="reconstructed events", ddim_mse="its own latent", ddim_mse_shuffled="another event's",
    eps_q0="least noise", eps_q1="second quarter", eps_q2="third quarter", eps_q3="most noise", lr="learning rate",
    grad_norm="gradient norm", skipped_steps="skipped steps", type_accuracy="share of types that are right",
)  # fmt: skip
NAMES = dict(pT="pT of an object", eta="eta of an object", phi="phi of an object", HT="HT", MET="MET",
             m_jj="mass of two light jets")  # fmt: skip
RANGES = dict(pT=(0, 300), eta=(-3, 3), phi=(-3.1416, 3.1416), HT=(150, 1200), MET=(0, 200), m_jj=(0, 300))
UNITS = dict(pT="GeV", eta="", phi="rad", HT="GeV", MET="GeV", m_jj="GeV")
# drawn by a family of their own
ELSEWHERE = {"train_loss", "val_loss", "epoch_time_s", "throughput", "max_memory_mib", "perplexity", "usage", "commit",
             "revived", "d_loss", "g_loss", "d_acc_real", "d_acc_fake", "adv_w", "latent_d_loss", "ddim_mse",
             "ddim_mse_shuffled", *(f"eps_q{k}" for k in range(4))}  # fmt: skip


# ---- pages of train_multimodal.py ------------------------------------------------------------------------------------


def plot_page(out, *, page, answers, steps, target=None, q=None, attention=None, title=""):
    """Write to `out` a page, its answer after some supervision steps, and where on the page each capsule looked.

    page (R, C), target (L,) and answers (S, L) hold symbols of models/glyphs.py; what follows END is blank.
    Cells that are wrong are red; without a target, those that changed since the answer before are amber. steps (S,)
    counts supervision steps, q (S,) is the chance of being right in the model's eyes. attention: weights (K, r, c)
    >= 0 of K capsules, any r and c that share the page out evenly: patches or cells.
    """
    from models.glyphs import PADDING

    page, answers, wide = np.asarray(page), [_ended(np.asarray(answer)) for answer in answers], len(page[0])
    given, made, looked = [("page", _cells(page.reshape(-1), wide), None)], [], []
    for i, answer in enumerate(answers):
        wrong = answer != (answers[max(0, i - 1)] if target is None else target)
        wrong = wrong if target is None else wrong & (np.asarray(target) != PADDING)
        words = [f"{steps[i]} step{'s' * (steps[i] != 1)}"] + [f"{wrong.sum()} wrong"] * (target is not None)
        words += [] if q is None else [f"q {q[i]:.2f}"]
        made.append((", ".join(words), _cells(answer, wide, wrong, AMBER if target is None else RED), None))
    if target is not None:  # beside the page if it has its shape
        goal = "target", _cells(_ended(target), wide), None
        given, made = ([*given, goal], made) if len(target) == page.size else (given, [goal, *made])
    for k, weights in enumerate(() if attention is None else attention):
        looked.append((f"capsule {k + 1}", given[0][1], np.asarray(weights) / (np.max(weights) or 1)))
    marks = "changed cells amber" if target is None else "wrong cells red"
    groups = [("", 9, given), (f"answer after supervision steps, {marks}", 4, made)]
    groups += [("where each capsule looks, full colour for its largest weight", 4, looked)] * bool(looked)
    _page_figure(out, title, groups)


def _page_figure(out, title, groups):
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
    for part, (about, _, panels), (rows, columns, _) in zip(parts.flat, groups, sizes, strict=True):
        part.suptitle(about, fontsize=10)
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
    _write(figure, out)


def _ended(answer):
    """The symbols (L,) of an answer, those after its first END blank."""
    from models.glyphs import END, PADDING

    over = np.maximum.accumulate(np.asarray(answer) == END)
    return np.where(np.concatenate([[False], over[:-1]]), PADDING, answer)


def _cells(symbols, columns, marked=None, colour=None):
    """Symbols (L,) -> a picture (high, wide, 3) from 0 to 1 in rows of at most `columns` cells, those marked tinted."""
    import torch

    from models.glyphs import CELL_HEIGHT, CELL_WIDTH, PADDING, to_images

    columns = min(columns, len(symbols))
    more = -len(symbols) % columns
    page = np.pad(symbols.astype(np.uint8), (0, more), constant_values=PADDING).reshape(-1, columns)
    image = 1 - to_images(torch.from_numpy(page[None]))[0].numpy()[..., None].repeat(3, 2) / 255
    if marked is not None:
        where = np.pad(marked, (0, more)).reshape(page.shape).repeat(CELL_HEIGHT, 0).repeat(CELL_WIDTH, 1)
        image[where] = 0.55 * image[where] + 0.45 * np.array(colour)
    return image


PAGE = 11  # inches, width of a figure of a page
RED, AMBER = COLOURS[3], (1.0, 0.75, 0.1)


# ---- figures of benchmarks/run.py ------------------------------------------------------------------------------------


def plot_results(panels, out):
    """Write how many times better figures are than their targets, a panel a system, in two columns, to `out`.

    panels: [(title, [(figure, times, what stands beside it, whether the target is met)])]; a bar goes from 1, which is
    just the target, and ends at REACH or 1 / REACH, where an arrow says that it is beyond.
    """
    sizes = [len(bars) + 3.0 for _, bars in panels]  # lines
    half = min(range(len(panels) + 1), key=lambda n: max(sum(sizes[:n]), sum(sizes[n:])))
    columns = [part for part in (panels[:half], panels[half:]) if part]
    lines = max(sum(sizes[:half]), sum(sizes[half:]))
    figure = plt.figure(figsize=(6.5 * len(columns), 0.14 * lines + 0.9), layout="constrained")
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False).flat, columns, strict=True):
        heights = [len(bars) + 3.0 for _, bars in column]
        heights += [lines - sum(heights)] * (lines > sum(heights))
        axes = list(part.subplots(len(heights), 1, squeeze=False, height_ratios=heights).flat)
        for ax in axes:
            ax.set_visible(False)
        for ax, (title, bars) in zip(axes, column, strict=False):
            ax.set_visible(True)
            _times(ax, title, bars)
    figure.suptitle("figures as times of their target, log scale: blue meets it, red does not", fontsize=10)
    _write(figure, out)


def _times(ax, title, bars):
    for y, (_, times, said, met) in enumerate(bars):
        end = min(max(times, 1 / REACH), REACH)
        colour = COLOURS[0] if met else RED
        ax.plot([1, end], [y, y], color=colour, lw=5, solid_capstyle="butt")
        ax.plot(end, y, ">" if times > REACH else "<" if times < 1 / REACH else "o", color=colour, ms=4.5)
        ax.annotate(said, (max(end, 1), y), (7, 0), textcoords="offset points", va="center", fontsize=6)
    ax.axvline(1, color="0.3", lw=0.8)
    ax.set_yticks(range(len(bars)), [_shortened(name) for name, *_ in bars], fontsize=6)
    ax.set(xscale="log", xlim=(0.8 / REACH, REACH**2.2), ylim=(len(bars) - 0.4, -0.6))  # the first on top
    ax.set_xticks([1 / REACH, 1, REACH], [f"1/{REACH}", "1", f"{REACH}"], fontsize=6)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(length=2, which="both")
    ax.set_title(title, fontsize=8, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def _shortened(name):
    """At most LABEL characters: the beginning without what follows a semicolon, and the end, which tells rows apart."""
    name = name.split(";")[0].replace("`", "")
    if len(name) <= LABEL:
        return name
    return f"{name[: LABEL - 30].rpartition(' ')[0].rstrip(',')} … {name[-28:].partition(' ')[2]}"


LABEL = 72  # characters of a figure's name
REACH = 10  # times


# ---- runs and sweeps of train_ae.py ----------------------------------------------------------------------------------


def plot_runs(runs, names, out):
    """Write the losses of run folders over epochs to `out`, each run by its name, and their error if all have one.

    Raises DataError for a run without a whole epoch.
    """
    histories = [read_histories(run) for run in runs]
    for run, history in zip(runs, histories, strict=True):
        if not _known(history, "train_loss"):
            raise DataError(f"{run}: no whole epoch in facts/events.jsonl")
    error = next((n for n in ("rec_tokens", "ddim_mse") if all(_known(history, n) for history in histories)), None)
    figure, axes = _panels(1 + bool(error), 4.2)
    columns = 1 if len(runs) < 7 else 2  # of the legend
    panels = [("loss: training thin, validation thick", "loss", "val_loss")]
    panels += [("validation", NUMBERS.get(error), error)]
    for ax, (title, label, name) in zip(axes, panels, strict=False):
        values = []
        for colour, run, history in zip(_colours(len(runs)), names, histories, strict=True):
            thin = [("train_loss", dict(lw=0.8, alpha=0.6))] if name == "val_loss" else []
            for line, style in (*thin, (name, dict(lw=1.8, marker="o", ms=3.5, label=shorten(run, 130 // columns)))):
                points = [(e + 1, v) for e, v in enumerate(history[line]) if v is not None]
                ax.plot([e for e, _ in points], [v for _, v in points], color=colour, **style)
                values += [v for _, v in points]
        ax.set(xlabel="epoch", ylabel=label, title=title)
        _scale(ax, values)
    figure.set_size_inches(10, 4.2 + 0.19 * -(-len(runs) // columns))
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center",
                  ncols=columns)  # fmt: skip
    _write(figure, out)


def _colours(count):
    return COLOURS[:count] if count <= len(COLOURS) else plt.get_cmap("viridis")(np.linspace(0, 0.95, count))


def differences(words):
    """For each list of KEY=VALUE or other words what it does not share with all the others, as one text."""
    return [" ".join(w for w in own if not all(w in other for other in words)) for own in words]


def settings(runs):
    """For each run its flags as KEY=VALUE, those that all of them have, without those of figures."""
    import yaml

    paths = [Path(run, ".hydra", "config.yaml") for run in runs]
    flags = [yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {} for path in paths]
    shared = [key for key in flags[0] if all(key in own for own in flags) and not key.startswith(("plot_", "make_"))]
    return [[f"{key}={own[key]}".replace("[", "").replace("]", "") for key in shared] for own in flags]


def results(run):
    """Numbers of a run: best_val_loss, best_epoch (from 1), and those of its test, test_loss first; what is there."""
    losses = [(loss, epoch + 1) for epoch, loss in enumerate(read_histories(run)["val_loss"]) if loss is not None]
    found = dict(zip(("best_val_loss", "best_epoch"), min(losses), strict=True)) if losses else {}
    test = next((e["metrics"] for e in reversed(read_events(run)) if e.get("moment") == "on_test_end"), {})
    return found | {name: test[name] for name in sorted(test, key=lambda name: (name != "test_loss", name))}


def plot_sweep(folder):
    """Write summary.csv, losses.png and results.png into the folder of a sweep -> the paths that were written.

    A job is a row: its number, overrides, run, status, seconds, and `results`. Raises DataError.
    """
    import yaml

    try:
        jobs = yaml.safe_load(Path(folder, SWEEP).read_text(encoding="utf-8"))["jobs"]
        rows = [dict(job=i, overrides=" ".join(job["overrides"]), run_dir=job["run_dir"], status=job["status"],
                     seconds=job["seconds"]) for i, job in enumerate(jobs)]  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
        raise DataError(f"{Path(folder, SWEEP)} can't be read: {' '.join(str(e).split())}") from e
    beside = Path(folder).resolve().parents[1] / "runs"  # wherever both were moved
    names = [f"{i} {own}".rstrip() for i, own in enumerate(differences([job["overrides"] for job in jobs]))]
    for row in rows:
        run = beside / Path(row["run_dir"]).name
        row |= results(run if run.is_dir() else row["run_dir"])
        row["run_dir"] = run if run.is_dir() else row["run_dir"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    written = [Path(folder, "summary.csv")]
    make_room(written[0], lambda path: begins(path, b"job,overrides,run_dir,status,seconds"))
    write_atomic(written[0], lambda file: file.write(text.getvalue().encode()))
    known = sorted((row["best_val_loss"], i) for i, row in enumerate(rows) if "best_val_loss" in row)
    best = sorted(i for _, i in known[:MOST_DRAWN])
    if best:
        written += [Path(folder, "losses.png"), Path(folder, "results.png")]
        plot_runs([rows[i]["run_dir"] for i in best], [names[i] for i in best], written[1])
        _bars([rows[i] for i in best], [names[i] for i in best], f"{len(best)} of {len(rows)} jobs", written[2])
    return written


def _bars(rows, names, title, out):
    """A panel for each of the NUMBERS that a row has, a bar for each row, the best one dark."""
    numbers = [name for name in NUMBERS if any(row.get(name) is not None for row in rows)]
    figure, axes = plt.subplots(1, len(numbers), sharey=True, squeeze=False, layout="constrained",
                                figsize=(2.2 + 2.4 * len(numbers), 1.4 + 0.28 * len(rows)))  # fmt: skip
    for ax, name in zip(axes.flat, numbers, strict=True):
        values = [row.get(name) for row in rows]
        found = [v for v in values if v is not None]
        best = max(found) if name in HIGHER_IS_BETTER else min(found)
        shades = [COLOURS[0] if v == best else "0.75" for v in values]
        ax.barh(range(len(rows)), [v or 0 for v in values], color=shades if name != "seconds" else "0.75")
        for y, v in enumerate(values):
            ax.annotate(f" {v:.4g}" if v is not None else " none", (v or 0, y), va="center", fontsize=7)
        ax.set(xlabel=NUMBERS[name], xlim=(0, 1.3 * max(found) or 1))
        ax.xaxis.label.set_fontsize(8)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0, 0].invert_yaxis()  # the first on top
    figure.suptitle(title, fontsize=10)
    _write(figure, out)


MOST_DRAWN = 40  # jobs of a sweep in a figure, the best ones
NUMBERS = dict(best_val_loss="best validation loss", test_loss="test loss", rec_tokens="squared error\nof particles",
               ddim_mse="squared error of\nparticles from noise", rec_globals="squared error of MET",
               type_accuracy="share of types\nthat are right", accuracy="share of answers\nthat are right",
               perplexity="perplexity of codes", seconds="seconds")  # fmt: skip
HIGHER_IS_BETTER = "type_accuracy", "accuracy", "perplexity"


def table(paths):
    """Each run's best evaluation, by line: step, loss in nats, bits per byte and those of each domain, or its scores.

    The best one has the lowest loss; of a run of tasks the highest mean of scores.
    """
    lines = []
    for path in paths:
        rows = [row for row in _numbered(path) if row.get("split") == "val"]
        if rows:
            tasks = [name for name in _scores(rows[-1]) if "/" in name]
            best = max(rows, key=lambda row: sum(row.get(n) or 0 for n in tasks) if tasks else -_loss(row))
            numbers = {name: best[name] for name in ("bpb", *_scores(best)) if best.get(name) is not None}
            numbers |= {domain: row["bpb"] for domain, row in best.get("domains", {}).items()}
            words = "  ".join(f"{name} {number:.3f}" for name, number in numbers.items())
            name = str(path).removesuffix(ROWS).rstrip("_/")
            lines.append(f"{name:44} step {best['step']:>6}  loss {_loss(best):.4f}  {words}")
    return "\n".join(lines)


def main(cfg):
    if not cfg.runs:
        raise UsageError("no run named\ntry: python plot.py checkpoints/transformer_expert_metrics.jsonl")
    missing = [run for run in cfg.runs if not Path(run).exists()]
    if missing:
        raise DataError(f"{missing[0]}: no such file or folder\ntry: python plot.py outputs/runs/run_*")
    files = [str(Path(run, ROWS)) if Path(run, ROWS).is_file() else run for run in cfg.runs]
    check_replaceable(cfg.out, cfg.fresh, is_marked, inputs=files)
    sweeps = [run for run in files if Path(run, SWEEP).is_file()]
    folders = [run for run in files if Path(run).is_dir() and run not in sweeps]
    kinds = "sweeps" * bool(sweeps), "runs" * bool(folders), "files" * (len(sweeps) + len(folders) < len(files))
    if len(list(filter(None, kinds))) > 1:
        raise UsageError(f"{' and '.join(filter(None, kinds))} in one figure: name one kind at a time")
    if sweeps and cfg.out:
        raise UsageError("--out with a sweep: its figures are written into its folder")
    for sweep in sweeps:
        print(*plot_sweep(sweep), sep="\n")
    if folders:
        out = cfg.out or str(Path(folders[0], "figures", "runs.png"))
        differ = differences(settings(folders))
        plot_runs(folders, [own if own and differ.count(own) == 1 else f"{Path(run).resolve().name} {own}".rstrip()
                            for run, own in zip(folders, differ, strict=True)], out)  # fmt: skip
        for run, name in zip(folders, differ, strict=True):
            numbers = {k: v for k, v in results(run).items() if k in ("best_epoch", *NUMBERS) and v is not None}
            print(f"{run}{' ' if name else ''}{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        print(out)
    if sweeps or folders:
        return {}
    beside = Path(files[0]).name == ROWS
    out = cfg.out or (files[0].removesuffix(ROWS) if beside else files[0].removesuffix(f"_{ROWS}") + "_") + "loss.png"
    plot_losses(files, out)
    print(table(files))
    print(out)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
