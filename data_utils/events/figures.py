"""Draw figures of train_ae.py: of a run while it trains, of several runs together, and of a sweep."""

import csv
import io
from pathlib import Path
from textwrap import shorten

import numpy as np
import yaml
from matplotlib.ticker import MaxNLocator

from data_utils.errors import DataError
from data_utils.events.facts import read_events, read_histories
from data_utils.events.kinematics import kinematics
from data_utils.events.sweep import differences
from data_utils.figures import COLOURS, RED, SMALL, open_frame, plt, scale, small_legend, write_figure
from data_utils.files import begins, make_room, warn, write_atomic
from data_utils.overrides import SWEEP

# ---- a run, while it trains ------------------------------------------------------------------------------------------


def handle_event(cfg, families, moment, payload):
    """Draw the figures that the flags of train_ae.py ask for: {run_dir}/figures/<family>-<moment>-e<epoch>.png.

    families: those that the loop has. payload: of facts.build_event_payload, with run_dir, epoch and histories {name:
    list of one value per epoch}; also last (whether it is the last epoch), codes (K,) counts in validation, rows
    (before, after) of test events. A figure that fails is a warning, and training goes on.
    """
    histories = payload["histories"] or {}
    if moment not in cfg.plot_moments or not any(histories.values()):
        return
    epoch = payload["epoch"]
    if epoch is None:  # the newest
        epoch = max(map(len, histories.values())) - 1
    if moment == "on_epoch_end" and not payload.get("last") and (epoch + 1) % cfg.plot_every:
        return
    for family, draw in FIGURES.items():
        if family not in families or not getattr(cfg, f"plot_{family}"):
            continue
        try:
            if figure := draw(payload, cfg.plot_detail == "full"):
                name = f"{family}-{moment}-e{epoch:03d}.png"
                write_figure(figure, Path(payload["run_dir"], "figures", name))
        except Exception as e:  # a figure is never worth a run
            warn(f"no figure of {family}: {type(e).__name__}: {e}")
        finally:
            plt.close("all")


