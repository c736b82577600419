"""Figures of train_ae.py's runs: those that a run draws of itself, several runs in one, and the summary of a sweep."""

import csv
import io
import sys
from pathlib import Path
from textwrap import shorten

import numpy as np
import yaml
from matplotlib.ticker import MaxNLocator

from data_utils.errors import DataError
from data_utils.events.facts import read_events, read_histories
from data_utils.events.kinematics import kinematics
from data_utils.figures import COLOURS, open_frame, plt, scale, write_figure
from data_utils.files import begins, make_room, write_atomic
from data_utils.overrides import SWEEP

# ---- a run, while it trains ------------------------------------------------------------------------------------------


def handle_event(cfg, families, moment, payload):
    """Draw what the flags of train_ae.py ask for -> {run_dir}/figures/<family>-<moment>-e<epoch>.png, each family once.

    families: those that the loop has. payload: run_dir, epoch, last (whether it is the last epoch), histories (numbers
    of each epoch by name), codes (K,) counts of validation, rows (before, after) of test events. What can't be drawn
    is a warning, and training goes on.
    """
    often = moment != "on_epoch_end" or payload["last"] or (payload["epoch"] + 1) % cfg.plot_every == 0
    for family in FAMILIES if moment in cfg.plot_moments and often else ():
        if family not in families or not getattr(cfg, f"plot_{family}"):
            continue
        figure = None
        try:
            if figure := FAMILIES[family](payload, cfg.plot_detail == "full"):
                name = f"{family}-{moment}-e{payload['epoch']:03d}.png"
                write_figure(figure, Path(payload["run_dir"], "figures", name))
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
        open_frame(ax)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, axes.flat


def _curves(ax, histories, names, **style):
    """Lines over epochs, counted from 1; rates and errors that span more than a decade get a logarithmic axis."""
    drawn, values = [name for name in names if _known(histories, name)], []
    for order, name in enumerate(drawn):
        points = [(e + 1, v) for e, v in enumerate(histories[name]) if v is not None]
        size = dict(lw=2.4, ms=5) if len(drawn) == 2 and not order else dict(lw=1.4, ms=3)  # seen below an equal one
        ax.plot(*zip(*points, strict=True), "o-", label=LABELS.get(name, name.replace("_", " ")), **size)
        values += [v for _, v in points]
    ax.set(xlabel="epoch", **style)
    scale(ax, values, "ylim" in style)
    if len(drawn) > 1:
        ax.legend(frameon=False, fontsize=8)


def _known(histories, name):
    return any(v is not None for v in histories.get(name, ()))


def _of_epochs(payload, panels, height=3.2):
    """A figure with a panel for each (names, style) that something is known of; None without one."""
    panels = [(names, style) for names, style in panels if any(_known(payload["histories"], name) for name in names)]
    if not panels:
        return None
    figure, axes = _panels(len(panels), height)
    for ax, (names, style) in zip(axes, panels, strict=False):
        _curves(ax, payload["histories"], names, **style)
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
    before, after = map(kinematics, payload["rows"])
    figure, axes = _panels(len(before))
    for ax, (name, values) in zip(axes, before.items(), strict=False):
        low, high = RANGES[name]
        edges, width = np.linspace(low, high, 51), (high - low) / 50
        shown, rebuilt = (np.histogram(v, edges)[0] / width / max(1, len(v)) for v in (values, after[name]))
        ax.stairs(shown, edges, color="0.75", fill=True, label="input")
        ax.stairs(rebuilt, edges, color=COLOURS[3], lw=1.5, label="reconstructed")
        top = min(max(shown.max(), rebuilt.max()), 3 * shown.max())  # a spike does not flatten all the rest
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


# ---- several runs, and sweeps ----------------------------------------------------------------------------------------


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
        scale(ax, values)
    figure.set_size_inches(10, 4.2 + 0.19 * -(-len(runs) // columns))
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center",
                  ncols=columns)  # fmt: skip
    write_figure(figure, out)


def _colours(count):
    return COLOURS[:count] if count <= len(COLOURS) else plt.get_cmap("viridis")(np.linspace(0, 0.95, count))


def differences(words):
    """For each list of KEY=VALUE or other words what it does not share with all the others, as one text."""
    return [" ".join(word for word in job if not all(word in other for other in words)) for job in words]


def settings(runs):
    """For each run its flags as KEY=VALUE, those that all of them have, without those of figures."""
    paths = [Path(run, ".hydra", "config.yaml") for run in runs]
    flags = [yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {} for path in paths]
    shared = [key for key in flags[0] if all(key in run for run in flags) and not key.startswith(("plot_", "make_"))]
    return [[f"{key}={run[key]}".replace("[", "").replace("]", "") for key in shared] for run in flags]


def results(run):
    """Numbers of a run: best_val_loss, best_epoch (from 1), and those of its test, test_loss first; what is there."""
    losses = [(loss, epoch + 1) for epoch, loss in enumerate(read_histories(run)["val_loss"]) if loss is not None]
    numbers = dict(zip(("best_val_loss", "best_epoch"), min(losses), strict=True)) if losses else {}
    test = next((e["metrics"] for e in reversed(read_events(run)) if e.get("moment") == "on_test_end"), {})
    return numbers | {name: test[name] for name in sorted(test, key=lambda name: (name != "test_loss", name))}


def plot_sweep(folder):
    """Write summary.csv, losses.png and results.png into the folder of a sweep -> the paths that were written.

    A job is a row: its number, overrides, run, status, seconds, and `results`. Raises DataError.
    """
    try:
        jobs = yaml.safe_load(Path(folder, SWEEP).read_text(encoding="utf-8"))["jobs"]
        rows = [dict(job=i, overrides=" ".join(job["overrides"]), run_dir=job["run_dir"], status=job["status"],
                     seconds=job["seconds"]) for i, job in enumerate(jobs)]  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
        raise DataError(f"{Path(folder, SWEEP)} can't be read: {' '.join(str(e).split())}") from e
    beside = Path(folder).resolve().parents[1] / "runs"  # wherever both were moved
    names = [f"{i} {words}".rstrip() for i, words in enumerate(differences([job["overrides"] for job in jobs]))]
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
        known = [v for v in values if v is not None]
        best = max(known) if name in HIGHER_IS_BETTER else min(known)
        shades = [COLOURS[0] if v == best else "0.75" for v in values]
        ax.barh(range(len(rows)), [v or 0 for v in values], color=shades if name != "seconds" else "0.75")
        for y, v in enumerate(values):
            ax.annotate(f" {v:.4g}" if v is not None else " none", (v or 0, y), va="center", fontsize=7)
        ax.set(xlabel=NUMBERS[name], xlim=(0, 1.3 * max(known) or 1))
        ax.xaxis.label.set_fontsize(8)
        ax.tick_params(labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0, 0].invert_yaxis()  # the first on top
    figure.suptitle(title, fontsize=10)
    write_figure(figure, out)


MOST_DRAWN = 40  # jobs of a sweep in a figure, the best ones
NUMBERS = dict(best_val_loss="best validation loss", test_loss="test loss", rec_tokens="squared error\nof particles",
               ddim_mse="squared error of\nparticles from noise", rec_globals="squared error of MET",
               type_accuracy="share of types\nthat are right", accuracy="share of answers\nthat are right",
               perplexity="perplexity of codes", seconds="seconds")  # fmt: skip
HIGHER_IS_BETTER = "type_accuracy", "accuracy", "perplexity"
