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


def plot_losses(paths, out):
    """Write a figure to `out`: training and validation loss over steps, and validation bits per byte by domain.

    With several runs the right panel has one line a run, over all domains. Raises DataError for a file without rows.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for colour, path in zip(COLOURS, paths, strict=False):
        name = Path(path).name.removesuffix("_metrics.jsonl")
        rows = read_rows(path)
        train, val = ([row for row in rows if row.get("split") == split] for split in ("train", "val"))
        if not train and not val:
            raise DataError(f"{path}: no row of metrics")
        left.plot([r["step"] for r in train], [r["loss"] for r in train], color=colour, alpha=0.35, lw=1)
        left.plot([r["step"] for r in val], [r["loss"] for r in val], "o-", color=colour, ms=3.5, label=name)
        if len(paths) > 1:
            right.plot([r["step"] for r in val], [r["bpb"] for r in val], "o-", color=colour, ms=3.5, label=name)
            continue
        for domain_colour, domain in zip(COLOURS[1:], val[-1]["domains"] if val else (), strict=False):
            numbers = [r["domains"][domain]["bpb"] for r in val]
            label = f"{domain} {numbers[-1]:.2f}"
            right.plot([r["step"] for r in val], numbers, "o-", color=domain_colour, ms=3.5, label=label)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="loss: training thin, validation thick")
    right.set(xlabel="step", ylabel="bits per byte", title="validation" + ", by domain" * (len(paths) == 1))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as e:
        raise DataError(f"{out} was not written: {e}") from e
    finally:
        plt.close(figure)


def main(cfg):
    if not cfg.runs:
        raise UsageError("no run named\ntry: python plot.py checkpoints/transformer_expert_metrics.jsonl")
    out = cfg.out or cfg.runs[0].removesuffix("_metrics.jsonl") + "_loss.png"
    plot_losses(cfg.runs, out)
    print(out)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