def _panels(count, height=3.2):
    """Return a figure and its `count` axes, in rows of at most two."""
    columns = min(2, count)
    rows = -(-count // columns)
    size = 4.6 * columns, height * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        open_frame(ax)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, axes.flat


def _curves(ax, histories, names, **style):
    """Draw lines over epochs, counted from 1; the axis is logarithmic for values of more than a decade."""
    names, values = [name for name in names if _has_values(histories, name)], []
    for order, name in enumerate(names):
        points = [(e + 1, v) for e, v in enumerate(histories[name]) if v is not None]
        # the first of two lines is thicker, so that it shows below an equal one
        size = dict(lw=2.4, ms=5) if len(names) == 2 and not order else dict(lw=1.4, ms=3)
        ax.plot(*zip(*points, strict=True), "o-", label=_label(name), **size)
        values += [v for _, v in points]
    ax.set(xlabel="epoch", **style)
    scale(ax, values, "ylim" in style)
    if len(names) > 1:
        small_legend(ax)


def _has_values(histories, name):
    return any(v is not None for v in histories.get(name, ()))


def _label(name):
    return LABELS.get(name, name.replace("_", " "))


def _of_epochs(payload, panels, height=3.2):
    """Return a figure with a panel for each (names, style) with values; None without one."""
    histories = payload["histories"]
    panels = [(names, style) for names, style in panels if any(_has_values(histories, name) for name in names)]
    if not panels:
        return None
    figure, axes = _panels(len(panels), height)
    for ax, (names, style) in zip(axes, panels, strict=False):
        _curves(ax, histories, names, **style)
    return figure


def _losses(payload, full):
    return _of_epochs(payload, [(("train_loss", "val_loss"), dict(ylabel="loss", title="mean loss per epoch"))], 3.6)


def _metrics(payload, full):
    histories = payload["histories"]
    names = sorted(name for name in histories if name not in ELSEWHERE and any(histories[name]))
    return _of_epochs(payload, [([name], dict(ylabel=_label(name))) for name in names], 2.6)


def _codebook(payload, full):
    histories, codes = payload["histories"], payload.get("codes")
    if not codes or not any(codes):  # another latent space
        return None
    figure, axes = _panels(5)
    _curves(axes[0], histories, ["perplexity"], ylabel="perplexity", title=f"perplexity, of {len(codes)} codes")
    _curves(axes[1], histories, ["usage"], ylabel="share of codes used", title="usage", ylim=(0, 1.05))
    _curves(axes[2], histories, ["commit"], ylabel="commitment loss", title="commitment")
    _curves(axes[3], histories, ["revived"], ylabel="mean codes per step", title="revived")
    share = sorted((n / max(1, sum(codes)) for n in codes), reverse=True)
    axes[4].plot(range(1, len(share) + 1), share, color=COLOURS[1], label="codes")
    axes[4].axhline(1 / len(share), color="grey", lw=1, ls="--", label="uniform")
    axes[4].set(xlabel="code, by frequency", ylabel="share of the latents", title="use of each code")
    small_legend(axes[4])
    return figure


def _latency(payload, full):
    panels = [(["epoch_time_s"], dict(ylabel="seconds per epoch", title="training and validation", ylim=(0, None)))]
    if full:
        panels.append((["throughput"], dict(ylabel="events/s", title="training", ylim=(0, None))))
    return _of_epochs(payload, panels, 3.6)


def _recon(payload, full):
    if not full or payload.get("rows") is None:
        names = "rec_tokens", "eps_loss", "rec_types", "rec_globals"
        return _of_epochs(payload, [([name], dict(ylabel=LABELS[name], title="validation")) for name in names])
    before, after = map(kinematics, payload["rows"])
    figure, axes = _panels(len(before))
    for ax, (name, values) in zip(axes, before.items(), strict=False):
        label, unit, low, high = QUANTITIES[name]
        edges, width = np.linspace(low, high, 51), (high - low) / 50
        inputs, outputs = (np.histogram(v, edges)[0] / width / max(1, len(v)) for v in (values, after[name]))
        ax.stairs(inputs, edges, color="0.75", fill=True, label="input")
        ax.stairs(outputs, edges, color=RED, lw=1.5, label="reconstructed")
        top = min(max(inputs.max(), outputs.max()), 3 * inputs.max())  # a spike must not flatten the rest
        ax.set(xlabel=f"{label} [{unit}]" if unit else label, ylabel=f"density [1/{unit}]" if unit else "density")
        ax.set(xlim=(low, high), ylim=(0, 1.25 * top))
        small_legend(ax, ncols=2, loc="upper right")
    return figure


def _adversarial(payload, full):
    panels = [
        (("d_loss", "g_loss"), dict(ylabel="loss", title="discriminator and generator")),
        (("d_acc_real", "d_acc_fake"), dict(ylabel="accuracy", title="discriminator", ylim=(0, 1.05))),
        (["adv_w"], dict(ylabel="weight", title="weight of the adversarial loss", ylim=(0, None))),
        (["latent_d_loss"], dict(ylabel="cross-entropy, nats", title="critic of latents")),
    ]
    return _of_epochs(payload, panels)


def _diffusion(payload, full):
    noise = dict(ylabel="squared error of the noise", title="by noise level")
    samples = dict(ylabel="squared error of particles", title="sampled from noise, given a latent")
    panels = [([f"eps_q{k}" for k in range(4)], noise), (("ddim_mse", "ddim_mse_shuffled"), samples)]
    return _of_epochs(payload, panels, 3.6)


FIGURES = dict(
    losses=_losses,
    metrics=_metrics,
    codebook=_codebook,
    latency=_latency,
    recon=_recon,
    adversarial=_adversarial,
    diffusion=_diffusion,
)
LABELS = dict(
    train_loss="training",
    val_loss="validation",
    rec_tokens="squared error of particles",
    rec_globals="squared error of MET",
    eps_loss="squared error of the noise",
    rec_types="cross-entropy of types, nats",
    d_loss="discriminator",
    g_loss="generator",
    d_acc_real="real events",
    d_acc_fake="reconstructed events",
    ddim_mse="the event's latent",
    ddim_mse_shuffled="another event's",
    eps_q0="least noise",
    eps_q1="second quarter",
    eps_q2="third quarter",
    eps_q3="most noise",
    lr="learning rate",
    grad_norm="gradient norm",
    skipped_steps="skipped steps",
    type_accuracy="accuracy of types",
)
QUANTITIES = dict(  # label, unit, range
    pT=("pT of an object", "GeV", 0, 300),
    eta=("eta of an object", "", -3, 3),
    phi=("phi of an object", "rad", -3.1416, 3.1416),
    HT=("HT", "GeV", 150, 1200),
    MET=("MET", "GeV", 0, 200),
    m_jj=("mass of two light jets", "GeV", 0, 300),
)
# Metrics that another figure than "metrics" draws.
ELSEWHERE = set(
    """train_loss val_loss epoch_time_s throughput max_memory_mib perplexity usage commit revived d_loss g_loss
    d_acc_real d_acc_fake adv_w latent_d_loss ddim_mse ddim_mse_shuffled eps_q0 eps_q1 eps_q2 eps_q3""".split()
)


# ---- several runs, and sweeps ----------------------------------------------------------------------------------------


def plot_runs(runs, names, out):
    """Write a figure to `out`: losses of run folders over epochs, by their names, and an error if all runs have it.

    Raises DataError for a run without a complete epoch.
    """
    histories = [read_histories(run) for run in runs]
    for run, history in zip(runs, histories, strict=True):
        if not _has_values(history, "train_loss"):
            raise DataError(f"{run}: no complete epoch in facts/events.jsonl")
    shared = [name for name in ("rec_tokens", "ddim_mse") if all(_has_values(history, name) for history in histories)]
    error = shared[0] if shared else None
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
        scale(ax, values)
    figure.set_size_inches(10, 4.2 + 0.19 * -(-len(runs) // columns))
    handles, labels = axes[0].get_legend_handles_labels()
    small_legend(figure, handles=handles, labels=labels, loc="outside lower center", ncols=columns)
    write_figure(figure, out)


def _colours(count):
    return COLOURS[:count] if count <= len(COLOURS) else plt.get_cmap("viridis")(np.linspace(0, 0.95, count))


def settings(runs):
    """Return, for each run, KEY=VALUE for the flags that all of them have, without those of figures."""
    paths = [Path(run, ".hydra", "config.yaml") for run in runs]
    flags = [yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {} for path in paths]
    shared = [key for key in flags[0] if all(key in run for run in flags) and not key.startswith(("plot_", "make_"))]
    return [[f"{key}={run[key]}".replace("[", "").replace("]", "") for key in shared] for run in flags]


def results(run):
    """Return best_val_loss, best_epoch (from 1), test_loss and other test metrics of a run, as far as it has them."""
    losses = [(loss, epoch + 1) for epoch, loss in enumerate(read_histories(run)["val_loss"]) if loss is not None]
    numbers = dict(zip(("best_val_loss", "best_epoch"), min(losses), strict=True)) if losses else {}
    test = next((e["metrics"] for e in reversed(read_events(run)) if e.get("moment") == "on_test_end"), {})
    return numbers | {name: test[name] for name in sorted(test, key=lambda name: (name != "test_loss", name))}


def plot_sweep(folder):
    """Write summary.csv, losses.png and results.png into the folder of a sweep; return their paths.

    A row per job: its number, overrides, run, status, seconds, and `results`. Raises DataError.
    """
    path = Path(folder, SWEEP)
    try:
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        rows = []
        for i, job in enumerate(jobs):
            rows.append(dict(job=i, overrides=" ".join(job["overrides"])))
            rows[-1] |= {key: job[key] for key in ("run_dir", "status", "seconds")}
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
        raise DataError(f"{path} can't be read: {' '.join(str(e).split())}") from e
    runs = Path(folder).resolve().parents[1] / "runs"  # both may have been moved
    names = [f"{i} {words}".rstrip() for i, words in enumerate(differences([job["overrides"] for job in jobs]))]
    for row in rows:
        run = runs / Path(row["run_dir"]).name
        if run.is_dir():
            row["run_dir"] = run
        row |= results(row["run_dir"])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    summary, losses, bars = (Path(folder, name) for name in ("summary.csv", "losses.png", "results.png"))
    make_room(summary, lambda path: begins(path, b"job,overrides,run_dir,status,seconds"))
    write_atomic(summary, lambda file: file.write(text.getvalue().encode()))
    ranking = sorted((row["best_val_loss"], i) for i, row in enumerate(rows) if "best_val_loss" in row)
    best = sorted(i for _, i in ranking[:MOST_DRAWN])
    if not best:
        return [summary]
    plot_runs([rows[i]["run_dir"] for i in best], [names[i] for i in best], losses)
    _bars([rows[i] for i in best], [names[i] for i in best], f"{len(best)} of {len(rows)} jobs", bars)
    return [summary, losses, bars]


def _bars(rows, names, title, out):
    """Write a figure to `out`: a panel for each of the NUMBERS, a bar for each row, the best one in colour."""
    numbers = [name for name in NUMBERS if any(row.get(name) is not None for row in rows)]
    columns = min(3, len(numbers))
    lines = -(-len(numbers) // columns)  # of panels
    size = 2.2 + 2.4 * columns, lines * (1.4 + 0.32 * len(rows))
    figure, axes = plt.subplots(lines, columns, sharey=True, squeeze=False, layout="constrained", figsize=size)
    for ax in axes.flat[len(numbers) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, numbers, strict=False):
        values = [row.get(name) for row in rows]
        present = [v for v in values if v is not None]
        best = max(present) if name in HIGHER_IS_BETTER else min(present)
        shades = [COLOURS[0] if v == best else "0.75" for v in values]
        ax.barh(range(len(rows)), [v or 0 for v in values], color=shades if name != "seconds" else "0.75")
        for y, v in enumerate(values):
            ax.annotate(f" {v:.4g}" if v is not None else " none", (v or 0, y), va="center", fontsize=SMALL)
        ax.set(xlabel=NUMBERS[name], xlim=(0, 1.3 * max(present) or 1))
        ax.xaxis.label.set_fontsize(SMALL)
        ax.tick_params(labelsize=SMALL)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        open_frame(ax, grid=False)
    axes[0, 0].set_yticks(range(len(rows)), names, fontsize=SMALL)
    axes[0, 0].invert_yaxis()  # the first row on top
    figure.suptitle(title)
    write_figure(figure, out)


# ---- scores and latents of a trained model ---------------------------------------------------------------------------


def plot_roc(curves, title, out):
    """Write a figure to `out` with a panel of ROC curves for each score; curves: of roc.compare."""
    names = list(dict.fromkeys(row["score"] for row in curves))
    figure, axes = _panels(len(names), 4.2)
    for ax, name in zip(axes, names, strict=False):
        rows = [row for row in curves if row["score"] == name]
        for colour, row in zip(_colours(len(rows)), rows, strict=True):
            _, background, signal = row["curve"]
            label = f"{shorten(row['signal'], 30)}: {row['auc']:.3f}"
            ax.plot([0, *background], [0, *signal], color=colour, lw=1.4, label=label)
        ax.plot([0, 1], [0, 1], color="grey", lw=1, ls="--")
        ax.set(xlabel="share of background that passes", ylabel="share of signal that passes", title=_label(name))
        small_legend(ax, title="area under the curve", title_fontsize=SMALL, loc="lower right")
    figure.suptitle(title, fontsize=SMALL)
    write_figure(figure, out)


def plot_latents(z, labels, title, out):
    """Write a figure to `out`: the first two principal components of latents z (N, D), coloured by label (N,)."""
    centred = z.astype(np.float64) - z.mean(0, dtype=np.float64)
    variances, vectors = np.linalg.eigh(centred.T @ centred / len(z))
    shares = variances[::-1][:2] / max(variances.sum(), 1e-300)
    components = np.zeros((len(z), 2))  # the second stays 0 for latents of one number
    components[:, : len(shares)] = centred @ vectors[:, ::-1][:, :2]
    drawn = np.linspace(0, len(z) - 1, min(len(z), MOST_POINTS)).astype(int)
    figure, (ax,) = _panels(1, 4.2)
    present = np.unique(labels)
    for colour, label in zip(_colours(len(present)), present, strict=True):
        x, y = components[drawn[labels[drawn] == label]].T
        ax.scatter(x, y, s=4, alpha=0.5, color=colour, lw=0, label=f"label {label}")
    for axis, name, share in zip("xy", ("first", "second"), [*shares, 0], strict=False):
        ax.set(**{f"{axis}label": f"{name} component, {share:.0%} of the variance"})
    small_legend(ax, markerscale=3, ncols=1 + len(present) // 12)
    ax.set_title(title, fontsize=SMALL)
    write_figure(figure, out)


MOST_POINTS = 5000  # events in a figure of latents, evenly chosen
MOST_DRAWN = 40  # jobs of a sweep in a figure, the best ones
NUMBERS = dict(
    best_val_loss="best validation loss",
    test_loss="test loss",
    rec_tokens="squared error\nof particles",
    ddim_mse="squared error of\nparticles from noise",
    rec_globals="squared error of MET",
    type_accuracy="accuracy of types",
    accuracy="accuracy of answers",
    perplexity="perplexity of codes",
    seconds="seconds",
)
HIGHER_IS_BETTER = "type_accuracy", "accuracy", "perplexity"
