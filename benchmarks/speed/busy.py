"""Training beside busy processes: how much speed each script keeps, as it starts by itself and with torch's default.

    python -m benchmarks.speed.busy                             # an hour; nothing else may run meanwhile
    python -m benchmarks.speed.busy --rows expert,sr --times 1

Each script trains for a few seconds in its own process, with as many threads as there are cores: alone, beside one
process that never waits, and beside two. The baseline is libgomp's own spin count, 300,000, which the scripts lower
before they import torch (data_utils/launch.share_cores). Sides take turns; a figure is the median of the rounds.
"""

import contextlib
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.report import ROOT, command_line, compared, measure
from data_utils.metrics import read_rows
from data_utils.workers import cores

BASELINE = dict(GOMP_SPINCOUNT="300000")  # libgomp's count where nobody chooses one
TEXT = "--tokenizer bytes --data_dir {data} --d_model 128 --n_heads 4 --max_seq_len 128 --log_interval 1"
TEXT += " --batch_size 16 --max_epochs 1000 --eval_windows 16 --checkpoint_dir {folder}"
EXPERTS = " ".join(f"--{name}_ckpt {{experts}}/{name}_expert.pt" for name in ("transformer", "state_space", "diffuser"))
SCRIPTS = dict(  # row: (flags, file with the rates, name of the rate there)
    expert=(f"train_expert.py --expert transformer --n_layers 4 {TEXT}",
            "transformer_expert_metrics.jsonl", "tokens_per_s"),
    mla=(f"train_mla.py --n_layers 2 {TEXT} --grad_accum_steps 1 {EXPERTS}",
         "nanothink_mla_metrics.jsonl", "tokens_per_s"),
    sr=("train_sr.py --validate_interval 100000 --val_size 16 --log_interval 1 --output_dir {folder}/run",
        "run/metrics.jsonl", "samples_per_s"),
    ae=("train_ae.py events=500 epochs=1000 make_plots=false latent_space=none out={folder}/run",
        "run/facts/scalars.csv", "throughput"),
    hrm=("train_hrm.py --dataset sudoku --eval_rows 16 --log_steps 1 --steps 100000 --save_dir {folder}",
         "metrics.jsonl", "tokens_per_s"),
    multimodal=("train_multimodal.py --arch sudoku4 --data_paths {data}/pages --log_interval 1 --eval_interval 1000 "
                "--test_samples 16 --train_samples 2000 --epochs 1000 --wandb disabled --checkpoint_path {folder} "
                "--log_file={folder}/train.log",
                "metrics.jsonl", "samples_per_s"),
)  # fmt: skip


def python(words, **options):
    """Run a script of the repo to its end. Raises RuntimeError with its last line if it fails."""
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{words.split()[0]}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


@contextlib.contextmanager
def neighbours(count):
    """`with neighbours(2):` two processes keep a core busy each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rate(path, name):
    """Return the median rate in a file of metrics, without its first row, in which threads and caches are new."""
    if path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = read_rows(path)
    rates = [float(row[name]) for row in rows if row.get(name)]
    if len(rates) < 3:
        raise RuntimeError(f"{path.name}: {len(rates)} rows in so short a time\ntry: a larger --seconds")
    return statistics.median(rates[1:])


def train(script, args, work, count, environment):
    """Train for args.seconds beside `count` busy processes -> items per second."""
    words, file, name = SCRIPTS[script]
    folder = Path(tempfile.mkdtemp(dir=work))
    words = words.format(data=work / "data", experts=work / "experts", folder=folder)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    with neighbours(count):
        python(f"{words} --device cpu --max_seconds {args.seconds}",
               env=inherited | dict(OMP_NUM_THREADS=str(cores())) | environment)  # fmt: skip
    return rate(folder / file, name)


def beside(args, script, work):
    """Yield the figures of one script: alone against the baseline, and beside others against alone."""
    sides = dict(alone=(0, {}), spinning=(0, BASELINE), beside1=(1, {}), beside2=(2, {}))
    if args.spinning:
        sides |= dict(spinning1=(1, BASELINE), spinning2=(2, BASELINE))
    rounds = {side: [] for side in sides}
    for _ in range(args.times):
        for side, settings in sides.items():
            rounds[side].append(train(script, args, work, *settings))
    unit = SCRIPTS[script][2].replace("_per_", "/").replace("throughput", "events/s")

    def against(id, title, ours, baseline, target):
        pairs = list(zip(rounds[ours], rounds[baseline], strict=True))
        return compared(id, f"train_{script}.py, {cores()} threads, {title}", pairs, target, unit=unit)

    yield against("alone", "alone, against torch's own spinning", "alone", "spinning", ">= 0.97")
    for count in (1, 2):
        side, place = f"beside{count}", f"beside {count} busy process{'es' if count > 1 else ''}"
        share = cores() / (cores() + count) - 0.25
        if args.spinning:
            title = f"{place}, against torch's own spinning"
            yield against(f"{side}.spinning", title, side, f"spinning{count}", "> 1")
        yield against(f"{side}.alone", f"{place}, against alone", side, "alone", f">= {share:.2f}")


def prepare(work, rows):
    """Make the text and, for train_mla.py, the three experts."""
    python(f"prepare_data.py expert --toy --data_dir {work}/data")
    if "mla" in rows:
        text = TEXT.format(data=work / "data", folder=work / "experts") + " --max_steps 2 --device cpu"
        for expert in ("transformer", "state_space", "diffuser"):
            start = f"--transformer_ckpt {work}/experts/transformer_expert.pt" if expert == "diffuser" else ""
            python(f"train_expert.py --expert {expert} --n_layers 2 {text} {start}")


def main(argv=None):
    parser = command_line(__doc__, SCRIPTS, "speed.busy", times=3, seconds=20.0)
    parser.add_argument("--spinning", action="store_true", help="torch's own spinning beside busy processes, too")
    args = parser.parse_args(argv)
    args.threads = cores()
    if args.quick:
        args.times, args.seconds = 1, 8.0
    with tempfile.TemporaryDirectory() as work:
        prepare(Path(work), args.rows.split(","))
        rows = {script: partial(beside, script=script, work=Path(work)) for script in SCRIPTS}
        flags = f" --times {args.times} --seconds {args.seconds:g}"
        measure(args, rows, flags + (" --spinning" if args.spinning else ""))


if __name__ == "__main__":
    main()
