"""Draw what runs wrote: metrics of one or several runs -> PNG.

python plot.py checkpoints/transformer_expert_metrics.jsonl                       # -> ..._loss.png beside it
python plot.py checkpoints/*_metrics.jsonl --out experts.png                      # several runs, one figure
python plot.py outputs/runs/run_20251103-140953_*                                 # of train_ae.py -> figures/runs.png
python plot.py checkpoints/multimodal-hesc                           # of train_multimodal.py, train_hrm.py -> loss.png
python plot.py outputs/multiruns/exp_*                                            # sweeps -> summary.csv and PNGs there
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

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

from data_utils.events.figures import NUMBERS, differences, plot_runs, plot_sweep, results, settings
from data_utils.figures import ROWS, numbered, plot_losses, score_names
from data_utils.files import check_replaceable, is_marked
from data_utils.metrics import read_rows
from data_utils.overrides import SWEEP


def table(runs):
    """Return a line per run, its best evaluation: step, loss in nats, bits per byte in all and by domain, or scores.

    runs: (path of metrics.jsonl, its rows). The best one has the lowest loss; of a run of tasks the highest mean of
    scores.
    """
    lines = []
    for path, rows in runs:
        rows = [row for row in numbered(rows) if row.get("split") == "val"]
        if rows:
            tasks = [name for name in score_names(rows[-1]) if "/" in name]
            best = max(rows, key=lambda row: sum(row.get(n) or 0 for n in tasks) if tasks else -_loss(row))
            numbers = {name: best[name] for name in ("bpb", *score_names(best)) if best.get(name) is not None}
            numbers |= {domain: row["bpb"] for domain, row in best.get("domains", {}).items()}
            words = "  ".join(f"{name} {number:.3f}" for name, number in numbers.items())
            name = str(path).removesuffix(ROWS).rstrip("_/")
            lines.append(f"{name:44} step {best['step']:>6}  loss {_loss(best):.4f}  {words}")
    return "\n".join(lines)


def _loss(row):
    return math.inf if row["loss"] is None else row["loss"]


def draw_folders(folders, out):
    """Write the losses of runs of train_ae.py, and print the numbers of each."""
    out = out or str(Path(folders[0], "figures", "runs.png"))
    differ = differences(settings(folders))
    names = []
    for folder, words in zip(folders, differ, strict=True):
        unique = words and differ.count(words) == 1
        names.append(words if unique else f"{Path(folder).resolve().name} {words}".rstrip())
    plot_runs(folders, names, out)
    for folder, words in zip(folders, differ, strict=True):
        numbers = {k: v for k, v in results(folder).items() if k in ("best_epoch", *NUMBERS) and v is not None}
        print(f"{folder}{' ' if words else ''}{words}: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    print(out)


def draw_files(files, out):
    """Write the losses of files of metrics, and print the best evaluation of each."""
    if not out:
        first = files[0]
        stem = first.removesuffix(ROWS) if Path(first).name == ROWS else f"{first.removesuffix(f'_{ROWS}')}_"
        out = f"{stem}loss.png"
    runs = [(path, read_rows(path)) for path in files]
    plot_losses(runs, out)
    print(table(runs))
    print(out)


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
        draw_folders(folders, cfg.out)
    if not sweeps and not folders:
        draw_files(files, cfg.out)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
