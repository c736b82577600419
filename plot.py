"""Draw what runs wrote: metrics of one or several runs -> PNG.

python plot.py checkpoints/transformer_expert_metrics.jsonl                       # -> ..._loss.png beside it
python plot.py checkpoints/*_metrics.jsonl --out experts.png                      # several runs, one figure
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data_utils.config import DataError, UsageError, from_cli, launch


@dataclass
class Config:
    runs: tuple[str, ...] = ()  # metrics files; the flag's name may be left out
    out: str = ""  # PNG to write; "" = beside the first file


if __name__ == "__main__":
    words = sys.argv[1:]
    cfg = from_cli(Config, __doc__, ["--runs", *words] if words and not words[0].startswith("-") else words)

import matplotlib

matplotlib.use("Agg")  # files only, so that no screen is needed
import matplotlib.pyplot as plt

from data_utils.metrics import read_rows

COLOURS = plt.get_cmap("tab10").colors
SHARES = "exact", "exact_short", "exact_halting", "cells", "recovery", "top1"  # of train_hrm.py and train_sr.py


def plot_losses(paths, out):
    """Write a figure to `out`: training and validation loss over steps, and validation bits per byte by domain.

    With several runs the right panel has one line a run, over all domains; a single run with a router gets a third
    panel, its mean weights by domain. Raises DataError for a file without rows.
    """
    shares = _weights(paths[0]) if len(paths) == 1 else {}
    figure, panels = plt.subplots(1, 3 if shares else 2, figsize=(15.5 if shares else 11, 4.2), layout="constrained")
    left, right = panels[:2]
    for colour, path in zip(COLOURS, paths, strict=False):
        name = Path(path).name.removesuffix("_metrics.jsonl")
        rows = read_rows(path)
        train, val = ([row for row in rows if row.get("split") == split] for split in ("train", "val"))
        if not train and not val:
            raise DataError(f"{path}: no row of metrics")
        left.plot([r["step"] for r in train], [r["loss"] for r in train], color=colour, alpha=0.35, lw=1)
        left.plot([r["step"] for r in val], [r["loss"] for r in val], "o-", color=colour, ms=3.5, label=name)
        if val and "domains" not in val[-1]:  # answers: the shares of them that are right
            for shade, share in zip(COLOURS[1:], [n for n in SHARES if n in val[-1]], strict=False):
                label = f"{share} {val[-1][share]:.3f}" if len(paths) == 1 else f"{name} {share}"
                right.plot([r["step"] for r in val], [r[share] for r in val], "o-", color=shade, ms=3.5, label=label)
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


def _write(figure, out):
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as e:
        raise DataError(f"{out} was not written: {e}") from e
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
    drawn = [name for name in names if any(v is not None for v in histories.get(name, ()))]
    for name in drawn:
        points = [(e + 1, v) for e, v in enumerate(histories[name]) if v is not None]
        ax.plot(*zip(*points, strict=True), "o-", ms=3, label=LABELS.get(name, name.replace("_", " ")))
    values = [v for name in drawn for v in histories[name] if v is not None]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="epoch", **about)
    if len(drawn) > 1:
        ax.legend(frameon=False, fontsize=8)


def _losses(payload, full):
    figure, (ax,) = _panels(1, 3.6)
    _curves(ax, payload["histories"], ("train_loss", "val_loss"), ylabel="loss", title="loss of an epoch")
    return figure


def _metrics(payload, full):
    histories = payload["histories"]
    names = sorted(name for name in histories if name not in ELSEWHERE and any(histories[name]))
    if not names:
        return None
    figure, axes = _panels(len(names), 2.6)
    for ax, name in zip(axes, names, strict=False):
        _curves(ax, histories, [name], ylabel=LABELS.get(name, name.replace("_", " ")))
    return figure


def _codebook(payload, full):
    histories, codes = payload["histories"], payload.get("codes")
    if codes is None or not sum(codes):  # another latent space
        return None
    figure, axes = _panels(5)
    _curves(axes[0], histories, ["perplexity"], ylabel="perplexity", title=f"perplexity, of {len(codes)} codes")
    _curves(axes[1], histories, ["usage"], ylabel="share of codes used", title="usage", ylim=(0, 1.05))
    _curves(axes[2], histories, ["commit"], ylabel="commitment loss", title="commitment")
    _curves(axes[3], histories, ["revived"], ylabel="codes in an epoch", title="revived")
    share = sorted((n / max(1, sum(codes)) for n in codes), reverse=True)
    axes[4].plot(range(1, len(share) + 1), share, color=COLOURS[1], label="codes")
    axes[4].axhline(1 / len(share), color="grey", lw=1, ls="--", label="all alike")
    axes[4].set(xlabel="code, by frequency", ylabel="share of the tokens", title="how often each code is used")
    axes[4].legend(frameon=False, fontsize=8)
    return figure


def _latency(payload, full):
    figure, axes = _panels(1 + full, 3.6)
    _curves(axes[0], payload["histories"], ["epoch_time_s"], ylabel="seconds", title="training and validation")
    axes[0].set_ylim(bottom=0)
    if full:
        _curves(axes[1], payload["histories"], ["throughput"], ylabel="events/s", title="training")
        axes[1].set_ylim(bottom=0)
    return figure


def _recon(payload, full):
    if not full or payload.get("rows") is None:
        figure, axes = _panels(3)
        for ax, name in zip(axes, ("rec_tokens", "rec_types", "rec_globals"), strict=False):
            _curves(ax, payload["histories"], [name], ylabel=LABELS[name], title="validation")
        return figure
    from data_utils.kinematics import kinematics

    before, after = map(kinematics, payload["rows"])
    figure, axes = _panels(len(before))
    for ax, (name, values) in zip(axes, before.items(), strict=False):
        low, high = RANGES[name]
        for found, label, style in (
            (values, "input", dict(color="0.75", histtype="stepfilled")),
            (after[name], "reconstructed", dict(color=COLOURS[3], histtype="step", lw=1.5)),
        ):
            ax.hist(found, bins=50, range=(low, high), density=True, label=label, **style)
        ax.set(xlabel=f"{name} [{UNITS[name]}]" if UNITS[name] else name, ylabel="density", xlim=(low, high))
        ax.legend(frameon=False, fontsize=8)
    return figure


def _adversarial(payload, full):
    losses = "d_loss", "g_loss", "latent_d_loss"
    if not any(name in payload["histories"] for name in losses):  # nobody judges: loop ae without encoder gan
        return None
    figure, axes = _panels(3)
    _curves(axes[0], payload["histories"], losses, ylabel="loss", title="discriminator and generator")
    both = ("d_acc_real", "d_acc_fake")
    _curves(axes[1], payload["histories"], both, ylabel="share judged rightly", title="discriminator", ylim=(0, 1.05))
    _curves(axes[2], payload["histories"], ["adv_w"], ylabel="weight", title="adaptive weight")
    return figure


def _diffusion(payload, full):
    figure, axes = _panels(2, 3.6)
    quarters = [f"eps_q{k}" for k in range(4)]
    _curves(axes[0], payload["histories"], quarters, ylabel="squared error of the noise", title="by noise level")
    names = ("ddim_mse", "ddim_mse_shuffled")
    _curves(axes[1], payload["histories"], names, ylabel="squared error", title="denoised, by own and by other latent")
    return figure


FAMILIES = dict(losses=_losses, metrics=_metrics, codebook=_codebook, latency=_latency, recon=_recon,
                adversarial=_adversarial, diffusion=_diffusion)  # fmt: skip
LABELS = dict(
    train_loss="training", val_loss="validation", rec_tokens="squared error of particles",
    rec_globals="squared error of MET",
    rec_types="cross-entropy of types, nats", d_loss="discriminator", g_loss="generator",
    latent_d_loss="critic of latents", d_acc_real="real events",
    d_acc_fake="reconstructed events", ddim_mse="its own latent", ddim_mse_shuffled="another event's",
    eps_q0="least noise", eps_q1="second quarter", eps_q2="third quarter", eps_q3="most noise", lr="learning rate",
    grad_norm="gradient norm", skipped_steps="skipped steps", type_accuracy="share of types that are right",
)  # fmt: skip
RANGES = dict(pT=(0, 300), eta=(-3, 3), phi=(-3.1416, 3.1416), HT=(150, 1200), MET=(0, 200), m_jj=(0, 300))
UNITS = dict(pT="GeV", eta="", phi="rad", HT="GeV", MET="GeV", m_jj="GeV")
# drawn by a family of their own
ELSEWHERE = {"train_loss", "val_loss", "epoch_time_s", "throughput", "max_memory_mib", "perplexity", "usage", "commit",
             "revived", "d_loss", "g_loss", "latent_d_loss", "d_acc_real", "d_acc_fake", "adv_w", "ddim_mse",
             "ddim_mse_shuffled", *(f"eps_q{k}" for k in range(4))}  # fmt: skip


def table(paths):
    """Each run's best evaluation, by line: step, loss in nats, bits per byte, and those of each domain."""
    lines = []
    for path in paths:
        rows = [row for row in read_rows(path) if row.get("split") == "val"]
        if rows:
            best = min(rows, key=lambda row: row["loss"])
            numbers = {name: best[name] for name in ("bpb", *SHARES) if name in best}
            numbers |= {domain: row["bpb"] for domain, row in best.get("domains", {}).items()}
            words = "  ".join(f"{name} {number:.3f}" for name, number in numbers.items())
            name = str(path).removesuffix("_metrics.jsonl")
            lines.append(f"{name:44} step {best['step']:>6}  loss {best['loss']:.4f}  {words}")
    return "\n".join(lines)


def main(cfg):
    if not cfg.runs:
        raise UsageError("no run named\ntry: python plot.py checkpoints/transformer_expert_metrics.jsonl")
    out = cfg.out or cfg.runs[0].removesuffix("_metrics.jsonl") + "_loss.png"
    plot_losses(cfg.runs, out)
    print(table(cfg.runs))
    print(out)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
