"""Draw the results of runs: metrics of one or several runs -> PNG.

python plot.py checkpoints/transformer_expert_metrics.jsonl   # -> ..._loss.png beside it
python plot.py checkpoints/*_metrics.jsonl --out experts.png  # several runs, one figure
python plot.py outputs/runs/run_20251103-140953_*             # of train_ae.py -> figures/runs.png
python plot.py checkpoints/multimodal-hesc                    # of train_multimodal.py, train_hrm.py -> loss.png
python plot.py outputs/multiruns/exp_*                        # sweeps -> summary.csv and PNGs in their folders
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from data_utils.config import complete, from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import launch


@dataclass
class Config:
    runs: tuple[str, ...] = ()  # metrics files, run folders, or folders of sweeps; the flag's name may be left out
    out: str = ""  # PNG to write; "" = beside the first file, or in the first run's figures
    fresh: bool = False  # rename a picture of that name that is not from here to *.bak


def parse(argv=None):
    """Return the configuration that the command line (or the list `argv`) asks for."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        argv = ["--runs", *words]
    return from_cli(Config, __doc__, argv)


if __name__ == "__main__":
    cfg = parse()

from data_utils.events.figures import NUMBERS, differences, plot_runs, plot_sweep, results, settings
from data_utils.figures import ROWS, plot_losses, rows_with_steps, score_names
from data_utils.files import check_replaceable, is_marked
from data_utils.metrics import read_rows
from data_utils.overrides import SWEEP


def table(runs):
    """Return one line per run with its best evaluation: step, loss in nats, bits per byte or scores.

    runs: (path of metrics.jsonl, its rows). The best evaluation has the lowest loss, or in a run of several tasks the
    highest mean of their scores.
    """
    lines = []
    for path, rows in runs:
        rows = [row for row in rows_with_steps(rows) if row.get("split") == "val"]
        if not rows:
            continue
        tasks = [name for name in score_names(rows[-1]) if "/" in name]
        if tasks:
            best = max(rows, key=lambda row: sum(row.get(name) or 0 for name in tasks))
        else:
            best = min(rows, key=_loss)
        numbers = {name: best[name] for name in ("bpb", *score_names(best)) if best.get(name) is not None}
        numbers |= {domain: row["bpb"] for domain, row in best.get("domains", {}).items()}
        words = "  ".join(f"{name} {number:.3f}" for name, number in numbers.items())
        name = str(path).removesuffix(ROWS).rstrip("_/")
        lines.append(f"{name:44} step {best['step']:>6}  loss {_loss(best):.4f}  {words}")
    return "\n".join(lines)


def _loss(row):
    return math.inf if row["loss"] is None else row["loss"]


def draw_folders(folders, out):
    """Draw the losses of runs of train_ae.py, and print the numbers of each."""
    out = out or str(Path(folders[0], "figures", "runs.png"))
    differ = differences(settings(folders))
    names = []
    for folder, words in zip(folders, differ, strict=True):
        unique = words and differ.count(words) == 1
        names.append(words if unique else f"{Path(folder).resolve().name} {words}".rstrip())
    plot_runs(folders, names, out)
    for folder, words in zip(folders, differ, strict=True):
        numbers = {k: v for k, v in results(folder).items() if k in ("best_epoch", *NUMBERS) and v is not None}
        title = f"{folder} {words}".rstrip()
        print(f"{title}: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    print(out)


def draw_files(files, out):
    """Draw the losses in files of metrics, and print the best evaluation of each."""
    if not out:
        first = files[0]
        stem = first.removesuffix(ROWS) if Path(first).name == ROWS else f"{first.removesuffix(f'_{ROWS}')}_"
        out = f"{stem}loss.png"
    runs = [(path, read_rows(path)) for path in files]
    plot_losses(runs, out)
    print(table(runs))
    print(out)


def metrics_of(run):
    """Return the files of metrics in a folder; [run] for a file, a run of train_ae.py and a sweep."""
    if Path(run, ROWS).is_file():
        return [str(Path(run, ROWS))]
    return sorted(map(str, Path(run).glob(f"*_{ROWS}"))) or [run]


def main(cfg):
    """Draw the runs of `cfg`: all of them files of metrics, folders of train_ae.py, or folders of sweeps."""
    cfg = complete(cfg, type(cfg))
    if not cfg.runs:
        raise UsageError(
            "no run named, such as checkpoints/transformer_expert_metrics.jsonl\ntry: python plot.py --help"
        )
    for run in cfg.runs:
        if not Path(run).exists():
            raise DataError(f"{run}: no such file or folder\ntry: python plot.py --help")
    paths = [path for run in cfg.runs for path in metrics_of(run)]
    check_replaceable(cfg.out, cfg.fresh, is_marked, inputs=paths)
    sweeps = [path for path in paths if Path(path, SWEEP).is_file()]
    folders = [path for path in paths if Path(path).is_dir() and path not in sweeps]
    files = [path for path in paths if not Path(path).is_dir()]
    kinds = [kind for kind, part in dict(sweeps=sweeps, runs=folders, files=files).items() if part]
    if len(kinds) > 1:
        raise UsageError(f"{' and '.join(kinds)} in one figure: name one kind at a time")
    if sweeps and cfg.out:
        raise UsageError("--out with a sweep: its figures are written into its folder")
    if sweeps:
        for sweep in sweeps:
            print(*plot_sweep(sweep), sep="\n")
    elif folders:
        draw_folders(folders, cfg.out)
    else:
        draw_files(paths, cfg.out)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
