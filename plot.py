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
